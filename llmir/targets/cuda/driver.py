"""This machine's GPU, as the CUDA driver shows it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llmir.targets.gpu.architectures import known
from llmir.targets.records import Cache, Hardware, TargetError

LIBRARY = "libcuda.so.1"
#: Of the CUDA driver's CUdevice_attribute.
_SM_COUNT, _L2_BYTES, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 38, 75, 76
_SHARED_BYTES_OF_SM, _SHARED_BYTES_OF_BLOCK = 81, 97


def find(load: Callable[[str], Any]) -> Hardware | None:
    """The first GPU of the CUDA driver, which heeds CUDA_VISIBLE_DEVICES; None where there is none."""
    try:
        library = load(LIBRARY)
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
        isa=known(f"sm_{attribute(_CAPABILITY_MAJOR)}{attribute(_CAPABILITY_MINOR)}", model),
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
