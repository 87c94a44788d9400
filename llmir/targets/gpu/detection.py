"""This machine's GPU, as the CUDA driver or the amdgpu driver shows it; torch is not needed.

The CUDA driver is asked in a process of its own, which is this module run as a program: once a process has started the
driver, no process that it forks can use CUDA, and serving frameworks fork.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmir.child import python
from llmir.targets.cuda import driver as cuda
from llmir.targets.hip import driver as hip
from llmir.targets.records import Cache, Hardware, TargetError

#: Seconds for the CUDA driver to start, which takes a few where several GPUs wake up.
PATIENCE = 120.0


def detect() -> Hardware:
    """The first GPU that this process may use; TargetError where there is none, or none that kernels are made for."""
    found = find()
    if found is None:
        raise TargetError(
            f"no GPU was found here: neither {cuda.LIBRARY} nor /{hip.NODES} shows one; install the GPU's driver and "
            f"give this process access to it, or name the GPU to compile for, such as cuda:sm_90"
        )
    return found


def find() -> Hardware | None:
    """As :func:`detect`, but None where there is no GPU."""
    try:
        ctypes.CDLL(cuda.LIBRARY)  # which starts nothing yet
    except OSError:
        return look()
    command = python("-m", __name__)
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetError(
            f"the CUDA driver says nothing of its GPU within {PATIENCE:.0f} s: does nvidia-smi show it?"
        ) from error
    if done.returncode:
        raise TargetError(done.stderr.strip().rpartition("\n")[2] or "the CUDA driver cannot be asked for its GPU")
    return _read(done.stdout)


def look(root: Path = Path("/"), load: Callable[[str], Any] = ctypes.CDLL) -> Hardware | None:
    """As :func:`find`, in this process, whose forks cannot use CUDA afterwards.

    ``load`` gives a shared library by name, or raises OSError.
    """
    return cuda.find(load) or hip.find(root)


def _read(answer: str) -> Hardware | None:
    """What :func:`main` wrote."""
    facts = json.loads(answer)
    if facts is None:
        return None
    caches = tuple(Cache(**cache) for cache in facts["caches"])
    return Hardware(**{**facts, "features": tuple(facts["features"]), "caches": caches})


def main() -> None:
    """Write the GPU to standard output, as JSON; what is wrong with it to standard error."""
    try:
        found = look()
    except TargetError as error:
        sys.exit(str(error))
    print(json.dumps(found and asdict(found)))


if __name__ == "__main__":
    main()
