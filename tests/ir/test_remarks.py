from small_models import attention_module

from llmir.ir.remarks import Remark, add_remark, remarks
from llmir.ir.text import bytecode, parse, print_module

FIRST = Remark(
    "block_sizing",
    "KV cache",
    "64 tokens a block",
    "least time per step",
    {"read_gb_per_s": 14.2, "waste_fraction": 0.031, "tokens": 64, "measured": True},
    [{"block_size": 128, "read_gb_per_s": 16.0}, {"block_size": 32, "rejected": "framework"}],
)
SECOND = Remark("kernel_selection", 'layer "0"', "decode", "one\nreason")


def test_a_new_module_has_no_remarks():
    assert remarks(attention_module()) == []


def test_remarks_keep_their_order():
    module = attention_module()
    add_remark(module, FIRST)
    add_remark(module.operation, SECOND)
    assert remarks(module) == [FIRST, SECOND]


def test_remarks_survive_printing():
    module = attention_module()
    add_remark(module, FIRST)
    add_remark(module, SECOND)
    assert remarks(parse(print_module(module))) == [FIRST, SECOND]


def test_remarks_survive_bytecode():
    module = attention_module()
    add_remark(module, FIRST)
    assert remarks(parse(bytecode(module))) == [FIRST]
