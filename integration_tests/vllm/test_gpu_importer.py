"""Models for GPUs, read on a machine without one: what only their kernels have, and the blocks they may have."""

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WriteModel
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import llama

from llmir.errors import LlmirError
from llmir.frontends.vllm.offline import import_model
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.bindings import ir
from llmir.ir.experts import MoE
from llmir.ir.module import caches_of, model_info, ops_of
from llmir.ir.opaque import import_level
from llmir.targets.machine import Target

HOPPER = Target.named("cuda:sm_90")
TINY: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 256}


def load(folder: str, target: Target = HOPPER, **engine_args: Any) -> ir.Module:
    return import_model(folder, target, **TINY, **engine_args)


def test_blocks_may_be_small(write_model: WriteModel) -> None:
    folder = write_model("llama")
    assert model_info(load(folder)).allowed_block_sizes == (16, 32, 64, 128, 256)
    assert model_info(load(folder, Target.detect())).allowed_block_sizes == (32, 64, 128, 256)


def test_without_a_target_it_is_this_machine(write_model: WriteModel) -> None:
    assert model_info(import_model(write_model("llama"), **TINY)).allowed_block_sizes[0] == 32


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
def test_an_fp8_cache_is_quantized(write_model: WriteModel, cache_dtype: str) -> None:
    module = load(write_model("llama"), kv_cache_dtype=cache_dtype)
    assert {cache.format.dtype for cache in caches_of(module).values()} == {"f8E4M3FN"}
    assert {(s.cache.quantized, s.dtype) for s in [spec_of(op) for op in ops_of(module, PagedAttention)]} == {
        (True, "bf16")
    }


@pytest.mark.parametrize("name", ["cuda:sm_80", "hip:gfx942"])
def test_an_fp8_cache_needs_its_conversions(write_model: WriteModel, name: str) -> None:
    with pytest.raises(LlmirError, match="the KV cache dtype is 'fp8'"):
        load(write_model("llama"), Target.named(name), kv_cache_dtype="fp8")


def test_float32_has_no_kernel(write_model: WriteModel) -> None:
    with pytest.raises(LlmirError, match="the model runs in float32"):
        load(write_model("llama"), dtype="float32")


def attention_with_sinks(num_heads: int, *args: Any, **kwargs: Any) -> Attention:
    """A layer of Llama's whose heads have sinks."""
    sinks = torch.nn.Parameter(torch.empty(num_heads))
    layer = Attention(num_heads, *args, sinks=sinks, **kwargs)
    layer.sinks_of_model = sinks
    return layer


def test_sinks_are_a_weight_of_the_layer(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "Attention", attention_with_sinks)
    folder = write_model("llama")
    module = load(folder, tensor_parallel_size=2)
    layers = ops_of(module, PagedAttention)
    assert [spec_of(op).sinks for op in layers] == [True] * LAYERS
    assert layers[0].sinks.name == "model.layers.0.self_attn.attn.sinks_of_model"
    assert layers[0].sinks.type.shards == 2
    on_cpu = load(folder, Target.detect(), tensor_parallel_size=2)
    assert [spec_of(op) for op in ops_of(on_cpu, PagedAttention)] == [spec_of(op) for op in layers]


def test_gpt_oss_has_sinks_and_experts_with_biases(write_model: WriteModel) -> None:
    module = load(write_model("gpt_oss"))
    assert [spec_of(op).sinks for op in ops_of(module, PagedAttention)] == [True] * LAYERS
    assert import_level(module) == "full"
    experts = ops_of(module, MoE)
    assert [(op.gate_up_bias.shape, op.down_bias.shape) for op in experts] == [([4, 1024], [4, 256])] * LAYERS
