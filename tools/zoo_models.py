"""The models of the zoo: default configurations made small, and random weights that make attention pick out tokens."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep_architectures import configuration

if TYPE_CHECKING:
    import torch

VOCABULARY = 512
#: Less than the prompts are long, so that where a window ends shows in the answers.
WINDOW = 64
#: What is set where a configuration has it, by transformers' own names. Heads of 64: a size that kernels have.
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "ffn_dim": 256,
    "word_embed_proj_dim": 256,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
}
#: By model type: what else has to change for the small sizes to hang together.
FITTING: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma2": {"query_pre_attn_scalar": 64, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "gemma4_text": {"per_layer_config": {"3": {"head_dim": 128}}},
    "glm4_moe": {"head_dim": 64},  # not in its defaults
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gptj": {"rotary_dim": 32},
    "granite": {"attention_multiplier": 0.125},
    "granite_swa": {"attention_multiplier": 0.125},
    "granitemoe": {"attention_multiplier": 0.125},
    "granitemoe_swa": {"attention_multiplier": 0.125},
    "granitemoeshared": {"attention_multiplier": 0.125},
    "hy_v3": {"first_k_dense_replace": 1, "route_norm": True, "expert_hidden_dim": 128},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    "phi": {"num_key_value_heads": 4},
    "vaultgemma": {"query_pre_attn_scalar": 64},
}
#: Standard deviations of a product's outputs over its inputs', and of what queries and keys are made by: attention
#: that is nearly the mean of all values would hide a wrong mask, one that picks out single tokens magnifies rounding.
GAIN, QUERY_GAIN = 1.5, 2.0
QUERIES = ("qkv", "q_proj", "k_proj", "query_key_value", "c_attn", "q_norm", "k_norm", "q_layernorm", "k_layernorm")
#: How far a norm's weights are spread around what it is made with, and biases around zero.
SPREAD = 0.2


def small_configuration(model_type: str, architecture: str) -> dict[str, Any]:
    """The default configuration of a model type with the sizes in ``SMALL``, in float32."""
    from transformers import CONFIG_MAPPING

    values = configuration(model_type, architecture)
    names = getattr(CONFIG_MAPPING[model_type], "attribute_map", {})
    for name, value in SMALL.items():
        own = names.get(name, name)
        given = values.get(own)
        if (isinstance(given, int) and not isinstance(given, bool)) or (own == "head_dim" and own in values):
            values[own] = value
    for name, value in values.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            values[name] = 0
    return {**values, "torch_dtype": "float32", "dtype": "float32", **FITTING.get(model_type, {})}


def write_model(folder: Path, model_type: str, architecture: str) -> None:
    """A folder that a framework serves with weights of its own making."""
    (folder / "config.json").write_text(json.dumps(small_configuration(model_type, architecture), default=str))


def draw_weights(model: torch.nn.Module) -> None:
    """Random weights for every floating-point parameter, the same for the same name and shape."""
    import torch

    with torch.no_grad():
        for path, module in model.named_modules():
            for own, weight in module.named_parameters(path, recurse=False):
                if weight.is_floating_point():
                    weight.copy_(_drawn(own, weight, "norm" in type(module).__name__.lower()))


def _drawn(name: str, weight: torch.Tensor, of_norm: bool) -> torch.Tensor:
    import torch

    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    gain = QUERY_GAIN if any(part in name for part in QUERIES) else GAIN
    if weight.dim() > 1:
        return values * gain / weight.shape[-1] ** 0.5
    # A norm's weights are made as ones, or where it adds one to them as zeros.
    return values * SPREAD + (weight + gain / GAIN - 1 if of_norm and name.endswith("weight") else 0)
