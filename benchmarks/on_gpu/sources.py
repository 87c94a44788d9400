"""Loads kernels out of other projects' source trees, without what their packages import beside them.

A package's own ``__init__`` pulls in most of a serving framework. Here its place is taken by an empty package that
only says where its modules lie, and the few modules that the kernels ask about the machine are answered. Nothing of
this is done where the real package is installed.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

#: What the kernels are told where there is no GPU, in the interpreter: an H100.
_CAPABILITY, _MULTIPROCESSORS = (9, 0), 132


def capability() -> tuple[int, int]:
    """Compute capability of the device."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else _CAPABILITY


def multiprocessors() -> int:
    """Multiprocessors of the device."""
    if not torch.cuda.is_available():
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(0).multi_processor_count


def _module(name: str, *folders: Path, **names: Any) -> ModuleType:
    """A module of that name that holds ``names``, and is a package of the modules in ``folders`` if any are given."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    if folders:
        module.__path__ = [str(folder) for folder in folders]
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    sys.modules[name] = module
    return module


def _never(*_: object, **__: object) -> bool:
    return False


class _Off(ModuleType):
    """Environment variables of vLLM: none is set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("VLLM_"):
            return False
        raise AttributeError(name)


class _KVQuantMode(enum.IntEnum):
    """What vLLM's kernels compare with; only NONE is used."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def _family(number: int) -> bool:
    """Whether the device is of the family of e.g. 90."""
    return capability()[0] == number // 10


def shim_vllm(root: Path, *extensions: Path) -> None:
    """Makes the modules of a vLLM source tree importable, the first time it is called.

    ``extensions``: folders of its compiled flash attention.
    """
    if "vllm" in sys.modules:
        return
    import triton
    import triton.language as tl

    folder = root / "vllm"
    for name in ("", ".v1", ".v1.attention", ".v1.attention.ops"):
        _module(f"vllm{name}", folder.joinpath(*name.split(".")))
    _module("vllm.vllm_flash_attn", folder / "vllm_flash_attn", *extensions)
    sys.modules["vllm.envs"] = sys.modules["vllm"].envs = _Off("vllm.envs")  # type: ignore[attr-defined]
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        is_cuda_alike=lambda: True,
        **dict.fromkeys(("is_rocm", "is_xpu", "is_cpu", "is_tpu"), _never),
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_device_capability_family=lambda number, *_: _family(number),
        is_device_capability=_never,
        has_device_capability=lambda least, *_: 10 * capability()[0] + capability()[1] >= least,
        get_device_capability=lambda *_: capability(),
    )
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.logger", init_logger=logging.getLogger)
    _module("vllm.triton_utils", triton=triton, tl=tl, HAS_TRITON=True)
    _module("vllm.v1.kv_cache_interface", KVQuantMode=_KVQuantMode)


def shim_sglang(root: Path) -> None:
    """Makes the attention kernels of an SGLang source tree importable."""
    folder = root / "sglang"
    for name in ("", ".kernels", ".kernels.ops", ".kernels.ops.attention", ".srt"):
        _module(f"sglang{name}", folder.joinpath(*name.split(".")))
    no = ("is_hip", "is_xpu", "is_npu", "is_cpu", "is_gfx95_supported", "is_gfx1250_supported", "get_bool_env_var")
    _module(
        "sglang.srt.utils",
        is_cuda=lambda: True,
        get_device_core_count=lambda *_: multiprocessors(),
        get_device_capability=lambda *_: capability(),
        **dict.fromkeys(no, _never),
    )


@contextmanager
def as_if_on_device() -> Iterator[None]:
    """Modules that ask for the compute capability while they are imported get an answer without a GPU as well."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: _CAPABILITY):
        yield


def load(name: str) -> ModuleType:
    """The module ``name``; ImportError says why it cannot be had."""
    with as_if_on_device():
        return importlib.import_module(name)


def is_installed(package: str) -> bool:
    """Whether a package can be imported as it is; a namespace or an empty folder is none."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
