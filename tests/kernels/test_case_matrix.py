"""The cases of vLLM's own CPU attention tests, within those tests' tolerance.

Heads, sizes, blocks, windows, types and batches are those of vLLM's tests/kernels/attention/test_cpu_attn.py; caches of
fp8 are left out. `make test` takes some of them, `make cases` takes all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch  # noqa: F401 - brings the OpenMP runtime
from attention_cases import Batch, Inputs, attend, bidirectional, expected
from compiled_kernels import RUNNABLE_ISAS

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model

#: Of each request, new tokens and all tokens.
BATCHES = {
    "decode": ((1, 213), (1, 1), (1, 312), (1, 7), (1, 7812)),
    "prefill": ((2345, 2345), (5, 5), (3, 16), (134, 5131)),
    "mixed": ((992, 2456), (1, 1234), (98, 1145), (1, 4162), (2345, 2345)),
}
#: Whole sequences, of which each token sees all.
ENCODED = {"encoder": tuple((tokens, tokens) for tokens in (1, 678, 2367, 145, 4162, 36, 7812))}
HEADS = ((4, 4), (8, 2), (9, 3))
WINDOWS = (0, 256)
#: Head size, block size, element type, and what attention has besides.
SHAPES = (
    *product((96, 128, 512), (96, 128), ("bf16", "f16", "f32"), ({},)),
    *product((80, 96, 112, 128), (48,), ("bf16",), ({},)),
    *product((96,), (128,), ("bf16",), ({"soft_cap": 50.0}, {"alibi": True}, {"sinks": True})),
)
ENCODER_SHAPES = product((96, 128, 512), (128,), ("bf16", "f16", "f32"), ({},))
CASES = [*product(SHAPES, HEADS, WINDOWS, BATCHES), *product(ENCODER_SHAPES, HEADS, WINDOWS, ENCODED)]
TAKEN = CASES if os.environ.get("LLMIR_ALL_CASES") else CASES[::53]


def name_of(case: tuple) -> str:
    (head_size, block_size, dtype, more), heads, window, batch = case
    return "-".join(map(str, (batch, *heads, head_size, dtype, f"block{block_size}", f"window{window}", *more)))


@pytest.mark.parametrize("case", TAKEN, ids=name_of)
def test_a_case_of_vllm_is_computed_as_exactly_as_vllm_asks(case: tuple) -> None:
    (head_size, block_size, dtype, more), heads, window, batch = case
    kernels = kernel_model(replace(Target.detect(), isa=RUNNABLE_ISAS[0]))
    plain = AttentionSpec.dense(*heads, head_size, dtype, block_size, head_size**-0.5, window=window, **more)
    if batch in ENCODED:
        plain = bidirectional(plain)
    attention = kernels.laid_out(plain, block_size)
    decode = kernels.decode(attention)
    spec = KernelSpec(attention, RUNNABLE_ISAS[0], (decode, kernels.prefill(attention)))
    requests = (BATCHES | ENCODED)[batch]
    cached = tuple(tokens - new for new, tokens in requests)
    inputs = Inputs(attention, Batch(cached, tuple(new for new, _ in requests), threads=2, appends=False))
    output = attend(spec, inputs, kernels.policy(attention, decode))
    np.testing.assert_allclose(output, expected(inputs), atol=1.5e-2, rtol=1e-2)
