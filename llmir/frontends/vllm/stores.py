"""vLLM's options that have to do with the KV cache, each judged: which of them hand it to somebody else.

Whoever copies or sends vLLM's cache knows the pages of vLLM's backends, not llmir's. An option of vLLM's that is in
neither table has been judged by nobody, and a test says so.
"""

from __future__ import annotations

from typing import Any

#: What hands the cache out: the part of the configuration that has the option, the value at which it does not, and
#: what it does at others. vLLM makes the transfer of --kv-offloading-size after backends were asked.
REFUSED: dict[str, tuple[str, Any, str]] = {
    "kv_transfer_config": ("", None, "is KV cache transfer to another engine or a store"),
    "kv_offloading_size": ("cache_config", None, "keeps a copy of the KV cache in host memory or a store"),
    # Frees the pool that the kernels' own buffers are allocated in, too.
    "enable_sleep_mode": ("model_config", False, "frees the KV cache's memory while nobody asks"),
}

#: What leaves the cache where it is, or is read only by what is refused above.
HARMLESS = frozenset(
    {
        # Sizes, types, and which prefixes are kept for how long.
        *("kv_cache_dtype", "kv_cache_dtype_skip_layers", "kv_cache_memory_bytes", "prefix_cache_retention_interval"),
        *("disable_hybrid_kv_cache_manager", "kv_cache_metrics", "kv_cache_metrics_sample"),
        # Tells which blocks there are, not what is in them.
        "kv_events_config",
        # Of what is refused above.
        *("kv_offloading_backend", "sleep_mode_offload_cudagraph", "sleep_preserve_parameter_names"),
        # Refused by another check: context parallelism, fast prefill, models with states.
        *("dcp_kv_cache_interleave_size", "cp_kv_cache_interleave_size", "kv_sharing_fast_prefill"),
        *("mamba_cache_dtype", "mamba_ssm_cache_dtype", "mamba_cache_mode", "mamba_cache_philox_rounds"),
        "enable_mamba_cache_stochastic_rounding",
        # Of other attention backends.
        "sparse_indexer_topk_backend",
        # Weights, images, and what an encoder made of them.
        *("offload_backend", "cpu_offload_gb", "cpu_offload_params", "offload_group_size", "offload_num_in_group"),
        *("offload_prefetch_step", "offload_params", "weight_transfer_config", "ec_transfer_config"),
        *("mm_processor_cache_gb", "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb"),
        "enable_tower_connector_lora",
    }
)


def checks(vllm_config: Any) -> dict[str, bool]:
    """What is wrong with vLLM's configuration: by its words, whether each option hands the cache out."""
    found = {}
    for name, (part, served, what) in REFUSED.items():
        holder = getattr(vllm_config, part) if part else vllm_config
        words = f"--{name.replace('_', '-')} {what}, and whoever does that does not know llmir's cache layout"
        found[words] = getattr(holder, name, served) != served  # versions before the last lack some
    return found
