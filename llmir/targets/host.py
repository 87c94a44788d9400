"""This machine's CPU, as ``/proc`` and ``/sys`` show it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path

from llmir.targets import registry
from llmir.targets.records import WITHOUT_KERNELS, Cache, Hardware

#: CPU flags that tell one processor from another: instructions. The others are of virtualization, power, workarounds.
_CODE_FEATURES = re.compile(
    r"(s?sse\d?(_[12])?|pni|ssse3|sse4a|avx.*|amx.*|fma4?|f16c|bmi[12]|abm|lzcnt|popcnt|movbe|adx|aes|vaes|"
    r"pclmulqdq|vpclmulqdq|gfni|sha_ni|cx16|rdrand|rdseed|rdpid|clflushopt|clwb|prfchw|3dnowprefetch|xop|tbm|"
    r"xsave.*|fsgsbase|movdiri|movdir64b|serialize|asimd.*|sve.*|bf16|i8mm|fp|fphp)"
)


def detect(root: Path = Path("/")) -> Hardware:
    """This machine's CPU, read from ``/proc`` and ``/sys`` below ``root``, with the best instruction set it has."""
    model, flags = _cpuinfo(root)
    cpus = sorted(os.sched_getaffinity(0))
    found = Hardware(
        isa=WITHOUT_KERNELS,
        machine=platform.machine(),
        model=model,
        features=tuple(sorted(flag for flag in flags if _CODE_FEATURES.fullmatch(flag))),
        cores=_cores(root, cpus),
        caches=_caches(root, cpus[0]),
    )
    best = (isa for isa in registry.isas(on_gpu=False) if registry.kind_of(isa).runs(isa, found))
    return replace(found, isa=next(best, WITHOUT_KERNELS))


def _cpuinfo(root: Path) -> tuple[str, frozenset[str]]:
    """Model name and CPU flags of the first processor."""
    facts: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name", "unknown processor"), frozenset(flags.split())


def _cores(root: Path, cpus: list[int]) -> int:
    """Physical cores behind the logical CPUs ``cpus``."""
    found = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = _read(topology / "core_id") or f"cpu{cpu}"
        found.add((_read(topology / "physical_package_id"), core))
    return max(1, len(found))


def _caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """Data caches that logical CPU ``cpu`` reads through."""
    found = []
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size and _read(index / "type") in ("Data", "Unified"):
            unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
            sharers = _cpu_list_length(_read(index / "shared_cpu_list"))
            found.append(Cache(int(_read(index / "level")), int(size[1]) * unit, sharers))
    return tuple(sorted(found, key=lambda cache: cache.level))


def _cpu_list_length(text: str) -> int:
    """Number of CPUs in a kernel list such as ``0-3,8``; at least 1."""
    total = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return max(1, total)


def _read(path: Path) -> str:
    """Text of a kernel file, empty where the machine does not have it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
