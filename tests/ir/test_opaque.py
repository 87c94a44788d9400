"""What the dialect has no op for, as an op: any operands, results and weights, whole through text and bytecode."""

import re

import pytest
from small_models import INFO, attention_module, llama_layer, weight

from llmir.ir.bindings import ir
from llmir.ir.module import decoder, new_module, ops_of
from llmir.ir.opaque import ATTENTION_ONLY, RUNS, Opaque, import_level, opaque, opaque_kinds, weight_bytes
from llmir.ir.text import InvalidModuleError, bytecode, parse, print_module, verify
from llmir.ir.types import tensor


def module_with(operands=("input_ids", "slots", "block_table"), results=((None, 8),), weights=()):
    """A module of one opaque op that takes step inputs by name and gives tensors of these shapes."""
    module = new_module(INFO)
    with decoder(module) as d:
        types = [tensor(shape, "f32") for shape in results]
        given = [getattr(d, name) for name in operands]
        d.output(*opaque("some.Layer", given, types, path="layers.0", weights=weights))
    return module


def test_operands_results_and_weights_are_kept_in_order():
    module = module_with(results=[[None, 8], [None, 8], [3], [None, 8]], weights=[weight("w", 4, 8), weight("b", 4)])
    verify(module)
    [op] = ops_of(module, Opaque)
    assert (op.kind.value, op.path.value) == ("some.Layer", "layers.0")
    assert [str(value.type) for value in op.operation.operands] == ["tensor<?xi64>", "tensor<?xi64>", "tensor<?x?xi32>"]
    assert [str(value.type) for value in op.operation.results] == [
        *["tensor<?x8xf32>"] * 2,
        "tensor<3xf32>",
        "tensor<?x8xf32>",
    ]
    assert [w.name for w in op.weights] == ["w", "b"]
    assert weight_bytes(op) == 2 * (4 * 8 + 4)


@pytest.mark.parametrize("weights", [[], ["w"]], ids=["without weights", "with weights"])
def test_it_goes_through_text_and_bytecode(weights):
    module = module_with(weights=[weight(name, 4, 8) for name in weights])
    text = print_module(module)
    assert print_module(parse(text)) == text
    assert print_module(parse(bytecode(module))) == text


def test_it_may_come_from_nowhere_and_give_nothing():
    verify(module_with(operands=(), results=()))


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ('kind = "some.Layer"', 'kind = ""', "kind must be the name of a class or operation, but is empty"),
        ('kind = "some.Layer", ', "", 'attribute "kind" is expected but not provided'),
        ('#llm.weight<"w", tensor<4x8xbf16>>', "3", "weights must be of type #llm.weight, but there is 3"),
        ("tensor<4x8xbf16>>", "f32>", "weight 'w' must be a tensor, but is f32"),
    ],
)
def test_bad_input_is_refused_by_what_is_wrong(written, instead, message):
    text = print_module(module_with(weights=[weight("w", 4, 8)]))
    assert written in text
    with pytest.raises(InvalidModuleError, match=re.escape(message)):
        parse(text.replace(written, instead))


def test_more_changes_of_type_than_it_has_lists_are_refused():
    shapes = [[size] for size in range(1, RUNS + 2)]
    with pytest.raises(ValueError, match=f"at most {RUNS} runs of results"):
        module_with(results=shapes)
    verify(module_with(results=shapes[:-1]))


def test_the_level_of_a_module_is_what_it_shows():
    assert import_level(llama_layer()) == "full"
    module = module_with()
    assert (import_level(module), opaque_kinds(module)) == ("open", {"some.Layer": 1})
    attention = attention_module()
    attention.operation.attributes[ATTENTION_ONLY] = ir.UnitAttr.get()
    assert import_level(parse(print_module(attention))) == "attention"
