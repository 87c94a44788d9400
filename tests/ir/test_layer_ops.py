"""Each op's verifier: what it accepts is in small_models, here is what it refuses, and that it says where."""

import re

import pytest
from small_models import INFO, llama_layer, weight

from llmir.ir import build
from llmir.ir.bindings import ir, passmanager
from llmir.ir.module import decoder, new_module, ops_of
from llmir.ir.ops import Linear, RMSNorm, Slice
from llmir.ir.quant_scheme import QuantScheme
from llmir.ir.text import InvalidModuleError, parse, verify
from llmir.ir.types import QuantizedTensor, ShardedTensor, tensor
from llmir.ir.weight import Weight

X = "tensor<?x8xbf16>"
W = '#llm.weight<"w", tensor<{}xbf16>>'
NO_RESIDUAL = "operandSegmentSizes = array<i32: 1, 0>, resultSegmentSizes = array<i32: 1, 0>"


def refused(op, message, arguments=f"%x: {X}"):
    """Assert that ``op``, the only op of a function, is refused at its own line."""
    with pytest.raises(InvalidModuleError, match=f"-:2:.*{re.escape(message)}"):
        parse(f"func.func @f({arguments}) {{\n  {op}\n  return\n}}")


def built(make):
    """A module around ``make(x, d)``, x ``[tokens, 8]``."""
    module = new_module(INFO)
    with decoder(module) as d:
        d.output(make(d.input("x", tensor([None, 8], "bf16")), d))
    verify(module)
    return module


def test_a_whole_layer_is_valid():
    verify(llama_layer())


def test_embedding_needs_a_row_as_wide_as_its_result():
    op = f'%0 = "llm.embedding"(%x) {{weight = {W.format("100x4")}}} : (tensor<?xi64>) -> {X}'
    refused(op, "weight 'w' has shape [100, 4] on this rank, but the layer needs [None, 8]", "%x: tensor<?xi64>")


def test_embedding_gives_one_row_an_id():
    op = f'%0 = "llm.embedding"(%x) {{weight = {W.format("100x8")}}} : (tensor<3xi64>) -> tensor<2x8xbf16>'
    refused(op, "one row for each id", "%x: tensor<3xi64>")


def test_linear_weight_must_fit_input_and_output():
    op = f'%0 = "llm.linear"(%x) {{weight = {W.format("16x4")}}} : ({X}) -> tensor<?x16xbf16>'
    refused(op, "'llm.linear' op weight 'w' has shape [16, 4] on this rank, but the layer needs [16, 8]")


def test_linear_bias_must_fit_the_output():
    op = f'%0 = "llm.linear"(%x) {{weight = {W.format("16x8")}, bias = {W.format("8")}}} : ({X}) -> tensor<?x16xbf16>'
    refused(op, "bias 'w' has shape [8] on this rank, but the layer needs [16]")


def test_an_optional_attribute_has_its_kind():
    op = f'%0 = "llm.linear"(%x) {{weight = {W.format("16x8")}, bias = 1.0 : f32}} : ({X}) -> tensor<?x16xbf16>'
    refused(op, "attribute 'bias' must be a Weight")


def test_a_weight_is_a_tensor():
    op = f'%0 = "llm.linear"(%x) {{weight = #llm.weight<"w", f32>}} : ({X}) -> tensor<?x16xbf16>'
    refused(op, "weight 'w' must be a tensor, but is f32")


def test_a_weight_s_type_is_verified_where_it_is_used():
    bad = '#llm.weight<"w", !llm.sharded_tensor<tensor<9x8xbf16>, 0, 2, 0>>'
    op = f'%0 = "llm.linear"(%x) {{weight = {bad}}} : ({X}) -> tensor<?x4xbf16>'
    refused(op, "weight 'w': 9 (dimension 0 of tensor<9x8xbf16>) is not divisible by 2 shards")


def test_a_missing_attribute_is_named():
    refused(f'%0 = "llm.linear"(%x) : ({X}) -> {X}', '"weight"')


def test_operands_are_tensors():
    op = f'%0 = "llm.linear"(%x) {{weight = {W.format("8x8")}}} : (f32) -> {X}'
    refused(op, "operand must be a ranked tensor of at least 1 dimensions, but is f32", "%x: f32")


def test_rms_norm_keeps_the_type():
    attributes = f"epsilon = 1.0e-5 : f64, weight_offset = 0.0 : f64, {NO_RESIDUAL}"
    refused(f'%0 = "llm.rms_norm"(%x) {{{attributes}}} : ({X}) -> tensor<?x8xf32>', "x and result must have one type")


def test_rms_norm_returns_a_residual_only_for_a_residual():
    segments = "operandSegmentSizes = array<i32: 1, 0>, resultSegmentSizes = array<i32: 1, 1>"
    attributes = f"epsilon = 1.0e-5 : f64, weight_offset = 0.0 : f64, {segments}"
    refused(f'%0:2 = "llm.rms_norm"(%x) {{{attributes}}} : ({X}) -> ({X}, {X})', "takes a residual and returns one")


def test_rms_norm_s_weight_is_as_long_as_a_row():
    with pytest.raises(InvalidModuleError, match=r"weight 'w' has shape \[4\] on this rank"):
        built(lambda x, d: build.rms_norm(x, weight("w", 4), epsilon=1e-5))


def test_layer_norm_s_epsilon_is_not_negative():
    with pytest.raises(InvalidModuleError, match="epsilon must not be negative, but is -1"):
        built(lambda x, d: build.layer_norm(x, weight("w", 8), weight("b", 8), epsilon=-1))


def test_layer_norm_checks_its_bias():
    with pytest.raises(InvalidModuleError, match=r"bias 'b' has shape \[4\]"):
        built(lambda x, d: build.layer_norm(x, weight("w", 8), weight("b", 4), epsilon=1e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_size": 3}, "rotary_size must be even and at most head_size 3, but is 3"),
        ({"head_size": 16}, "does not hold whole heads of 16 elements"),
        ({"rotary_size": 6}, "rotary_size must be even and at most head_size 4, but is 6"),
        ({"style": "wrong"}, "style must be one of"),
    ],
)
def test_rope_refuses(change, message):
    with pytest.raises(InvalidModuleError, match=message):
        built(lambda x, d: build.rope(d.positions, x, **{"head_size": 4, "base": 1e4, **change}))


def test_rope_of_the_query_alone_is_valid():
    built(lambda x, d: build.rope(d.positions, x, head_size=4, base=1e4, scaling={"rope_type": "yarn", "factor": 4.0}))


def test_unknown_activation_is_named():
    with pytest.raises(InvalidModuleError, match="unknown activation 'swish'; known are"):
        built(lambda x, d: build.activation(x, "swish"))


def test_gated_activation_halves():
    refused(f'%0 = "llm.activation"(%x) {{kind = "silu_and_mul"}} : ({X}) -> {X}', "must have shape [None, 4]")


def test_pipeline_ranks_are_not_negative():
    with pytest.raises(InvalidModuleError, match="peer must be a rank, but is -1"):
        built(lambda x, d: build.send(x, peer=-1) or build.recv(x.type, peer=0))


def test_all_reduce_is_over_some_ranks():
    with pytest.raises(InvalidModuleError, match="ranks must be positive, but is 0"):
        built(lambda x, d: build.all_reduce(x, ranks=0))


def test_logits_checks_its_weight():
    op = f'%0 = "llm.logits"(%x) {{weight = {W.format("9x4")}, scale = 1.0 : f64, soft_cap = 0.0 : f64}}'
    refused(f"{op} : ({X}) -> tensor<?x9xbf16>", "but the layer needs [9, 8]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: build.elementwise("pow", x, x), "unknown function 'pow'"),
        (lambda x: build.elementwise("add", x), "add takes 2 arguments, but has 1"),
        (lambda x: build.elementwise("silu", x, scalar=2), "silu takes 1 arguments, but has 2"),
        (
            lambda x: build.elementwise("add", x, x, result_type=tensor([None, 4], "bf16")),
            "tensor<\\?x8xbf16> does not broadcast to tensor<\\?x4xbf16>",
        ),
        (lambda x: build.reshape(x, [None, 3, 2]), "hold different numbers of elements"),
        (lambda x: build.slice(x, 4, 5), "elements 4 to 9 are not within the 8 of dimension 1"),
        (lambda x: build.slice(x, 0, 0), "elements 0 to 0 are not within"),
    ],
)
def test_arithmetic_refuses(make, message):
    with pytest.raises(InvalidModuleError, match=message):
        built(lambda x, d: make(x))


def test_reshape_keeps_the_element_type():
    op = f'%0 = "llm.reshape"(%x) : ({X}) -> tensor<?x2x4xf32>'
    refused(op, "element types")


def test_split_is_one_slice_a_piece():
    module = built(lambda x, d: build.split(x, [5, 2, 1])[1])
    slices = ops_of(module, Slice)
    assert [(op.offset.value, op.size.value) for op in slices] == [(0, 5), (5, 2), (7, 1)]
    assert str(slices[1].result.type) == "tensor<?x2xbf16>"


def test_linear_reads_the_shape_of_its_shard():
    shard = ShardedTensor.build(tensor([32, 8], "bf16"), dim=0, shards=2, index=0)
    module = built(lambda x, d: build.linear(x, Weight.build("w", shard)))
    assert str(ops_of(module, Linear)[0].result.type) == "tensor<?x16xbf16>"


def test_linear_takes_a_quantized_weight():
    quantized = QuantizedTensor.build(QuantScheme("gptq", "i8", (1, 4), "f16"), [16, 8])
    built(lambda x, d: build.linear(x, Weight.build("w", quantized)))


def test_absent_options_read_as_none():
    module = built(lambda x, d: build.rms_norm(x, None, epsilon=1e-6))
    op = ops_of(module, RMSNorm)[0]
    assert (op.weight, op.residual, op.residual_result) == (None, None, None)


def test_unused_layers_are_removed_by_upstream_passes():
    module = built(lambda x, d: (build.activation(x, "silu"), x)[1])
    passmanager.PassManager.parse("builtin.module(canonicalize)").run(module.operation)
    assert "llm.activation" not in str(module)


def test_an_invalid_op_made_by_a_pass_is_found():
    def spoil(op, pass_):
        ops_of(op, Linear)[0].attributes["weight"] = weight("w", 3, 3)

    module = built(lambda x, d: build.linear(x, weight("w", 8, 8)))
    manager = passmanager.PassManager("builtin.module")
    manager.add(spoil, name="spoil", argument="spoil")
    with pytest.raises(ir.MLIRError, match="weight 'w' has shape"):
        manager.run(module.operation)
