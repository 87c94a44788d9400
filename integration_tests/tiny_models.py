"""Models of families that the frameworks serve, small enough to build in a moment: a config.json and no weights."""

from collections.abc import Callable
from typing import Any

LAYERS = 2
_COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
_LLAMA = {
    **_COMMON,
    "intermediate_size": 512,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "architectures": ["LlamaForCausalLM"]},
    "qwen2": {**_LLAMA, "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**_LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "mistral": {**_LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 128},
    "olmo3": {
        **_LLAMA,
        "architectures": ["Olmo3ForCausalLM"],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 128,
        "pad_token_id": 0,
    },
    "phi3": {**_LLAMA, "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
    "gemma2": {
        **_LLAMA,
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 128,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 256,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 512,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "opt": {**_COMMON, "architectures": ["OPTForCausalLM"], "ffn_dim": 512, "word_embed_proj_dim": 256},
    "bloom": {**_COMMON, "architectures": ["BloomForCausalLM"], "n_layer": LAYERS, "n_head": 4},
    "mamba": {**_COMMON, "architectures": ["MambaForCausalLM"], "state_size": 16},
    "gpt_oss": {
        **_LLAMA,
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
    },
    "deepseek_v2": {
        **_LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": LAYERS,
    },
}

WriteModel = Callable[..., str]
