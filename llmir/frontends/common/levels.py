"""How much of a model an importer sees: every layer, all but some opaque ones, or its attention layers alone.

Serving needs the attention layers. What else is seen makes decisions better: what a step costs besides, and where keys
come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from llmir.frontends.common.building import one_line
from llmir.frontends.common.layers import attend
from llmir.frontends.common.support import dtype_name
from llmir.frontends.common.watching import Layers, UnwatchedError, record
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.dtypes import BY_TORCH
from llmir.ir.module import Decoder, ModelInfo, decoder, decoder_of, new_module, ops_of
from llmir.ir.opaque import ATTENTION_ONLY, Opaque, import_level, opaque_kinds, weight_bytes
from llmir.ir.remarks import Remark, add_remark
from llmir.ir.types import tensor
from llmir.ir.weight import Weight


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer as the framework's own registry has it."""

    spec: AttentionSpec
    max_length: int
    """The longest sequence, in tokens."""
    sinks: Weight | None = None
    """Name and type of the layer's weight [heads]; to be built in the current context."""
    slopes: Sequence[float] | None = None
    """Of ALiBi, one a query head."""


def import_watched(
    model: torch.nn.Module,
    info: ModelInfo,
    layers: Layers,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    describe: Callable[[str], AttentionLayer],
) -> ir.Module:
    """A model on the meta device as an llm module, of the most that can be seen of it; a remark says what cannot.

    ``describe`` gives an attention layer of ``layers`` by its name; for the rest see watching.record. Raises
    UnsupportedLayerError for an attention layer that no kernel computes.
    """
    try:
        module, why = record(model, info, layers, forward), ""
    except UnwatchedError as error:
        module, why = attention_module(info, layers.attention, describe), one_line(error)
    add_remark(module, _remark(module, why))
    return module


def attention_module(info: ModelInfo, names: Iterable[str], describe: Callable[[str], AttentionLayer]) -> ir.Module:
    """A module of attention layers alone, each of queries, keys and values that come from nowhere."""
    with context(), ir.Location.unknown():
        module = new_module(info)
        module.operation.attributes[ATTENTION_ONLY] = ir.UnitAttr.get()
        with decoder(module) as d:
            d.output(*(_attention(d, name, describe(name)) for name in names))
        return module


def _attention(d: Decoder, name: str, layer: AttentionLayer) -> ir.Value:
    spec, cache = layer.spec, layer.spec.cache
    shapes = {
        "query": (spec.num_heads, cache.key_size),
        "key": (spec.num_kv_heads, cache.key_size),
        "value": (spec.num_kv_heads, cache.value_size),
    }
    query, key, value = (
        d.input(f"{name}.{what}", tensor([None, *shape], spec.dtype)) for what, shape in shapes.items()
    )
    with ir.Location.name(name):
        return attend(
            d,
            query,
            key,
            value,
            layer=name,
            spec=spec,
            max_length=layer.max_length,
            sinks=layer.sinks,
            slopes=layer.slopes,
        )


def weight_of(model: torch.nn.Module, parameter: torch.Tensor) -> Weight:
    """A parameter of a model by name and type, as it lies on this rank."""
    name = next(name for name, own in model.named_parameters() if own is parameter)
    return Weight.build(name, tensor(list(parameter.shape), BY_TORCH[dtype_name(parameter.dtype)].name))


def _remark(module: ir.Module, why: str) -> Remark:
    """What of the model the passes do not see, and what they make of that."""
    level, kinds = import_level(module), opaque_kinds(module)
    if level == "full":
        return Remark("import", "model", "full", "every layer and operation is an op of the dialect")
    if level == "attention":
        reason = (
            f"its attention layers alone were read, from the framework's own list of them, because its forward pass "
            f"cannot be watched ({why}); the cost of all else is unknown and counts as nothing, and where keys come "
            f"from was not seen"
        )
        return Remark("import", "model", "attention", reason)
    ops = len(decoder_of(module).entry_block.operations)
    reason = (
        f"{sum(kinds.values())} of {ops} operations are opaque, because the dialect has no op for them; data flow goes "
        f"through them whole, their weights count as read once a step, and what they compute as nothing"
    )
    numbers = {
        "opaque": kinds,
        "opaque_weight_mb": sum(weight_bytes(op) for op in ops_of(module, Opaque)) / 2**20,
    }
    return Remark("import", "model", "open", reason, numbers)
