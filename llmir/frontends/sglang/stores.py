"""SGLang's options that have to do with the KV cache, each judged: which of them hand it to somebody else.

Whoever copies, sends or watches SGLang's cache knows its rows of tokens; llmir's rows are pages. An option of SGLang's
that is in neither table has been judged by nobody, and a test says so.
"""

from __future__ import annotations

from typing import Any

#: What hands the cache out: the value at which it does not, and what it does at others.
REFUSED: dict[str, tuple[Any, str]] = {
    "enable_hierarchical_cache": (False, "keeps a copy of the KV cache in host memory (hierarchical cache)"),
    "hicache_storage_backend": (None, "keeps a copy of the KV cache in a store (hierarchical cache)"),
    "enable_lmcache": (False, "keeps a copy of the KV cache in host memory (hierarchical cache)"),
    "enable_hisparse": (False, "keeps a copy of the KV cache in host memory (hierarchical cache)"),
    "enable_flexkv": (False, "keeps a copy of the KV cache in a store"),
    "enable_unified_cache_external_linker": (False, "links the KV cache to a store"),
    "enable_linker_mla_dedup": (False, "links the KV cache to a store"),
    # Backends register themselves by name, and get the pool.
    "radix_cache_backend": (None, "gives the KV cache to a prefix cache of another's"),
    "disaggregation_mode": ("null", "has prefill and decode in different engines"),
    "disaggregation_decode_enable_offload_kvcache": (False, "has prefill and decode in different engines"),
    "enable_pd_role_switch": (False, "has prefill and decode in different engines"),
    "kv_canary": ("none", "watches the KV cache"),
    "enable_page_major_kv_layout": (False, "lays out the KV cache itself"),
    "enable_unified_memory": (False, "lays out the KV cache itself"),
    "enable_kv_cache_sharding": (False, "lays out the KV cache itself"),
    "enable_dsa_cache_layer_split": (False, "lays out the KV cache itself"),
    "prefill_only_disable_kv_cache": (False, "leaves out the KV cache"),
}

#: What leaves the cache where it is, or is read only by what is refused above.
HARMLESS = frozenset(
    {
        # Sizes, types, and which prefixes are kept for how long.
        *("page_size", "c128_page_size", "kv_cache_dtype", "prefill_kv_cache_dequant_dtype"),
        *("disable_radix_cache", "enable_session_radix_cache", "radix_eviction_policy", "radix_eviction_policy_config"),
        *("_radix_eviction_policy_explicitly_set", "disable_hybrid_swa_memory", "disable_chunked_prefix_cache"),
        *("enable_cache_report", "strip_thinking_cache", "enable_memory_saver"),
        # Tells which blocks there are, not what is in them.
        "kv_events_config",
        # Of the hierarchical cache, the linker, the other stores, the watch and the other engines.
        *("hicache_host_memory_mode", "hicache_host_memory_fraction", "hicache_ratio", "hicache_size"),
        *("hicache_write_policy", "hicache_io_backend", "hicache_mem_layout", "hicache_storage_prefetch_policy"),
        *("hicache_storage_backend_extra_config", "hicache_storage_prefetch_retry_poll_interval"),
        *("hicache_storage_prefetch_retry_max_attempts", "hisparse_config", "lmcache_config_file"),
        *("flexkv_config_file", "unified_cache_external_linker_backend", "unified_cache_external_linker_config"),
        *("kv_canary_real_data", "kv_canary_sweep_interval", "mooncake_ib_device", "pdmux_config_path"),
        *("disaggregation_transfer_backend", "disaggregation_bootstrap_port", "disaggregation_ib_device"),
        *("disaggregation_decode_enable_radix_cache", "disaggregation_decode_retraction_backup"),
        *("disaggregation_decode_extra_slots", "disaggregation_decode_polling_interval"),
        *("disaggregation_enable_kv_checksum", "disaggregation_decode_host_receive_threshold"),
        "disaggregation_decode_allocation_policy",
        # Refused by another check: two batches at once, speculation, models with states.
        *("enable_pdmux", "speculative_draft_kv_cache_dtype", "uses_mamba_radix_cache", "max_mamba_cache_size"),
        *("mamba_cache_philox_rounds", "mamba_full_memory_ratio", "mamba_radix_cache_strategy"),
        *("enable_mamba_cache_stochastic_rounding", "linear_replayssm_cache_len"),
        # Of other attention backends.
        *("triton_attention_num_kv_splits", "dsa_paged_mqa_logits_backend"),
        # Weights, images and answers.
        *("cpu_offload_gb", "offload_group_size", "offload_num_in_group", "offload_prefetch_step", "offload_mode"),
        *("ple_offload_embedding", "ple_offload_backend", "ple_offload_dir", "weight_loader_drop_cache_after_load"),
        *("weight_cache_mode", "weight_cache_socket", "weight_cache_timeout", "modelopt_checkpoint_restore_path"),
        *("remote_instance_weight_loader_start_seed_via_transfer_engine", "enable_paged_experts"),
        *("paged_experts_num_resident", "enable_prefix_mm_cache", "mm_preprocess_cache_size_mb"),
        *("enable_mm_global_cache", "mm_global_cache_backend", "encoder_transfer_backend"),
        *("enable_response_store", "disable_outlines_disk_cache", "sleep_on_idle"),
    }
)


def checks(args: Any) -> dict[str, bool]:
    """What is wrong with SGLang's server arguments: by its words, whether each option hands the cache out."""
    return {
        f"--{name.replace('_', '-')} {what}, and whoever does that knows SGLang's cache layout": (
            getattr(args, name) != served
        )
        for name, (served, what) in REFUSED.items()
    }
