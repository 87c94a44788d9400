"""What vLLM on CUDA is asked for with llmir's flag, and a part of what is then said; nothing where it is served."""

from typing import Any

import torch

#: A layer as vLLM's selector describes it.
SELECTION: dict[str, Any] = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}

#: Engine arguments.
ENGINES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"kv_cache_dtype": "fp8"}, ""),
    ({"block_size": 48}, ""),
    ({"kv_cache_dtype": "fp8_e5m2"}, "the KV cache dtype is 'fp8_e5m2'"),
    ({"dtype": "float32"}, "the model runs in float32"),
    ({"block_size": 24}, "block size 24 is not a multiple of 16"),
    ({"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}}, "by kind of layer"),
    ({"runner": "pooling"}, "a pooling model"),
    ({"additional_config": {"llmir": {"target": "cuda:sm_100"}}}, "cannot run kernels for target 'cuda:sm_100'"),
    ({"additional_config": {"llmir": {"target": "cpu:avx512"}}}, "cannot run kernels for target 'cpu:avx512'"),
]

#: Fields of SELECTION and more of its kind.
LAYERS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"has_sliding_window": True}, ""),
    ({"has_sink": True}, ""),
    ({"kv_cache_dtype": "fp8"}, ""),
    ({"kv_cache_dtype": "fp8_e4m3"}, ""),
    ({"use_mla": True}, "multi-head latent attention"),
    ({"use_sparse": True}, "sparse attention"),
    ({"use_mm_prefix": True}, "bidirectional attention over a multimodal prefix"),
    ({"head_size": 48}, ""),
    ({"head_size": 40}, "head_size not supported"),
    ({"attn_type": "encoder_decoder"}, "encoder_decoder attention"),
    ({"attn_type": "encoder_only"}, "encoder_only attention"),
    ({"dtype": torch.float32}, "dtype not supported"),
    ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype not supported"),
    ({"use_non_causal": True}, "non-causal attention not supported"),
    ({"use_kv_connector": True}, "KV connector not supported"),
    ({"use_pcp": True}, "PCP not supported"),
    ({"use_dcp": True}, "DCP not supported"),
    ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ({"use_rswa": True}, "R-SWA not supported"),
    ({"use_batch_invariant": True}, "batch invariance not supported"),
    ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
]
