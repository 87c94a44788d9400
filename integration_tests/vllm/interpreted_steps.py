"""Steps through vLLM's attention layer and llmir's backend for GPUs, in Triton's interpreter, as JSON.

A program for a process of its own, with TRITON_INTERPRET=1. Argument: JSON of an attention layer's features, by the
names of AttentionSpec. Prints the errors against float64 of a step of prompts and one of new tokens, and how many
requests the second shared prefixes of.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu_plans import BLOCK, HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, gpu_plan
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from llmir.frontends.vllm import block_tables, plugin
from llmir.frontends.vllm.gpu_backend import LlmirGpuAttentionBackend, LlmirGpuMetadataBuilder
from llmir.frontends.vllm.planning import PLAN_KEY
from llmir.kernels import reference

CPU, DTYPE = torch.device("cpu"), torch.float16
#: The first two blocks are shared; the third request is padding.
TABLE = np.array([[7, 8, 1, 2], [7, 8, 3, 4], [0, 0, 0, 0]], np.int32)
BLOCKS, PADDING = 9, 3
KEY_SCALE, VALUE_SCALE = 0.5, 0.25


def main(features: dict[str, Any]) -> dict[str, Any]:
    plugin.register()
    plan = gpu_plan(dtype="f16", **features)
    quantized, window = bool(features.get("quantized")), features.get("window")
    sinks = torch.randn(HEADS, dtype=DTYPE) if features.get("sinks") else None
    with set_current_vllm_config(VllmConfig()):
        layer = Attention(
            HEADS,
            HEAD_SIZE,
            SCALE,
            num_kv_heads=KV_HEADS,
            prefix=LAYERS[0],
            attn_backend=LlmirGpuAttentionBackend,
            per_layer_sliding_window=window,
            logits_soft_cap=features.get("soft_cap"),
            **({} if sinks is None else {"sinks": sinks}),
        )
    layer.impl.kv_cache_dtype = "fp8" if quantized else "auto"
    layer._k_scale.fill_(KEY_SCALE)
    layer._v_scale.fill_(VALUE_SCALE)
    cache_dtype = torch.uint8 if quantized else DTYPE
    config: Any = SimpleNamespace(
        additional_config={PLAN_KEY: plan.to_json()},
        compilation_config=SimpleNamespace(static_forward_context={layer.layer_name: layer}),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=128),
        model_config=SimpleNamespace(dtype=DTYPE),
        parallel_config=SimpleNamespace(rank=0, world_size=1),
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=cache_dtype)
    builder = LlmirGpuMetadataBuilder(spec, [layer.layer_name], config, CPU)
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=cache_dtype)
    stored = np.zeros((2, BLOCKS, KV_HEADS, BLOCK, HEAD_SIZE))
    attention = plan.kernels[0].spec.attention
    # The second request's prompt begins after the prefix, which is the first one's.
    prompts = step(layer, builder, cache, stored, attention, sinks, [40, 5], [40, 37])
    tokens = step(layer, builder, cache, stored, attention, sinks, [1, 1], [41, 38])
    return {"prompts": prompts, "tokens": tokens, "shared": builder._planned.sharing.requests}


def step(
    layer: Any, builder: Any, cache: Any, stored: Any, attention: Any, sinks: Any, new: Any, lengths: Any
) -> float:
    """The relative error of one step, padded with a request and tokens that are none."""
    starts = np.concatenate([[0], np.cumsum([*new, 0])]).astype(np.int32)
    real, tokens = int(starts[-1]), int(starts[-1]) + PADDING
    query, output = (
        torch.randn(tokens, HEADS, HEAD_SIZE, dtype=DTYPE),
        torch.full((tokens, HEADS, HEAD_SIZE), torch.nan),
    )
    key, value = (torch.randn(tokens, KV_HEADS, HEAD_SIZE, dtype=DTYPE) for _ in range(2))
    output = output.to(DTYPE)
    slots = np.full(tokens, -1)
    for request, (count, length) in enumerate(zip(new, lengths, strict=True)):
        places = np.arange(length - count, length)
        slots[starts[request] : starts[request + 1]] = TABLE[request, places // BLOCK] * BLOCK + places % BLOCK
    table = torch.from_numpy(TABLE)
    block_tables._tables[table.data_ptr()] = lambda requests, columns: TABLE[:requests, :columns]
    metadata = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=torch.tensor([*lengths, 0], dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor([*lengths, 0], dtype=torch.int32),
            num_reqs=len(TABLE),
            num_actual_tokens=tokens,
            max_query_len=max(new),
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=torch.from_numpy(slots),
        ),
    )
    layer.impl.forward(layer, query, key, value, cache, metadata, output)
    kept = [keep(tensor, scale, attention) for tensor, scale in ((key, KEY_SCALE), (value, VALUE_SCALE))]
    reference.append_kv(*kept, slots, *stored)
    exact = reference.attention(
        query.numpy(), *stored, TABLE, [*lengths, 0], starts, attention, None if sinks is None else sinks.numpy()
    )
    return reference.relative_error(output[:real].numpy(), exact[:real])


def keep(tensor: torch.Tensor, scale: float, attention: Any) -> np.ndarray:
    """What a cache keeps of keys or values, as the numbers that it stands for."""
    if not attention.cache.quantized:
        return tensor.double().numpy()
    return (tensor.float() / scale).to(torch.float8_e4m3fn).double().numpy() * scale


if __name__ == "__main__":
    print("ERRORS" + json.dumps(main(json.loads(sys.argv[1]))))
