"""A forward pass of torch's own layers, and the layers that all frameworks have, as llm IR."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common import layers as emit
from llmir.frontends.common.building import ImportModelError, build_on_meta
from llmir.frontends.common.levels import AttentionLayer, attention_module
from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.common.watching import Layers, UnwatchedError, record
from llmir.ir import build, ops, text
from llmir.ir.attention import AppendKV, PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.base import shape
from llmir.ir.bindings import ir
from llmir.ir.module import ModelInfo, caches_of, decoder_of, ops_of
from llmir.ir.opaque import Opaque, import_level
from llmir.passes.prefix_sharing import DataFlow

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


class Unknown(nn.Module):
    """A layer that no handler knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.tanh()


class Unrunnable(nn.Module):
    """A layer that does not run on the meta device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class WithAttention(nn.Module):
    """A decoder layer: ``inner``, then attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.attend = inner, Attend()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self.inner(x))


class Attend(nn.Module):
    """An attention layer, which only a handler can compute."""


def _attend(recorder: Recorder, path: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return emit.attention(recorder, x, x, x, layer=path, spec=SPEC, max_length=512)


SPEC = AttentionSpec.dense(2, 2, 64, "f32", 16, scale=0.125, window=7, soft_cap=30.0)
WITH_ATTENTION: dict[type, Handler] = {**emit.HANDLERS, Attend: _attend}


@torch.library.custom_op("llmir_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    """An operation of somebody's own."""
    return x * by


@scaled.register_fake
def _(x: torch.Tensor, by: float) -> torch.Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    """A layer that only a handler can compute."""

    def __init__(self, inputs: int = HIDDEN, outputs: int = HIDDEN):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))


def recorded(
    between: Callable[[], nn.Module],
    handlers: dict[type, Handler] = emit.HANDLERS,
    attention: tuple[str, ...] = (),
    one: type | tuple[()] = (),
) -> ir.Module:
    """The module of a decoder; ``attention`` are the paths of its attention layers, modules of class ``one`` layers."""
    model = build_on_meta(lambda: Decoder(between()), "it cannot be built")
    layers = Layers(
        handlers, {path: model.get_submodule(path) for path in attention}, lambda module: isinstance(module, one)
    )
    return record(model, INFO, layers, model)


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


def test_a_layer_without_a_handler_is_opaque_with_its_weights() -> None:
    module = recorded(lambda: nn.Sequential(nn.Identity(), Unknown()))
    [op] = ops_of(module, Opaque)
    assert (op.kind.value, op.path.value) == (f"{Unknown.__module__}.Unknown", "between.1")
    assert [(weight.name, weight.shape) for weight in op.weights] == [("between.1.weight", [HIDDEN])]
    assert op.operation.operands[0] == ops_of(module, ops.Embedding)[0].result
    assert ops_of(module, ops.Linear)[0].x == op.operation.results[0]


def test_a_layer_that_its_handler_cannot_express_is_opaque() -> None:
    def handler(recorder: Recorder, path: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        recorder.set(x, build.elementwise("neg", recorder.value(x)))
        raise NotInDialectError("it does more")

    found = counts(recorded(Unknown, {**emit.HANDLERS, Unknown: handler}))
    assert found["opaque"] == 1 and not found["elementwise"], "what the handler wrote is taken back"


@pytest.mark.parametrize("wraps", [False, True])
def test_what_cannot_run_is_opaque_in_the_smallest_layer_whose_shapes_its_call_says(wraps: bool) -> None:
    def between() -> nn.Module:
        return nn.Sequential(Unrunnable(), nn.Linear(HIDDEN, HIDDEN)) if wraps else Unrunnable()

    model = recorded(lambda: WithAttention(between()), WITH_ATTENTION, ("between.attend",))
    [op] = ops_of(model, Opaque)
    assert op.path.value == "between.inner"
    assert len(op.weights) == (2 if wraps else 0), "a layer within it is a part of it"


def test_a_layer_within_an_opaque_one_need_not_run() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layer(HIDDEN, 2 * HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    def handler(recorder: Recorder, path: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return emit.linear(recorder, x, layer.weight)

    module = recorded(
        lambda: nn.Sequential(Doubling(), nn.Linear(2 * HIDDEN, HIDDEN)),
        {**emit.HANDLERS, Layer: handler},
        one=Doubling,
    )
    [op] = ops_of(module, Opaque)
    assert shape(op.operation.results[0]) == [None, 2 * HIDDEN]
    assert counts(module)["linear"] == 2, "the layer within is a part of the opaque one"


def test_a_layer_that_fills_its_output_is_what_the_output_is_from_then_on() -> None:
    class Filling(nn.Module):
        def forward(self, x: torch.Tensor, output: torch.Tensor) -> None:
            raise NotImplementedError

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fill, self.attend = Filling(), Attend()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = torch.empty_like(x)
            self.fill(x, output)
            return self.attend(output)

    module = recorded(Calling, WITH_ATTENTION, ("between.attend",))
    [op] = ops_of(module, Opaque)
    [append] = ops_of(module, AppendKV)
    assert append.key.owner.operands[0] == op.operation.results[0]


@pytest.mark.parametrize(
    ("compute", "kinds"),
    [
        (lambda x: x.floor(), ["aten.floor"]),
        (lambda x: x[:, :1].expand(x.shape), ["aten.expand"]),
        (lambda x: torch.cat([x, x], dim=-1).narrow(1, 0, HIDDEN), ["aten.cat"]),
        (lambda x: torch.empty_like(x).copy_(x), ["aten.copy_"]),
        (lambda x: x + torch.arange(HIDDEN), ["constant"]),
        (lambda x: torch.ops.llmir_tests.scaled(x, 2.0), ["llmir_tests.scaled"]),
    ],
)
def test_an_operation_without_an_op_is_opaque(
    compute: Callable[[torch.Tensor], torch.Tensor], kinds: list[str]
) -> None:
    class Computing(WithAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(compute(x))

    module = recorded(lambda: Computing(nn.Identity()), WITH_ATTENTION, ("between.attend",))
    assert [op.kind.value for op in ops_of(module, Opaque)] == kinds
    assert "input_ids" in DataFlow(module.operation).contents[ops_of(module, AppendKV)[0].key]


def test_a_write_through_a_view_changes_what_it_is_a_view_of() -> None:
    class Writing(WithAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = torch.empty(x.shape[0], 2, HIDDEN, device="meta")
            both[:, 0].copy_(x)
            both[:, 1].copy_(self.inner(x))
            return self.attend(both.sum(1))

    module = recorded(lambda: Writing(nn.Linear(HIDDEN, HIDDEN)), WITH_ATTENTION, ("between.attend",))
    written = [op for op in ops_of(module, Opaque) if op.kind.value == "written"]
    copies = [op.operation.results[0] for op in ops_of(module, Opaque) if op.kind.value == "aten.copy_"]
    assert [op.operation.operands[-1] for op in written] == copies
    assert written[1].operation.operands[0] == written[0].operation.results[0]


@pytest.mark.parametrize(
    "forward",
    [
        lambda layer, x: layer.attend(x) if x.sum() > 0 else x,
        lambda layer, x: layer.inner(x),
    ],
    ids=["numbers", "leaves out"],
)
def test_a_pass_that_cannot_be_watched_says_so(forward: Callable[..., torch.Tensor]) -> None:
    class Hidden(WithAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    with pytest.raises(UnwatchedError):
        recorded(lambda: Hidden(nn.Identity()), WITH_ATTENTION, ("between.attend",))


def test_an_attention_layer_that_no_kernel_computes_is_refused() -> None:
    def handler(recorder: Recorder, path: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise UnsupportedLayerError(path, "it has horns")

    with pytest.raises(UnsupportedLayerError, match="horns"):
        recorded(lambda: WithAttention(nn.Identity()), {**emit.HANDLERS, Attend: handler}, ("between.attend",))


def test_where_nothing_can_be_watched_the_attention_layers_are_listed() -> None:
    module = attention_module(INFO, ["a", "b"], lambda name: AttentionLayer(SPEC, 512))
    text.verify(module)
    assert list(caches_of(module)) == ["a", "b"]
    assert [spec_of(op).mask for op in ops_of(module, PagedAttention)] == [SPEC.mask] * 2
    assert import_level(module) == "attention"


def test_numbers_that_a_model_computes_while_it_is_built_are_real() -> None:
    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = torch.tensor([0.5, 0.25]).tolist()
            self.weight = nn.Parameter(torch.zeros(2))
            self.tied = self.weight
            self.register_buffer("table", torch.arange(3))

    built = build_on_meta(Slopes, "it cannot be built")
    assert built.slopes == [0.5, 0.25]
    assert built.weight.is_meta and built.table.is_meta and built.tied is built.weight


def test_what_cannot_be_built_says_so_in_the_frameworks_words() -> None:
    def fail() -> nn.Module:
        raise ValueError("no\n such thing")

    with pytest.raises(ImportModelError, match=r"^it cannot be built: no such thing$"):
        recorded(fail)


@pytest.mark.parametrize(
    ("seen", "known"),
    [
        (lambda weight: weight.view(2, HIDDEN // 2, HIDDEN).flatten(0, 1), True),
        (lambda weight: weight.data, True),
        (lambda weight: weight.t(), False),
        (lambda weight: weight[: HIDDEN // 2], False),
        (lambda weight: weight * 2, False),
    ],
)
def test_a_parameter_in_another_shape_is_that_parameter(
    seen: Callable[[torch.Tensor], torch.Tensor], known: bool
) -> None:
    def handler(recorder: Recorder, path: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return emit.linear(recorder, x, seen(layer.weight))

    class Own(nn.Linear):
        pass

    module = recorded(lambda: Own(HIDDEN, HIDDEN, bias=False), {**emit.HANDLERS, Own: handler})
    names = [op.weight.name for op in ops_of(module, ops.Linear)]
    assert names == ["between.weight", "head.weight"] if known else names == ["head.weight"]


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
def test_attention_carries_the_facts_of_its_layer(heads_apart: bool) -> None:
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
    assert [spec_of(op) for op in ops_of(module, PagedAttention)] == [spec]
    assert list(caches_of(module)) == ["between.attend"]
