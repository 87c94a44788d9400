import pytest
from pass_modules import LAYER, ops, run

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.ir.attention import FusedAttention, Kernel, kernel_spec
from llmir.ir.module import ops_of
from llmir.ir.remarks import remarks
from llmir.passes.attention_fusion import AttentionFusion
from llmir.passes.kernel_outlining import KernelOutlining, free_symbol
from llmir.passes.kernel_selection import KernelSelection
from llmir.targets.machine import Target

BEST = Target.named("cpu:avx512_bf16")


def outline(module):
    return run(module, AttentionFusion(BEST), KernelSelection(BEST), KernelOutlining())


def calls(module):
    return {op.layer.value: op.kernel.value for op in ops_of(module, FusedAttention)}


def test_a_layers_selection_moves_into_a_kernel_that_it_names(parse):
    module = run(parse(), AttentionFusion(BEST), KernelSelection(BEST))
    assert "llm.kernel" not in str(module) and "selection = " in ops(module)[0]
    run(module, KernelOutlining())
    kernel, attention = ops(module)[:2]
    assert kernel.startswith('"llm.kernel"() {') and 'sym_name = "attention_9x3x64_bf16_block128"' in kernel
    assert "selection = #llm.selection<" in kernel and "selection" not in attention
    assert "kernel = @attention_9x3x64_bf16_block128" in attention


def test_equal_layers_share_a_kernel(parse):
    module = outline(parse(windows=(0,) * 30))
    assert len(ops_of(module, Kernel)) == 1
    assert set(calls(module).values()) == {"attention_9x3x64_bf16_block128"}


def test_another_window_is_another_kernel(parse):
    module = outline(parse(windows=(0, 512, 0, 512)))
    assert calls(module) == {
        "layers.0": "attention_9x3x64_bf16_block128",
        "layers.1": "attention_9x3x64_bf16_block128_window512",
        "layers.2": "attention_9x3x64_bf16_block128",
        "layers.3": "attention_9x3x64_bf16_block128_window512",
    }


def test_kernels_that_differ_in_scale_alone_have_names_of_their_own(parse):
    module = outline(parse(windows=(0, 0), scales=(0.125, 0.25)))
    assert list(calls(module).values()) == ["attention_9x3x64_bf16_block128", "attention_9x3x64_bf16_block128_1"]
    assert [kernel_spec(op).attention.scale for op in ops_of(module, Kernel)] == [0.125, 0.25]


def test_the_remark_counts_kernels(parse):
    remark = remarks(outline(parse(windows=(0, 512, 0, 512))))[-1]
    assert remark.numbers == {"layers": 4, "kernels": 2}
    assert "2 fewer to compile" in remark.reason


def test_attention_over_a_cache_of_another_layer_is_refused_by_layer(parse):
    reader = LAYER.replace('%slots) {{layer = "layers.{n}"', '%slots) {{layer = "other"')
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0.*does not write itself"):
        outline(parse(layer=reader))


def test_a_layer_without_a_selection_says_which_pass_is_missing(parse):
    with pytest.raises(LlmirError, match=r"layers\.0.*run kernel-selection first"):
        run(parse(), AttentionFusion(BEST), KernelOutlining())


def test_a_taken_symbol_gets_the_first_free_number():
    assert [free_symbol("a", taken) for taken in (set(), {"a"}, {"a", "a_1"}, {"b"})] == ["a", "a_1", "a_2", "a"]
