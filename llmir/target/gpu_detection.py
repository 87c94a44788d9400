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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmir.child import python
from llmir.ir.kernel_spec import GPUS, Isa
from llmir.target import gpu
from llmir.target.records import Cache, Hardware, TargetError

CUDA_LIBRARY = "libcuda.so.1"
#: What the amdgpu driver tells of processors, a folder each.
AMD_NODES = "sys/class/kfd/kfd/topology/nodes"
#: Seconds for the CUDA driver to start, which takes a few where several GPUs wake up.
PATIENCE = 120.0
#: Of the CUDA driver's CUdevice_attribute.
_SM_COUNT, _L2_BYTES, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 38, 75, 76
_SHARED_BYTES_OF_SM, _SHARED_BYTES_OF_BLOCK = 81, 97


def detect() -> Hardware:
    """The first GPU that this process may use; TargetError where there is none, or none that kernels are made for."""
    found = find()
    if found is None:
        raise TargetError(
            f"no GPU was found here: neither {CUDA_LIBRARY} nor /{AMD_NODES} shows one; install the GPU's driver and "
            f"give this process access to it, or name the GPU to compile for, such as cuda:sm_90"
        )
    return found


def find() -> Hardware | None:
    """As :func:`detect`, but None where there is no GPU."""
    try:
        ctypes.CDLL(CUDA_LIBRARY)  # which starts nothing yet
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
    return _cuda(load) or _amd(root)


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


def _cuda(load: Callable[[str], Any]) -> Hardware | None:
    """The first GPU of the CUDA driver, which heeds CUDA_VISIBLE_DEVICES; None where there is none."""
    try:
        library = load(CUDA_LIBRARY)
    except OSError:
        return None
    count, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    _check(library.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    _check(library.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(library.cuDeviceGetAttribute(ctypes.byref(value), number, device), "cuDeviceGetAttribute")
        return value.value

    model, sms = name.value.decode(errors="replace"), attribute(_SM_COUNT)
    return Hardware(
        isa=_known(f"sm_{attribute(_CAPABILITY_MAJOR)}{attribute(_CAPABILITY_MINOR)}", model),
        machine="cuda",
        model=model,
        features=(),
        cores=sms,
        caches=(Cache(1, attribute(_SHARED_BYTES_OF_SM), 1), Cache(2, attribute(_L2_BYTES), sms)),
        shared_memory=attribute(_SHARED_BYTES_OF_BLOCK),
    )


def _check(status: int, call: str) -> None:
    if status:
        raise TargetError(f"the CUDA driver answers {call} with error {status}; does nvidia-smi show the GPU?")


def _amd(root: Path) -> Hardware | None:
    """The first GPU among the nodes of the amdgpu driver, with caches as published; None where there is none."""
    for node in sorted((root / AMD_NODES).glob("*"), key=lambda path: int(path.name)):
        try:
            lines = (node / "properties").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # a GPU that this process may not use
        facts = {name: int(value) for name, value in map(str.split, lines)}
        if not facts.get("simd_count"):
            continue  # a CPU
        version = facts["gfx_target_version"]  # 90402: gfx942, the last two numbers of it as hexadecimal digits
        isa = _known(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}", "this AMD GPU")
        published = gpu.NAMED[f"hip:{isa}"]
        return replace(published, model=f"AMD {isa}", cores=facts["simd_count"] // facts["simd_per_cu"])
    return None


def _known(isa: str, model: str) -> Isa:
    """``isa``, as one that kernels are made for."""
    if isa not in GPUS:
        raise TargetError(
            f"{model} is {isa}, and there are kernels for {', '.join(GPUS)}; serve on the CPU, target cpu"
        )
    return isa  # type: ignore[return-value]


if __name__ == "__main__":
    main()
