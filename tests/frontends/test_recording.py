"""A forward pass of torch's own layers, and the layers that all frameworks have, as llm IR."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common import layers as emit
from llmir.frontends.common.building import ImportModelError, build_on_meta
from llmir.frontends.common.recording import Handler, Recorder, record
from llmir.ir import ops
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import ModelInfo, caches_of, decoder_of, ops_of

HIDDEN, VOCABULARY = 128, 32
INFO = ModelInfo("framework 1", "tiny", block_size_fixed=True, allowed_block_sizes=(16,))


class Decoder(nn.Module):
    """An embedding, ``between`` on hidden states, and an output layer."""

    def __init__(self, between: nn.Module):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.between = between
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self.embed(ids)))


class Layer(nn.Module):
    """A layer that only a handler can compute."""

    def __init__(self, inputs: int = HIDDEN, outputs: int = HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))


def recorded(between: Callable[[], nn.Module], handlers: dict[type, Handler] = emit.HANDLERS, state: Any = ()) -> Any:
    """The module of a decoder; layers of class ``state`` keep one."""
    model = build_on_meta(lambda: Decoder(between()), "it cannot be built")
    return record(model, INFO, handlers, lambda module: isinstance(module, state), model)


def counts(module: ir.Module) -> Counter[str]:
    block = decoder_of(module).entry_block
    return Counter(op.operation.name.removeprefix("llm.") for op in block.operations)


def test_torchs_own_layers_are_known() -> None:
    def between() -> nn.Module:
        hidden = [
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU("tanh"),
            nn.SiLU(),
            nn.Dropout(),
            nn.Identity(),
        ]
        return nn.Sequential(*hidden)

    module = recorded(between)
    expected = {"embedding": 1, "layer_norm": 1, "linear": 2, "activation": 2, "func.return": 1}
    assert counts(module) == expected
    assert [op.kind.value for op in ops_of(module, ops.Activation)] == ["gelu_tanh", "silu"]
    assert ops_of(module, ops.Linear)[0].weight.name == "between.1.weight"


def test_a_layer_without_a_handler_is_refused_by_path() -> None:
    named = rf"its class {re.escape(Layer.__module__)}\.Layer is not one that llmir knows"
    with pytest.raises(UnsupportedLayerError, match=named) as refusal:
        recorded(lambda: nn.Sequential(nn.Identity(), Layer()))
    assert refusal.value.layer == "between.1"


def test_a_layer_that_keeps_a_state_is_not_entered() -> None:
    with pytest.raises(UnsupportedLayerError, match="Sequential is not one") as refusal:
        recorded(lambda: nn.Sequential(nn.Identity()), state=nn.Sequential)
    assert refusal.value.layer == "between"


def test_what_cannot_be_built_says_so_in_the_frameworks_words() -> None:
    def fail() -> nn.Module:
        raise ValueError("no\n such thing")

    with pytest.raises(ImportModelError, match=r"^it cannot be built: no such thing$"):
        recorded(fail)


@pytest.mark.parametrize(("rank", "bias"), [(0, True), (1, False)])
def test_ranks_that_sum_add_the_bias_once(rank: int, bias: bool) -> None:
    def handler(recorder: Recorder, path: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return emit.row_linear(
            recorder, x, layer.weight, layer.bias, shards=2, rank=rank, input_is_parallel=False, reduce=True
        )

    module = recorded(lambda: Layer(inputs=HIDDEN // 2), {**emit.HANDLERS, Layer: handler})
    linear = ops_of(module, ops.Linear)[0]
    assert (linear.bias is not None) is bias
    assert linear.x.owner.attributes["offset"].value == rank * HIDDEN // 2
    assert (linear.weight.type.dim, linear.weight.type.index) == (1, rank)
    assert counts(module)["all_reduce"] == 1


@pytest.mark.parametrize("heads_apart", [False, True])
def test_attention_carries_the_spec_of_its_layer(heads_apart: bool) -> None:
    spec = AttentionSpec.dense(2, 1, 64, "f32", 16, scale=0.125, window=7, soft_cap=30.0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.attend = nn.Linear(HIDDEN, 64), Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(x.view(-1, 2, 64) if heads_apart else x, self.key(x))

    def handler(recorder: Recorder, path: str, layer: Layer, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return emit.attention(recorder, query, key, key, layer=path, spec=spec, max_length=512)

    module = recorded(Attention, {**emit.HANDLERS, Layer: handler})
    [attention] = [spec_of(op) for op in ops_of(module, PagedAttention)]
    assert attention == spec
    assert list(caches_of(module)) == ["between.attend"]
