"""What llmir cannot serve through vLLM, found before anything is built or served.

Imports neither vLLM nor torch: it only looks at the objects it is given. ``isa`` is that of the target the kernels are
for, a CPU's instruction set or a GPU's architecture.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from llmir.frontends.common.plan_cache import model_classes
from llmir.frontends.common.support import (
    WITHOUT,
    architecture,
    dtype_check,
    dtype_name,
    refuse,
    refuse_layer,
)
from llmir.frontends.vllm import stores
from llmir.frontends.vllm.versions import framework
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import BY_TORCH
from llmir.targets.registry import is_gpu, quantizing

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: vLLM's names of KV cache dtypes that are the model's own, and the model dtype each must go with.
CACHE_DTYPES = {"auto": None, "bfloat16": "bfloat16", "float16": "float16"}
#: vLLM's names of a cache of 8-bit floats with 4 bits of exponent, scaled by one number for a layer's keys and one for
#: its values.
QUANTIZED_CACHE_DTYPES = ("fp8", "fp8_e4m3")
#: Entry points by which plugins register model classes with vLLM.
PLUGIN_GROUP = "vllm.general_plugins"
#: Parts of vLLM's configuration whose digests tell what models are built of.
HASHED = ("model_config", "parallel_config", "lora_config", "speculative_config")
#: vLLM's CPU kernels and its sliding window arithmetic work on multiples of 32, the GPU kernels on multiples of 16, as
#: vLLM's own do. Beyond the last of the sizes that the compiler may choose from a block mostly holds nothing.
BLOCK_SIZES = {"cpu": (32, 64, 128, 256, 512), "gpu": (16, 32, 64, 128, 256)}


def device_of(vllm_config: VllmConfig) -> str:
    """ "cpu" or "gpu", where vLLM will run the model; raises UnsupportedFeatureError for any other device."""
    device = vllm_config.device_config.device_type
    # ROCm's devices go by this name too.
    known = {"cpu": "cpu", "cuda": "gpu"}
    refuse({f"the device is {device!r}, and llmir has kernels for CPUs and GPUs": device not in known}, _remedy())
    return known[device]


def check_config(vllm_config: VllmConfig, isa: str) -> None:
    """Raise UnsupportedFeatureError for what is wrong with the configuration as a whole."""
    backend = vllm_config.attention_config.backend
    refuse(_config_checks(vllm_config, isa), _remedy(backend.name if backend is not None else "LLMIR"))


def check_block_size(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedFeatureError where vLLM sets the block size after the plan is made, to what no plan knows."""
    hybrid = vllm_config.model_config.is_hybrid
    refuse(
        {"the model keeps states beside its KV cache, whose size decides vLLM's blocks after llmir has chosen": hybrid},
        _remedy(),
    )


def _remedy(name: str = "LLMIR") -> str:
    return WITHOUT.format(name=name, framework="vLLM")


def _config_checks(vllm_config: VllmConfig, isa: str) -> dict[str, bool]:
    """Everything that may be wrong, the gravest first."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if model is None:
        return {"the engine has no model": True}
    speculative = vllm_config.speculative_config
    step = block_sizes(isa)[0]
    return {
        "the model uses multi-head latent attention": model.use_mla,
        "the model has an encoder with cross-attention": model.is_encoder_decoder,
        "the model takes images or audio": model.is_multimodal_model,
        **_dtype_checks(dtype_name(model.dtype), cache.cache_dtype, isa),
        f"block size {cache.block_size} is not a multiple of {step}": (
            cache.user_specified_block_size and cache.block_size % step != 0
        ),
        "attention backends are chosen by kind of layer (backend_per_kind), and llmir serves all layers or none": (
            bool(vllm_config.attention_config.backend_per_kind)
        ),
        "speculative decoding with a drafter that has attention layers of its own": (
            speculative is not None and speculative.method not in ("ngram", "suffix")
        ),
        **stores.checks(vllm_config),
        "context parallelism": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "non-causal attention": vllm_config.attention_config.use_non_causal,
        "fast prefill with shared KV layers (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
        **(_gpu_checks(vllm_config) if is_gpu(isa) else {}),
    }


def _dtype_checks(dtype: str, cache_dtype: str, isa: str) -> dict[str, bool]:
    """Whether the target has kernels for a model's dtype and its cache's."""
    quantizes = cache_dtype in QUANTIZED_CACHE_DTYPES and isa in quantizing()
    keeps = f"llmir keeps the model's own ({dtype})" + (", or fp8 of e4m3" if isa in quantizing() else "")
    return {
        **dtype_check(dtype, isa),
        f"the KV cache dtype is {cache_dtype!r}, and {keeps} on {isa}": (
            not quantizes and CACHE_DTYPES.get(cache_dtype, "none") not in (None, dtype)
        ),
    }


def _gpu_checks(vllm_config: VllmConfig) -> dict[str, bool]:
    """What only GPUs have in vLLM."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    return {
        # Where lengths on the host are bounds, the work list would read keys that no request has.
        "speculative decoding with asynchronous scheduling, which knows lengths on the device alone; "
        "--no-async-scheduling would do": (
            vllm_config.speculative_config is not None and bool(vllm_config.scheduler_config.async_scheduling)
        ),
        "layers without fp8 in an fp8 cache (kv_cache_dtype_skip_layers)": bool(cache.kv_cache_dtype_skip_layers),
        "a pooling model, which llmir serves on CPUs alone": vllm_config.model_config.runner_type == "pooling",
        "micro-batches (dual batch overlap)": parallel.use_ubatching,
    }


def check_selection(selection: Any) -> None:
    """Raise UnsupportedFeatureError for a layer kind that vLLM is about to give llmir's backend and it cannot take.

    ``selection`` is vLLM's AttentionSelectorConfig. It names no layer: this is the net under
    :func:`check_attention`, for layers that are built outside the decoder the plan was made from. Those that are of a
    kind with the plan's are compared with them when they are bound.
    """
    kinds = {
        "multi-head latent attention": selection.use_mla,
        "sparse attention": selection.use_sparse,
        f"{selection.attn_type} attention": selection.attn_type != "decoder",
        "bidirectional attention over a multimodal prefix": selection.use_mm_prefix,
    }
    refuse({f"there is no kernel for a layer with {kind}": found for kind, found in kinds.items()}, _remedy())


def attention_spec(layer: Any, dtype: Any, block_size: int) -> AttentionSpec:
    """What the compiler and the kernels must agree on about a vllm ``Attention`` module, on this rank.

    Its implementation object keeps the arguments that the layer passed on; ``dtype`` is that of its queries.
    """
    quantized = layer.kv_cache_dtype in QUANTIZED_CACHE_DTYPES
    return AttentionSpec.dense(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        value_size=layer.head_size_v,
        dtype=BY_TORCH[dtype_name(dtype if quantized else layer.kv_cache_torch_dtype)].name,
        block_size=block_size,
        scale=layer.impl.scale,
        window=layer.sliding_window or 0,
        soft_cap=layer.impl.logits_soft_cap or 0.0,
        quantized=quantized,
        sinks=layer.has_sink,
        alibi=layer.impl.alibi_slopes is not None,
    )


def check_attention(path: str, layer: Any, dtype: Any, block_size: int, isa: str) -> None:
    """Raise UnsupportedLayerError if no llmir kernel of the target computes this attention layer.

    For the arguments see :func:`attention_spec`.
    """
    extra = set(getattr(layer.impl, "extra", {})) - {"sinks"}
    known_cache = layer.kv_cache_dtype in (*CACHE_DTYPES, *QUANTIZED_CACHE_DTYPES)
    checks = {
        f"{layer.attn_type} attention (llmir does causal decoder attention)": layer.attn_type != "decoder",
        f"a KV cache shared with layer {layer.kv_sharing_target_layer_name!r}": (
            layer.kv_sharing_target_layer_name is not None
        ),
        "bidirectional attention over a multimodal prefix": layer.use_mm_prefix,
        # llmir describes pages to vLLM by one size of head.
        f"values of another size ({layer.head_size_v}) than keys ({layer.head_size})": (
            layer.head_size_v != layer.head_size
        ),
        f"KV cache dtype {layer.kv_cache_dtype!r}": not known_cache,
        f"further arguments for its kernel ({', '.join(sorted(extra))})": bool(extra),
    }
    refuse_layer(path, attention_spec(layer, dtype, block_size) if known_cache else None, isa, checks)


def block_sizes(isa: str) -> tuple[int, ...]:
    """Block sizes in tokens that the compiler may choose from, ascending; all are multiples of the first."""
    return BLOCK_SIZES["gpu" if is_gpu(isa) else "cpu"]


def allowed_block_sizes(vllm_config: VllmConfig, isa: str) -> list[int]:
    """Block sizes in tokens that vLLM's kernels and this configuration would accept, the user's own included."""
    cache, sizes = vllm_config.cache_config, block_sizes(isa)
    own = {cache.block_size} if cache.user_specified_block_size else set()
    unit = cache.prefix_match_unit
    if unit is not None and unit % sizes[0] == 0:
        return sorted({unit} | own)  # with one group of layers, vLLM matches prefixes by whole blocks
    longest = max(sizes[0], vllm_config.model_config.max_model_len)
    return sorted({size for size in sizes if size <= longest} | own)


def model_facts(vllm_config: VllmConfig, isa: str) -> dict[str, Any]:
    """What a module, and so a plan, says about the model it is of: the fields of llmir.ir.module.ModelInfo."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    return {
        "framework": framework(),
        "model": vllm_config.model_config.model,
        "rank": 0,
        "world_size": parallel.tensor_parallel_size,
        "block_size_fixed": cache.user_specified_block_size,
        "allowed_block_sizes": tuple(allowed_block_sizes(vllm_config, isa)),
    }


def plan_facts(vllm_config: VllmConfig, isa: str) -> dict[str, Any]:
    """Everything in the configuration that decides a plan, see llmir.frontends.common.planning.plan_for.

    Which classes vLLM builds, and what it gives them, hangs on more than can be listed here: model_impl, revisions of
    remote code, expert placement, LoRA. So vLLM's own digests are part of it, by which it keeps compiled graphs: an
    option that a later vLLM adds is in them unless vLLM says that it decides nothing.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return {
        **model_facts(vllm_config, isa),
        "architecture": [
            model.architectures,
            architecture(model.hf_config),
            dtype_name(model.dtype),
            model.quantization,
        ],
        "max_model_len": model.max_model_len,
        "cache": [cache.cache_dtype, cache.block_size if cache.user_specified_block_size else None],
        "quantization": type(vllm_config.quant_config).__qualname__,
        "layers_without_fp8": list(cache.kv_cache_dtype_skip_layers or []),
        "registered": [str(model.registry.models.get(name)) for name in model.architectures],
        "custom_ops": list(vllm_config.compilation_config.custom_ops),
        **{part: _digest(getattr(vllm_config, part)) for part in HASHED},
        **model_classes(model.model, PLUGIN_GROUP),
    }


def _digest(part: Any) -> str | None:
    """vLLM's digest of a part of its configuration; of one that vLLM cannot tell apart, one that comes but once."""
    try:
        return None if part is None else str(part.compute_hash())
    except TypeError:  # an object without a stable name in it, such as a function
        return uuid.uuid4().hex
