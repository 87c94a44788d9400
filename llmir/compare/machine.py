"""The record of what a comparison ran on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import llmir

#: What both sides of every framework compute with.
_PACKAGES = ("llmir", "torch", "transformers", "torch-mlir", "numpy", "intel-openmp")
#: CPU flags that decide which kernels either side picks.
_ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512dq",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)

#: A report does without the commit rather than wait longer.
_GIT_SECONDS = 30.0


def record() -> dict[str, Any]:
    """Date, machine, commit and load, as JSON values."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "commit": _commit(),
        "load_average_before": os.getloadavg(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of what every framework computes with, and of ``packages``, where they are installed."""
    found = {"python": platform.python_version()}
    for package in (*packages, *_PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_ranges(cpus: Iterable[int]) -> str:
    """CPU numbers as a list of ranges: ``{0, 1, 2, 5}`` is ``"0-2,5"``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


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


def _commit() -> str | None:
    """The commit llmir runs from, marked if files differ from it; None if it is not run from a checkout."""
    checkout = Path(llmir.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with uncommitted changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=_GIT_SECONDS, check=True
    )
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
