"""Models of families that the frameworks serve, small enough to build in a moment: a config.json and no weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The real model that `make models` fetches.
SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
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
    "mixtral": {
        **_LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **_LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        **_LLAMA,
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "partial_rotary_factor": 0.5,
    },
    "cohere": {
        **{name: value for name, value in _LLAMA.items() if name != "rms_norm_eps"},
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "use_qk_norm": False,
    },
    "gemma3_text": {
        **_LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 128,
    },
    "jamba": {
        **_LLAMA,
        "architectures": ["JambaForCausalLM"],
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
    },
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
