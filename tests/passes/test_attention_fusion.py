import pytest
from pass_modules import LAYER, ops, run

from llmir.ir.attention import FusedAttention, PagedAttention
from llmir.ir.module import ops_of
from llmir.ir.remarks import remarks
from llmir.passes.attention_fusion import AttentionFusion
from llmir.targets.machine import Target

FUSION = AttentionFusion(Target.named("cpu:avx512_bf16"))


def test_append_and_attention_become_one_op(parse):
    module = parse()
    spec = (
        "spec = #llm.attention_spec<{cache = {block_size = 128 : i64, dtype = "
        '"bf16", key_size = 64 : i64, layout = "logical", num_kv_heads = 3 : i64, scales = "none", '
        'value_size = 64 : i64}, dtype = "bf16", mask = {causal = true, window = 0 : i64}, num_heads = 9 : i64, '
        "scale = 1.250000e-01 : f64, score_stages = [], sinks = false}>"
    )
    assert ops(module)[:2] == [
        '%0 = "llm.append_kv"(%arg8, %arg1, %arg2, %arg4) {layer = "layers.0"}',
        f'%1 = "llm.paged_attention"(%arg0, %0, %arg5, %arg6, %arg7) {{layer = "layers.0", {spec}}}',
    ]
    run(module, FUSION)
    assert ops(module)[0] == (
        '%0:2 = "llm.fused_attention"(%arg0, %arg1, %arg2, %arg8, %arg4, %arg5, %arg6, %arg7) '
        f'{{layer = "layers.0", {spec}}}'
    )
    assert "llm.append_kv" not in str(module) and "llm.paged_attention" not in str(module)


def test_whatever_a_spec_says_is_copied_whole(parse):
    """A field that a later version adds is copied too: the attribute is the same one."""
    module = parse(windows=(77,), scales=(0.3,))
    (spec,) = (op.spec for op in ops_of(module, PagedAttention))
    (fused,) = (op.spec for op in ops_of(run(module, FUSION), FusedAttention))
    assert fused == spec


def test_every_layer_is_fused_with_its_own_append(parse):
    module = run(parse(windows=(0, 512)), FUSION)
    assert [line.split('"')[3] for line in ops(module)[:2]] == ["layers.0", "layers.1"]
    assert "window = 512" in ops(module)[1]


def test_the_remark_counts_calls_and_microseconds(parse):
    (remark,) = remarks(run(parse(windows=(0, 0, 0)), FUSION))
    assert remark.decision == "append and attention in one call in 3 of them"
    assert (remark.numbers["calls_before"], remark.numbers["calls_after"]) == (6, 3)
    assert remark.numbers["saved_us_per_step"] == pytest.approx(3 * remark.numbers["fork_join_us"])


def test_attention_over_a_cache_that_another_layer_wrote_stays(parse):
    reader = LAYER.replace(
        '"llm.append_kv"(%cache{n}, %k, %v, %slots) {{layer = "layers.{n}"',
        '"llm.append_kv"(%cache{n}, %k, %v, %slots) {{layer = "other"',
    )
    module = run(parse(layer=reader), FUSION)
    assert "llm.fused_attention" not in str(module)
    assert remarks(module)[0].numbers["unfused_layers"] == ["layers.0"]


def test_a_cache_read_in_between_is_not_fused_past_its_reader(parse):
    between = LAYER.replace(
        "%out{n} =",
        '%early{n} = "llm.paged_attention"(%q, %new{n}, %table, %start, %lengths) '
        '{{layer = "early", spec = {spec}}} '
        ": (!q, !cache{n}, tensor<?x?xi32>, tensor<?xi32>, tensor<?xi32>) -> !q\n%out{n} =",
    )
    module = run(parse(layer=between), FUSION)
    assert "llm.fused_attention" not in str(module)


def test_a_cache_read_afterwards_is_the_fused_ops_cache(parse):
    after = LAYER + (
        '%late{n} = "llm.paged_attention"(%q, %new{n}, %table, %start, %lengths) '
        '{{layer = "late", spec = {spec}}} '
        ": (!q, !cache{n}, tensor<?x?xi32>, tensor<?xi32>, tensor<?xi32>) -> !q\n"
    )
    module = run(parse(layer=after), FUSION)
    assert ops(module)[1].startswith('%1 = "llm.paged_attention"(%arg0, %0#1,')
