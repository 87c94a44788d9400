"""What the vLLM frontend refuses, by target: vLLM's configuration is played by plain objects."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.vllm import support
from llmir.frontends.vllm.versions import VERSIONS

CPU, GPU = "avx512", "sm_90"


def config(**changes: Any) -> Any:
    """A configuration that both kinds of target serve, with changes by ``part__field``."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            use_mla=False,
            is_encoder_decoder=False,
            is_multimodal_model=False,
            runner_type="generate",
            dtype="torch.bfloat16",
            max_model_len=4096,
        ),
        "cache_config": SimpleNamespace(
            cache_dtype="auto",
            block_size=64,
            user_specified_block_size=False,
            kv_sharing_fast_prefill=False,
            kv_cache_dtype_skip_layers=[],
            prefix_match_unit=None,
        ),
        "parallel_config": SimpleNamespace(
            prefill_context_parallel_size=1, decode_context_parallel_size=1, use_ubatching=False
        ),
        "attention_config": SimpleNamespace(backend=None, backend_per_kind={}, use_non_causal=False),
        "scheduler_config": SimpleNamespace(async_scheduling=True),
        "device_config": SimpleNamespace(device_type="cuda"),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def layer(**changes: Any) -> Any:
    """An attention layer that both kinds of target serve, as it is recorded."""
    given = {"alibi_slopes": None, "scale": 0.125, "logits_soft_cap": None, "extra": {}}
    implementation = {**given, **changes.pop("impl", {})}
    facts = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "sliding_window": None,
        "kv_cache_torch_dtype": "torch.bfloat16",
        "attn_type": "decoder",
        "has_sink": False,
        "kv_sharing_target_layer_name": None,
        "use_mm_prefix": False,
        "kv_cache_dtype": "auto",
        "head_size": 128,
        "head_size_v": 128,
    }
    return SimpleNamespace(impl=SimpleNamespace(**implementation), **{**facts, **changes})


@pytest.mark.parametrize("isa", [CPU, "sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_usual_configuration_is_served(isa: str) -> None:
    support.check_config(config(), isa)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_config__dtype": "torch.float32"},
            "runs in float32, and llmir has kernels for bfloat16 and float16 on a GPU",
        ),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "'fp8_e5m2'"),
        ({"cache_config__cache_dtype": "int8"}, "'int8'"),
        ({"cache_config__cache_dtype": "nvfp4"}, "'nvfp4'"),
        ({"cache_config__cache_dtype": "fp8_per_token_head"}, "'fp8_per_token_head'"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers"),
        ({"cache_config__block_size": 24, "cache_config__user_specified_block_size": True}, "not a multiple of 16"),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"model_config__is_encoder_decoder": True}, "cross-attention"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_ubatching": True}, "micro-batches"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, "asynchronous scheduling"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "a drafter that has attention layers"),
        ({"kv_transfer_config": SimpleNamespace()}, "KV cache transfer"),
        ({"attention_config__use_non_causal": True}, "non-causal attention"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
    ],
)
def test_what_a_gpu_cannot_serve_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LlmirError, match=reason):
        support.check_config(config(**changes), GPU)


def test_speculation_with_lengths_on_the_host_is_served() -> None:
    drafts = SimpleNamespace(method="ngram")
    support.check_config(config(speculative_config=drafts, scheduler_config__async_scheduling=False), GPU)


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize(("isa", "served"), [("sm_90", True), ("sm_100", True), ("sm_80", False), ("gfx942", False)])
def test_fp8_caches_need_conversions(cache_dtype: str, isa: str, served: bool) -> None:
    asked = config(cache_config__cache_dtype=cache_dtype)
    if served:
        support.check_config(asked, isa)
    else:
        with pytest.raises(LlmirError, match=f"'{cache_dtype}', and llmir keeps the model's own .* on {isa}"):
            support.check_config(asked, isa)


def test_a_cpu_keeps_its_own_block_sizes() -> None:
    asked = config(cache_config__block_size=16, cache_config__user_specified_block_size=True)
    support.check_config(asked, GPU)
    with pytest.raises(LlmirError, match="block size 16 is not a multiple of 32"):
        support.check_config(asked, CPU)


def test_a_compiler_may_choose_small_blocks_on_a_gpu() -> None:
    assert support.allowed_block_sizes(config(), GPU) == [16, 32, 64, 128, 256]
    assert support.allowed_block_sizes(config(), CPU) == [32, 64, 128, 256, 512]
    assert support.allowed_block_sizes(config(model_config__max_model_len=64), GPU) == [16, 32, 64]


def test_blocks_match_prefixes_by_the_unit_asked_for() -> None:
    asked = config(cache_config__prefix_match_unit=48)
    assert support.allowed_block_sizes(asked, GPU) == [48]
    assert support.allowed_block_sizes(asked, CPU) == [32, 64, 128, 256, 512]


@pytest.mark.parametrize(("device", "found"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_the_device_is_vllms(device: str, found: str) -> None:
    assert support.device_of(config(device_config__device_type=device)) == found


def test_other_devices_are_refused() -> None:
    with pytest.raises(LlmirError, match="the device is 'xpu'"):
        support.device_of(config(device_config__device_type="xpu"))


@pytest.mark.parametrize(
    ("changes", "on_cpu", "on_gpu"),
    [
        ({}, None, None),
        ({"has_sink": True, "impl": {"extra": {"sinks": object()}}}, None, None),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of f8E4M3FN has no kernel on a CPU", None),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype 'fp8_e5m2'", "KV cache dtype 'fp8_e5m2'"),
        ({"attn_type": "encoder_only"}, "encoder_only attention", "encoder_only attention"),
        ({"impl": {"alibi_slopes": [0.5]}}, None, "ALiBi has no kernel on a GPU"),
        ({"impl": {"extra": {"chunk_lookback": 1}}}, "chunk_lookback", "chunk_lookback"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "shared with layer 'layers.0'", "shared with layer 'layers.0'"),
        ({"head_size": 120, "head_size_v": 120}, None, "head size is 120, and there are kernels for multiples of 16"),
        ({"head_size": 42, "head_size_v": 42}, "head size is 42, and there are kernels for multiples of 8", "is 42"),
        ({"head_size": 128, "head_size_v": 64}, "values of another size", "values of another size"),
    ],
)
def test_layers_are_served_by_target(changes: dict[str, Any], on_cpu: str | None, on_gpu: str | None) -> None:
    for isa, reason in ((CPU, on_cpu), (GPU, on_gpu)):
        if reason is None:
            support.check_attention("layers.1", layer(**changes), "torch.bfloat16", 64, isa)
        else:
            with pytest.raises(UnsupportedLayerError, match=reason):
                support.check_attention("layers.1", layer(**changes), "torch.bfloat16", 64, isa)


def test_all_reasons_of_a_layer_are_said_at_once() -> None:
    odd = layer(attn_type="encoder", head_size=42, head_size_v=42, impl={"alibi_slopes": [0.5] * 8})
    with pytest.raises(UnsupportedLayerError, match=r"it has encoder attention.*, and ALiBi has.*, and its head size"):
        support.check_attention("layers.1", odd, "torch.bfloat16", 64, GPU)


@pytest.mark.parametrize(
    ("device", "version", "known"),
    [
        ("gpu", "0.26.0", True),
        ("gpu", "0.29.1", True),
        ("gpu", "0.32.0+cu130", True),
        ("gpu", "0.25.2", False),
        ("gpu", "0.33.0", False),
        ("gpu", "1.32.0", False),
        ("gpu", "unknown", False),
        ("cpu", "0.32.0", True),
        ("cpu", "0.31.0", False),
    ],
)
def test_versions_nobody_has_read_are_refused(device: str, version: str, known: bool) -> None:
    if known:
        VERSIONS.check(device, version)
    else:
        with pytest.raises(LlmirError, match=f"vLLM {version} is installed, .* llmir knows vLLM .*; install one"):
            VERSIONS.check(device, version)


@pytest.mark.parametrize("hybrid", [False, True])
def test_blocks_that_vllm_sizes_by_a_models_states_are_refused(hybrid: bool) -> None:
    with pytest.raises(LlmirError, match="keeps states") if hybrid else contextlib.nullcontext():
        support.check_block_size(config(model_config=SimpleNamespace(is_hybrid=hybrid)))
