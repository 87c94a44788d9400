"""Two engines in one process, with plans of different blocks: neither hears of the other's."""

from types import SimpleNamespace
from typing import Any

import pytest
from gpu_plans import gpu_plan
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.worker.utils import select_common_block_size

from llmir.frontends.vllm import description
from llmir.frontends.vllm.backend import LlmirAttentionBackend
from llmir.frontends.vllm.gpu_backend import LlmirGpuAttentionBackend
from llmir.frontends.vllm.planning import PLAN_KEY

BACKENDS = (LlmirAttentionBackend, LlmirGpuAttentionBackend)


def engine(block_size: int) -> VllmConfig:
    """The configuration of an engine whose plan has blocks of so many tokens."""
    plan = gpu_plan(block_size=block_size).to_json()
    return VllmConfig(additional_config={PLAN_KEY: plan})


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_engine_is_told_its_own_block_size(backend: Any) -> None:
    for block_size in (64, 32):
        with set_current_vllm_config(engine(block_size)):
            assert backend.get_supported_kernel_block_sizes() == [block_size]
    assert backend.get_supported_kernel_block_sizes() == [MultipleOf(backend.block_size_step)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_is_asked_about_without_a_configuration(backend: Any) -> None:
    with set_current_vllm_config(engine(64)):
        backend.get_supported_kernel_block_sizes()
    assert select_common_block_size(32, [backend], [SimpleNamespace(block_size=32)]) == 32


def test_layers_ask_with_the_configuration_that_they_get() -> None:
    def get_kv_cache_spec(self: Any, vllm_config: VllmConfig) -> list[Any]:
        return LlmirAttentionBackend.get_supported_kernel_block_sizes()

    wrapped = description._with_its_configuration(get_kv_cache_spec)
    assert [wrapped(None, engine(block_size)) for block_size in (64, 32)] == [[64], [32]]
    assert Attention.get_kv_cache_spec.__code__ is wrapped.__code__
