"""What llmir cannot serve through SGLang, found before anything is built or served.

Imports neither SGLang nor torch: it only looks at the objects it is given.
"""

from __future__ import annotations

from typing import Any

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.plan_cache import model_classes
from llmir.frontends.common.support import (
    WITHOUT,
    dtype_check,
    dtype_name,
    refuse,
    refuse_layer,
)
from llmir.frontends.sglang import stores
from llmir.frontends.sglang.versions import framework
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import BY_TORCH
from llmir.targets.registry import is_gpu, quantizing

#: SGLang's names of KV cache dtypes that llmir has kernels for, and the model dtype each must go with.
CACHE_DTYPES = {"auto": None, "bfloat16": "bfloat16", "bf16": "bfloat16"}
#: SGLang's name of the KV cache dtype that kernels on a GPU read with a scale a layer.
QUANTIZED_DTYPE = "fp8_e4m3"
#: SGLang's name of the devices that llmir serves on; "cuda" is also what ROCm is called.
DEVICES = ("cpu", "cuda")
#: Page sizes that the compiler may choose from; beyond these a page mostly holds nothing.
PAGE_SIZES = (16, 32, 64, 128, 256, 512)
#: The same on a GPU, where the kernels take no others: a tile of keys is at most 128 of them.
GPU_PAGE_SIZES = (16, 32, 64, 128)
#: Entry points by which plugins change SGLang.
PLUGIN_GROUP = "sglang.srt.plugins"
#: Arguments that decide nothing about a model's layers, or stand in a plan's facts as SGLang resolved them.
SERVING_ARGUMENTS = frozenset(
    (
        *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "device", "page_size"),
        *("load_format", "download_dir", "pp_size", "pp_max_micro_batch_size", "pp_async_batch_depth", "random_seed"),
        *("host", "port", "nccl_port", "dist_init_addr", "dist_timeout", "gated_launch_port", "nnodes", "node_rank"),
        *("base_gpu_id", "gpu_id_step", "numa_node", "use_ray", "sleep_on_idle", "gc_threshold", "stat_loggers"),
        *("api_key", "admin_api_key", "served_model_name", "weight_version", "fastapi_root_path", "chat_template"),
        *("skip_tokenizer_init", "skip_server_warmup", "warmups", "watchdog_timeout", "soft_watchdog_timeout"),
        *("mem_fraction_static", "max_running_requests", "max_queued_requests", "max_total_tokens"),
        *("max_prefill_tokens", "chunked_prefill_size", "num_continuous_decode_steps", "disable_radix_cache"),
        *("stream_interval", "reasoning_parser", "tool_call_parser", "show_time_cost", "custom_sigquit_handler"),
        *("decode_log_interval", "crash_dump_folder", "file_storage_path", "preferred_sampling_params"),
    )
)
SERVING_PREFIXES = (
    "log_",
    "ssl_",
    "grpc_",
    "http2_",
    "schedule_",
    "tokenizer_",
    "detokenizer_",
    "enable_metrics",
    "otlp_",
)
REMEDY = WITHOUT.format(name="llmir", framework="SGLang")
#: Arguments of a call to an attention layer that change nothing where they are None or say what llmir does anyway.
PLAIN_ARGUMENTS = {"save_kv_cache": True}


def on_gpu(args: Any) -> bool:
    """Whether these server arguments are for a GPU, CUDA's or ROCm's."""
    return bool(args.device == "cuda")


def quantizes(args: Any) -> bool:
    """Whether the KV cache is of eight-bit floats with a scale a layer."""
    return bool(args.kv_cache_dtype == QUANTIZED_DTYPE)


def check_arguments(args: Any, model: Any, isa: str) -> None:
    """Raise UnsupportedFeatureError for what is wrong with the server's arguments as a whole.

    ``args`` reads as SGLang's resolved server arguments, ``model`` is its ModelConfig, ``isa`` is what kernels are
    compiled for.
    """
    _check_page_size(args)
    backends = {args.prefill_attention_backend or args.attention_backend}
    backends.add(args.decode_attention_backend or args.attention_backend)
    dtype = dtype_name(model.dtype)
    architecture = getattr(model.attention_arch, "name", str(model.attention_arch))
    checks = {
        f"the device is {args.device!r}, and llmir has kernels for {' and '.join(map(repr, DEVICES))} only": (
            args.device not in DEVICES
        ),
        f"the device is {args.device!r}, and the plan is made for {isa}": on_gpu(args) != is_gpu(isa),
        f"prefill and decode are given to different backends ({', '.join(sorted(map(str, backends)))}), "
        f"and llmir keeps the cache in a layout of its own": len(backends) > 1,
        "the model uses multi-head latent attention": architecture == "MLA",
        "the model has an encoder with cross-attention": model.is_encoder_decoder,
        "an embedding model, which llmir serves on CPUs alone": on_gpu(args) and not model.is_generation,
        **dtype_check(dtype, isa),
        **_cache_checks(args, dtype, isa),
        **(_gpu_checks(args) if on_gpu(args) else _cpu_checks(args)),
        "windowed layers in a KV pool of their own; give --disable-hybrid-swa-memory": (
            model.is_hybrid_swa and not args.disable_hybrid_swa_memory
        ),
        **stores.checks(args),
        "two batches at once (--enable-two-batch-overlap or --enable-pdmux)": (
            args.enable_two_batch_overlap or args.enable_pdmux
        ),
        "a diffusion model (--dllm-algorithm)": args.dllm_algorithm is not None,
        "context parallelism": max(args.attn_cp_size or 1, args.dcp_size or 1) > 1,
        "attention layers of data-parallel ranks": (args.attn_dp_size or 1) > 1,
    }
    refuse(checks, REMEDY)


def check_model(model: Any, config: Any) -> None:
    """Raise UnsupportedFeatureError for attention that a model itself arranges at each step, outside its layers.

    ``config`` is SGLang's ModelConfig of the built ``model``.
    """
    masks = hasattr(model, "prepare_attn_masks")
    refuse({"attention in both directions over the tokens of an image": config.is_multimodal and masks}, REMEDY)


def _check_page_size(args: Any) -> None:
    size = args.page_size
    refuse(
        {f"page size {size} is not a number of tokens": size is not None and size < 1},
        "give a --page-size of 1 or more, or leave it out and llmir chooses",
    )
    sizes = ", ".join(map(str, GPU_PAGE_SIZES))
    refuse(
        {f"page size {size} has no kernel on a GPU": on_gpu(args) and size not in (None, *GPU_PAGE_SIZES)},
        f"give a --page-size of {sizes}, or leave it out and llmir chooses",
    )
    chunk = args.chunked_prefill_size or -1
    refuse(
        {
            f"a prefill chunk of {chunk} tokens (--chunked-prefill-size) is no whole number of pages, and a GPU's "
            f"kernels take pages of {sizes} tokens": (
                on_gpu(args) and size is None and chunk > 0 and chunk % GPU_PAGE_SIZES[0] != 0
            ),
            f"a prefill chunk of {chunk} tokens (--chunked-prefill-size) is no whole number of pages of {size} tokens "
            f"(--page-size)": size is not None and chunk > 0 and chunk % size != 0,
        },
        f"give a --chunked-prefill-size that is a multiple of {size or GPU_PAGE_SIZES[0]}",
    )


def _cache_checks(args: Any, dtype: str, isa: str) -> dict[str, bool]:
    """The checks of the KV cache's dtype, for a model of ``dtype``."""
    name = args.kv_cache_dtype
    known = quantizes(args) or CACHE_DTYPES.get(name, "none") in (None, dtype)
    kept = f"llmir keeps the model's own ({dtype})"
    if is_gpu(isa):
        kept += f", or {QUANTIZED_DTYPE} on {' and '.join(quantizing())}"
    return {f"the KV cache dtype is {name!r}, and {kept}": not known or (quantizes(args) and isa not in quantizing())}


def _cpu_checks(args: Any) -> dict[str, bool]:
    """What is refused on a CPU alone, or for another reason than on a GPU."""
    return {
        f"speculative decoding ({args.speculative_algorithm}), for which SGLang has no operators on this CPU": (
            args.speculative_algorithm is not None
        ),
        "torch.compile (--enable-torch-compile), whose CPU graphs llmir takes no part in": args.enable_torch_compile,
    }


def _gpu_checks(args: Any) -> dict[str, bool]:
    """What is refused on a GPU alone, or for another reason than on a CPU."""
    graphs = args.cuda_graph_config
    return {
        f"speculative decoding ({args.speculative_algorithm}), whose drafts are no causal continuation": (
            args.speculative_algorithm is not None
        ),
        "torch.compile (--enable-torch-compile), which cannot trace llmir's launches": args.enable_torch_compile,
        "CUDA graphs of whole prefills (--cuda-graph-backend-prefill full); breakable ones are served": (
            graphs is not None and graphs.prefill.backend == "full"
        ),
    }


def check_attention(path: str, layer: Any, spec: AttentionSpec, isa: str) -> None:
    """Raise UnsupportedLayerError if no llmir kernel for ``isa`` computes this layer, a ``RadixAttention``.

    ``spec`` is its :func:`attention_spec`.
    """
    kind = layer.attn_type.value
    checks = {
        f"{kind} attention (llmir does causal decoder attention)": kind != "decoder",
        "cross-attention": layer.is_cross_attention,
        "keys turned by their position inside the kernel": layer.pos_encoding_mode != "NONE" or layer.use_irope,
        f"scores capped by {layer.logit_capping_method}": layer.logit_cap > 0 and layer.logit_capping_method != "tanh",
        # Its KV pool has one size of head.
        f"values of another size ({layer.v_head_dim}) than keys ({layer.qk_head_dim})": (
            layer.v_head_dim != layer.qk_head_dim
        ),
        "a temperature that grows with the length": layer.xai_temperature_len > 0,
    }
    refuse_layer(path, spec, isa, checks)


def check_call(path: str, key: Any, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedLayerError for a call of an attention layer with arguments that llmir's kernels do not have."""
    extra = sorted(
        name for name, value in arguments.items() if value is not None and PLAIN_ARGUMENTS.get(name, object()) != value
    )
    if key is None:
        raise UnsupportedLayerError(path, "it reads the KV cache of another layer")
    if extra:
        raise UnsupportedLayerError(path, f"it is called with {', '.join(extra)}, which llmir's kernels do not have")


def attention_spec(
    layer: Any, dtype: Any, page_size: int, *, quantized: bool = False, sinks: bool = False
) -> AttentionSpec:
    """What the compiler and the kernels must agree on about a ``RadixAttention``, on this rank.

    ``dtype`` is the model's, ``quantized`` whether its cache has another. SGLang pads head counts to the
    tensor-parallel size, so they are read from the layer. Its sliding window counts the tokens before a query, llmir's
    the query too.
    """
    return AttentionSpec.dense(
        num_heads=layer.tp_q_head_num,
        num_kv_heads=layer.tp_k_head_num,
        head_size=layer.qk_head_dim,
        value_size=layer.v_head_dim,
        dtype=BY_TORCH[dtype_name(dtype)].name,
        block_size=page_size,
        scale=layer.scaling,
        window=max(layer.sliding_window_size + 1, 0),
        soft_cap=layer.logit_cap,
        quantized=quantized,
        sinks=sinks,
    )


def allowed_page_sizes(args: Any, model: Any) -> list[int]:
    """Page sizes in tokens that SGLang would accept: its prefill chunks are whole pages.

    On a CPU, where kernels take pages of any size, a chunk that none of the usual sizes divides has pages that do.
    """
    if args.page_size is not None:
        return [args.page_size]
    chunk = args.chunked_prefill_size or -1
    sizes = GPU_PAGE_SIZES if on_gpu(args) else PAGE_SIZES
    if chunk > 0 and chunk % sizes[0] != 0 and not on_gpu(args):
        divisors = [size for size in range(1, min(chunk, sizes[-1]) + 1) if chunk % size == 0]
        return [size for size in divisors if sizes[0] <= size <= model.context_len] or divisors[-1:]
    fitting = [size for size in sizes if size <= model.context_len and (chunk < 0 or chunk % size == 0)]
    return fitting or [sizes[0]]


def model_facts(args: Any, model: Any) -> dict[str, Any]:
    """What a module, and so a plan, says about the model it is of: the fields of llmir.ir.module.ModelInfo."""
    return {
        "framework": framework(),
        "model": args.model_path,
        "rank": 0,
        "world_size": args.tp_size,
        "block_size_fixed": args.page_size is not None,
        "allowed_block_sizes": tuple(allowed_page_sizes(args, model)),
    }


def plan_facts(args: Any, model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Everything in the configuration that decides a plan, see llmir.frontends.common.planning.plan_for.

    ``given``: all arguments as the user gave them. Which of them decide the classes that SGLang builds, and what these
    are given, is more than can be listed here, so all are part of it but those known to decide nothing: one that a
    later SGLang adds costs a plan more, never a wrong one.
    """
    architecture = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        architecture.pop(name, None)
    return {
        **model_facts(args, model),
        "architecture": [architecture, dtype_name(model.dtype), model.quantization],
        "context_length": model.context_len,
        "page_size": args.page_size,
        "kv_cache_dtype": args.kv_cache_dtype,
        "device": args.device,
        "given": {name: value for name, value in given.items() if not _decides_nothing(name)},
        **model_classes(args.model_path, PLUGIN_GROUP),
    }


def _decides_nothing(name: str) -> bool:
    """Whether an argument is about serving alone: addresses, logs, tokenizers, admission and memory."""
    return name in SERVING_ARGUMENTS or name.startswith(SERVING_PREFIXES)
