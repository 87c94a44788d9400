"""What there is no kernel for is said with every reason, and a GPU's differ from a CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmir.ir.attention_spec import Alibi, AttentionSpec, Mask, SoftCap
from llmir.ir.supported import unsupported
from llmir.target import Target

PLAIN = AttentionSpec.dense(8, 2, 64, "bf16", 16, 0.125)


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_plain_attention_has_a_kernel_everywhere(isa: str) -> None:
    assert unsupported(PLAIN, isa) == []
    assert unsupported(replace(PLAIN, mask=Mask(window=7), score_stages=(SoftCap(30.0),)), isa) == []


def test_every_reason_is_told() -> None:
    slopes = Alibi(tuple(2.0**-n for n in range(8)))
    odd = replace(PLAIN, mask=Mask(causal=False), score_stages=(SoftCap(5.0), slopes), sinks=True)
    assert unsupported(odd.with_cache(key_size=72, scales="head"), "avx2") == [
        "only causal attention has a kernel",
        "ALiBi has no kernel",
        "score stages have a kernel one at a time",
        "attention sinks have no kernel on a CPU",
        "its head size is 72, and there are kernels for 64, 80, 96, 128, 256",
        "its values are of another size (64) than keys (72)",
        "a KV cache of bf16 with scales has no kernel on a CPU",
    ]


def test_a_target_says_the_same() -> None:
    quantized = AttentionSpec.dense(8, 2, 64, "bf16", 16, 0.125, quantized=True)
    assert Target.named("cuda:sm_90").supports(quantized) == []
    assert Target.named("cuda:sm_80").supports(quantized) == unsupported(quantized, "sm_80") != []
    assert Target.named("cpu:avx2").supports(quantized) == ["a KV cache of f8E4M3FN has no kernel on a CPU"]
