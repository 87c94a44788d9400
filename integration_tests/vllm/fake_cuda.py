"""A process in which vLLM takes this machine for one with an H100: its own code for CUDA runs, its kernels do not.

For processes of their own: :func:`become` goes before anything of vLLM is imported.
"""

import os
import sys
import types
from typing import Any
from unittest import mock

CAPABILITY = (9, 0)
NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 << 30
#: What only vLLM's CUDA build holds.
EXTENSIONS = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn")


def platform_class() -> type[Any]:
    """vLLM's platform for CUDA, told what its driver would say."""
    for name in EXTENSIONS:
        sys.modules.setdefault(f"vllm.{name}", mock.MagicMock(spec=types.ModuleType(name)))
    from vllm.platforms.cuda import CudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class FakeCuda(CudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return NAME

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        @classmethod
        def device_count(cls) -> int:
            return 1

    return FakeCuda


def become() -> None:
    """Let vLLM find CUDA, and llmir an H100 that it has published figures of."""
    import torch
    from vllm import platforms

    from llmir.frontends.common import planning
    from llmir.targets.machine import Target

    # Triton is here, and vLLM uses it where it takes devices to be hidden for a while, if it is no build for CPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    platforms.vllm_version_matches_substr = lambda part: False
    platforms._current_platform = platform_class()()
    sys.modules["vllm.vllm_flash_attn"] = _Anything("vllm.vllm_flash_attn")
    from vllm import _custom_ops

    torch.ops._C = _Anything("vllm._C")  # later: who asks it whether it has an operation is not to register more
    for question in [name for name in vars(_custom_ops) if "_supports_" in name or name.endswith("_supported")]:
        setattr(_custom_ops, question, lambda *_: False)
    planning.host_of = lambda device: Target.named("cuda:sm_90")


class _Anything(types.ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)
