from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import cache_type

from llmir.ir.attributes import Selection, to_attribute, to_python
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dialect import context
from llmir.ir.dtypes import CACHE_DTYPES
from llmir.ir.kernel_spec import CpuVariant, SharingCosts, StepPolicy
from llmir.ir.quant_scheme import QuantScheme
from llmir.ir.types import (
    PagedKVCache,
    QuantizedTensor,
    ShardedTensor,
    element_name,
    local_shape,
    problem,
    tensor,
)
from llmir.ir.weight import Weight


def test_cache_prints_its_format_by_name():
    assert str(cache_type()) == (
        '!llm.paged_kv_cache<#llm.cache_format<{block_size = 128 : i64, dtype = "bf16", key_size = 64 : i64, '
        'layout = "logical", num_kv_heads = 3 : i64, scales = "none", value_size = 64 : i64}>, 8192 : i64>'
    )


@given(
    st.sampled_from(CACHE_DTYPES),
    st.integers(1, 128),
    st.integers(1, 256).map(lambda n: 2 * n),
    st.integers(1, 256),
    st.integers(1, 64).map(lambda n: 16 * n),
    st.integers(1, 1 << 20),
    st.sampled_from(["logical", "row", "lane", "pair"]),
    st.sampled_from(["none", "layer", "head", "token_head", "group"]),
)
def test_cache_reads_back_from_text(dtype, heads, key_size, value_size, block_size, max_length, layout, scales):
    format = CacheFormat(dtype, heads, key_size, value_size, block_size, layout, scales)
    built = PagedKVCache.build(format, max_length=max_length)
    read = ir.Type.parse(str(built))
    assert read == built
    assert (read.format, read.max_length) == (format, max_length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads of a KV cache must be positive, not 0"),
        ({"key_size": -64}, "key_size of a KV cache must be positive"),
        ({"value_size": 0}, "value_size of a KV cache must be positive"),
        ({"block_size": 0}, "block_size of a KV cache must be positive"),
        ({"max_length": 0}, "max_length of a KV cache must be positive"),
        ({"dtype": "i32"}, "a KV cache holds bf16, f16, f32"),
        ({"layout": "column"}, "layout must be .*not 'column'"),
        ({"scales": "each"}, "scales must be .*not 'each'"),
        ({"layout": "pair", "block_size": 20}, "layout 'pair' needs a block size divisible by 8, not 20"),
        ({"layout": "lane", "block_size": 20}, "layout 'lane' needs a block size divisible by 8, not 20"),
        ({"layout": "pair", "key_size": 65}, "layout 'pair' needs an even key size, not 65"),
    ],
)
def test_cache_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        cache_type(**change)


@given(st.integers(1, 1000))
def test_rows_are_for_blocks_of_any_size(block_size):
    assert cache_type(layout="row", block_size=block_size).format.block_size == block_size


def test_unknown_element_type_is_named():
    with pytest.raises(ValueError, match="unknown element type 'bfloat16'"):
        tensor([None, 4], "bfloat16")


def test_index_typed_sizes_are_a_problem():
    read = ir.Type.parse(str(cache_type()).replace("8192 : i64", "8192 : index"))
    assert "i64" in problem(read)


def test_sharded_tensor_has_the_shape_of_its_shard():
    shard = ShardedTensor.build(tensor([1536, 576], "bf16"), dim=0, shards=2, index=1)
    assert str(shard) == "!llm.sharded_tensor<tensor<1536x576xbf16>, 0 : i64, 2 : i64, 1 : i64>"
    assert (shard.dim, shard.shards, shard.index) == (0, 2, 1)
    assert local_shape(shard) == [768, 576]
    assert element_name(shard) == "bf16"


def test_sharded_tensor_without_integer_suffixes_parses_the_same():
    shard = ShardedTensor.build(tensor([4, 8], "f32"), dim=1, shards=4, index=0)
    assert ir.Type.parse("!llm.sharded_tensor<tensor<4x8xf32>, 1, 4, 0>") == shard


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 2, "shards": 2, "index": 0}, "dimension 2 of tensor<9x64xbf16> does not exist"),
        ({"dim": 0, "shards": 2, "index": 0}, "9 .* is not divisible by 2 shards"),
        ({"dim": 0, "shards": 3, "index": 3}, "shard 3 of 3 does not exist"),
        ({"dim": 0, "shards": 0, "index": 0}, "shard 0 of 0 does not exist"),
    ],
)
def test_sharded_tensor_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        ShardedTensor.build(tensor([9, 64], "bf16"), **values)


def test_sharded_tensor_is_not_cut_twice():
    once = ShardedTensor.build(tensor([8, 8], "f32"), dim=0, shards=2, index=0)
    with pytest.raises(ValueError, match="cannot be sharded again"):
        ShardedTensor.build(once, dim=0, shards=2, index=0)


AWQ = QuantScheme("awq", "i4", (1, 128), "f16", "i4")


def test_quantized_tensor_can_be_sharded():
    whole = QuantizedTensor.build(AWQ, [1536, 512])
    shard = ShardedTensor.build(whole, dim=0, shards=3, index=0)
    assert shard.shape == [512, 512]
    assert Weight.build("w", shard).stored_bytes == 512 * (512 / 2 + 4 * (2 + 0.5))


def test_quantized_tensor_reads_back_from_text():
    built = QuantizedTensor.build(AWQ, [1536, 512])
    fields = 'block = [1, 128], method = "awq", scale = "f16", storage = "i4", zero_point = "i4"'
    assert str(built) == f"!llm.quantized_tensor<#llm.quant_scheme<{{{fields}}}>, [1536, 512]>"
    read = ir.Type.parse(str(built))
    assert (read.scheme, read.shape) == (AWQ, [1536, 512])


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"storage": "f32"}, [8, 8], "numbers of a quantized tensor are of type i4, i8.*, not f32"),
        ({"scale": "i8"}, [8, 8], "scales of a quantized tensor are of type f32, f16.*, not i8"),
        ({"zero_point": "f32"}, [8, 8], "zero points of a quantized tensor are of type none, i4, i8, not f32"),
        ({"block": (-1, 0)}, [8, 8], "cannot be of -1 by 0"),
        ({"method": ""}, [8, 8], "must have a name"),
        ({}, [0, 576], "two or three positive extents"),
        ({}, [8], "two or three positive extents"),
    ],
)
def test_quantized_tensor_refuses(change, shape, message):
    with pytest.raises(ValueError, match=message):
        QuantizedTensor.build(replace(AWQ, **change), shape)


def test_types_of_two_contexts_read_alike():
    """Type ids differ from context to context, and a second one must not break the first."""
    here = cache_type()
    with context():
        assert cache_type().format.block_size == 128
    assert ir.Type.parse(str(here)).format.block_size == 128


def test_weight_carries_name_and_type():
    weight = Weight.build("model.norm.weight", tensor([576], "bf16"))
    assert str(weight) == '#llm.weight<"model.norm.weight", tensor<576xbf16>>'
    read = ir.Attribute.parse(str(weight))
    assert (read.name, read.shape, read.element_type) == ("model.norm.weight", [576], "bf16")


def test_selection_carries_the_records():
    variants = (CpuVariant("decode", 1, 3, 64, 4, 4, 64), CpuVariant("prefill", 32, 6, 128, 4, 4, 0))
    sharing = SharingCosts(48, 128, 20.0, ((256, 4.0), (1024, 8.5)), 2.5, 3, 0.7, 1e-9, 0.9)
    for policy in (StepPolicy(1, 512, 2), StepPolicy(1, 512, 2, sharing)):
        built = Selection.build(isa="avx512_bf16", variants=variants, policy=policy)
        read = ir.Attribute.parse(str(built))
        assert (read.isa, read.variants, read.policy) == ("avx512_bf16", variants, policy)
        assert hash(read.policy) == hash(policy)


@pytest.mark.parametrize("conditions", ["sharing = 5 : i64", "sharing = {row = 1.0}", "cached = unit"])
def test_a_selection_without_the_records_is_a_type_error(conditions):
    text = "decode_tokens = 1 : i64, items_per_thread = 2 : i64, split_keys = 512 : i64"
    read = ir.Attribute.parse(f'#llm.selection<"avx512", [], {{{text}, {conditions}}}>')
    with pytest.raises(TypeError):
        _ = read.policy


_plain = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz_/ 0", min_size=1, max_size=6), inner, max_size=3)
    ),
)


@given(_plain)
def test_plain_values_survive_as_attributes(value):
    assert to_python(ir.Attribute.parse(str(to_attribute(value)))) == value


def test_other_values_have_no_attribute():
    with pytest.raises(TypeError, match="object has no attribute"):
        to_attribute(object())
