"""The module of a model that is one attention layer: the least that the compiler takes."""

from __future__ import annotations

from llmir.ir import build, types
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dialect import context
from llmir.ir.module import ModelInfo, decoder, new_module

#: Name of the layer.
LAYER = "attention"


def attention_module(
    name: str,
    dtype: str,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    max_length: int,
) -> ir.Module:
    """One layer of causal attention, ``[tokens, num_heads, head_size]`` in and out, over blocks of ``block_size``.

    ``max_length``: tokens of the longest sequence. The scale is ``head_size ** -0.5``.
    """
    with context(), ir.Location.unknown():
        info = ModelInfo("none 1", name, block_size_fixed=True, allowed_block_sizes=(block_size,))
        module = new_module(info)
        with decoder(module) as d:
            heads = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads}
            query, key, value = (
                d.input(name, types.tensor([None, count, head_size], dtype)) for name, count in heads.items()
            )
            format = CacheFormat(dtype, num_kv_heads, head_size, head_size, block_size)
            cache_type = types.PagedKVCache.build(format, max_length=max_length)
            cache = build.append_kv(d.cache(LAYER, cache_type), key, value, d.slots, layer=LAYER)
            step = (d.block_table, d.query_start, d.sequence_lengths)
            d.output(build.paged_attention(query, cache, *step, layer=LAYER, scale=head_size**-0.5))
        return module
