"""The environment that the processes of a comparison get, the same for both sides of a framework."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmir import child
from llmir.compare.frameworks import Framework
from llmir.compare.machine import readable_path

#: Beginnings of the names of variables that change the speed of any framework.
_RECORDED_PREFIXES = ("OMP_", "KMP_", "GOMP_", "MKL_", "LLMIR_", "HF_HUB_OFFLINE", "LD_PRELOAD")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def child_environment(framework: Framework, model: str, prefix: Path) -> dict[str, str]:
    """The environment of every process of a framework, whichever side it runs.

    What the caller has set himself stays. Added are the framework's own variables, and the recommended preload
    libraries that are installed: under ``prefix``, the environment that the process runs in, or system-wide.
    """
    environment = child.environment(os.environ)
    additions = framework.environment(os.sched_getaffinity(0))
    if Path(model).is_dir():
        additions["HF_HUB_OFFLINE"] = "1"  # nothing to ask a network for
    for name, value in additions.items():
        environment.setdefault(name, value)
    preloads = recommended_preloads(environment.get("LD_PRELOAD", ""), prefix)
    if preloads:
        environment["LD_PRELOAD"] = ":".join(preloads)
    return environment


def recommended_preloads(already: str, prefix: Path | None = None) -> list[str]:
    """Libraries to preload: those in ``already`` (an LD_PRELOAD), then what is recommended and installed.

    ``prefix`` is the environment to look into, this process's own if None.
    """
    folder = Path(sys.prefix if prefix is None else prefix, "lib")
    libraries = [library for library in already.replace(" ", ":").split(":") if library]
    # A second OpenMP runtime would fight the first for the cores.
    if not any(name in already for name in ("libiomp", "libomp", "libgomp")):
        libraries += _first_existing([folder], "libiomp5.so")
    if "libtcmalloc" not in already:
        libraries += _first_existing([folder, *_system_folders()], "libtcmalloc_minimal*.so*", "libtcmalloc.so*")
    return libraries


def recorded(framework: Framework, environment: Mapping[str, str]) -> dict[str, Any]:
    """Variables and preloads, as JSON values, for the report; paths below the working folder are relative."""
    prefixes = (*_RECORDED_PREFIXES, *framework.recorded_variables)
    return {
        "variables": {
            name: readable_path(value)
            for name, value in sorted(environment.items())
            if name.startswith(prefixes) and not any(word in name for word in _SECRETS)
        },
        "preloads": [readable_path(library) for library in environment.get("LD_PRELOAD", "").split(":") if library],
    }


def _system_folders() -> list[Path]:
    folders = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
    return [Path(folder) for folder in folders]


def _first_existing(folders: Iterable[Path], *patterns: str) -> list[str]:
    for pattern in patterns:
        for folder in folders:
            for found in sorted(folder.glob(pattern)):
                return [str(found)]
    return []
