"""What vLLM's code for ROCm says to layers that ask for llmir, on an MI300X that is not there, as JSON.

A program for a process of its own; the cases are CUDA's, see ``cuda_cases.py``.
"""

import os
import sys
import types
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""
#: What AMD's library says of the device.
ASIC = {"target_graphics_version": "gfx942"}
sys.modules["amdsmi"] = mock.MagicMock(amdsmi_get_gpu_asic_info=lambda handle: ASIC)
for extension in ("_C", "_rocm_C", "_moe_C", "_C_stable_libtorch"):  # what only vLLM's ROCm build holds
    sys.modules[f"vllm.{extension}"] = types.ModuleType(extension)

import json  # noqa: E402

from cuda_cases import LAYERS, SELECTION  # noqa: E402
from vllm import platforms  # noqa: E402

platforms.vllm_version_matches_substr = lambda part: False

from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.platforms.rocm import RocmPlatform  # noqa: E402


class FakeRocm(RocmPlatform):
    """vLLM's platform for ROCm, told what its driver would say."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 4)


platforms._current_platform = FakeRocm()

from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

from llmir.frontends.vllm import plugin  # noqa: E402


def said(changes: dict) -> str:
    """The path of the class that a layer gets, or what an error says."""
    layer = AttentionSelectorConfig(**{**SELECTION, **changes})
    try:
        return platforms.current_platform.get_attn_backend_cls(AttentionBackendEnum["LLMIR"], layer, 4)
    except Exception as error:
        return str(error)


plugin.register()
print("FACTS" + json.dumps([said(changes) for changes, _ in LAYERS]))
