"""What there is no kernel for is said with every reason, and a GPU's differ from a CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmir.ir.attention_spec import Alibi, AttentionSpec, Mask, SoftCap
from llmir.targets.machine import Target
from llmir.targets.registry import unsupported

PLAIN = AttentionSpec.dense(8, 2, 64, "bf16", 16, 0.125)


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_plain_attention_has_a_kernel_everywhere(isa: str) -> None:
    assert unsupported(PLAIN, isa) == []
    assert unsupported(replace(PLAIN, mask=Mask(window=7), score_stages=(SoftCap(30.0),)), isa) == []


def test_every_reason_is_told() -> None:
    odd = replace(PLAIN, mask=Mask(causal=False), score_stages=(Alibi(), SoftCap(5.0)), sinks=True)
    odd = odd.with_cache(key_size=76, scales="head")
    assert unsupported(odd, "avx2") == [
        "scores that go through ALiBi, then a soft cap have no kernel on a CPU",
        "ALiBi of bidirectional attention has no kernel",
        "its head size is 76, and there are kernels for multiples of 8 from 32 to 576 on a CPU",
        "a KV cache of bf16 with scales has no kernel on a CPU",
    ]
    assert unsupported(odd, "sm_80") == [
        "ALiBi has no kernel on a GPU",
        "bidirectional attention has no kernel on a GPU",
        "ALiBi of bidirectional attention has no kernel",
        "its head size is 76, and there are kernels for multiples of 16 from 32 to 256 on a GPU",
        "its values are of another size (64) than keys (76), which has no kernel on a GPU",
        "a KV cache of bf16 with scales has no kernel on a GPU",
    ]


@pytest.mark.parametrize("size", [32, 40, 112, 192, 512, 576])
def test_a_cpu_has_kernels_of_many_sizes(size: int) -> None:
    assert unsupported(PLAIN.with_cache(key_size=size), "avx2") == []
    assert unsupported(PLAIN.with_cache(value_size=size), "avx512_bf16") == []
    assert unsupported(PLAIN.with_cache(value_size=size + 4), "avx2") == [
        f"its values are of size {size + 4}, and there are kernels for multiples of 8 from 32 to 576 on a CPU"
    ]


def test_a_cpu_has_sinks_and_alibi() -> None:
    assert unsupported(replace(PLAIN, sinks=True, score_stages=(SoftCap(5.0), Alibi())), "avx2") == []


def test_a_target_says_the_same() -> None:
    quantized = AttentionSpec.dense(8, 2, 64, "bf16", 16, 0.125, quantized=True)
    assert Target.named("cuda:sm_90").supports(quantized) == []
    assert Target.named("cuda:sm_80").supports(quantized) == unsupported(quantized, "sm_80") != []
    assert Target.named("cpu:avx2").supports(quantized) == ["a KV cache of f8E4M3FN has no kernel on a CPU"]
