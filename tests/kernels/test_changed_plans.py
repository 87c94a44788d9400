"""A plan with a changed digit: refused, whoever changed it; and where its digest was made anew, refused or right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch  # noqa: F401  brings the OpenMP runtime
from attention_cases import Batch, check
from test_plan import SHARING, made_for, with_digest

from llmir.errors import PlanError
from llmir.ir.attention_spec import AttentionSpec, Mask, SoftCap
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.plan import Plan, PlannedKernel
from llmir.targets.machine import Target
from llmir.targets.x86 import tiles

CHANGES = 2_000
#: Kernels that are compiled and run, each with one changed digit.
RUN = 5
#: Decode and prefill over several blocks, a prompt that goes on, requests that share most of their blocks.
BATCH = Batch(cached=(100, 33, 0, 96), new=(1, 20, 3, 1), threads=2, prefixes=((0, 0), (0, 0), (0, 0), (0, 96)))


def served_plan() -> Plan:
    """A plan whose kernels any x86-64 machine that llmir knows can run: one from blocks, one from rows."""
    blocks = AttentionSpec.dense(6, 2, 64, "bf16", 32, 0.125, window=64, layout="pair")
    planned = []
    for number, s in enumerate((blocks, replace(blocks, mask=Mask(), score_stages=(SoftCap(30.0),)))):
        spec = KernelSpec(s, "avx2", (tiles.decode_variant(s, "avx2"), tiles.prefill_variant(s, "avx2")))
        policy = StepPolicy(1, 256, 4, replace(SHARING, least_tokens=32))
        planned.append(PlannedKernel(spec.symbol, spec, policy, (f"layers.{number}",), "ab" * 32))
    return replace(made_for(Target.named("cpu:avx2")), block_size=32, kernels=tuple(planned))


def changed_texts(text: str, seed: int) -> Iterator[str]:
    """CHANGES times ``text`` with one digit that is another."""
    chance = random.Random(seed)
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    for _ in range(CHANGES):
        place = chance.choice(digits)
        other = chance.choice([digit for digit in "0123456789" if digit != text[place]])
        yield text[:place] + other + text[place + 1 :]


def test_a_plan_with_a_changed_digit_is_refused():
    text = served_plan().dumps()
    for changed in changed_texts(text, seed=1):
        try:
            read = Plan.loads(changed)
        except PlanError:
            continue
        assert read.dumps() == text, "the digit of a float that is the same number"


def kernels_of_changed_plans() -> Iterator[PlannedKernel]:
    """What plans with a changed digit and a digest that fits still serve, kernels that are changed."""
    served = served_plan()
    text = served.dumps()
    for changed in changed_texts(text, seed=2):
        try:
            data = json.loads(changed)
        except ValueError:  # a number that begins with 0
            continue
        try:
            plan = Plan.from_json(with_digest(data))
        except PlanError as error:
            assert (
                " must " in str(error)
                or "kernel" in str(error)
                or "format" in str(error)
                or "unknown fields" in str(error)
            ), error
            continue
        for kernel, before in zip(plan.kernels, served.kernels, strict=True):
            if (kernel.spec, kernel.policy) != (before.spec, before.policy):
                yield kernel


def test_a_changed_digit_under_a_new_digest_is_refused_by_name_or_computes_what_it_says():
    by_spec = {kernel.spec: kernel for kernel in kernels_of_changed_plans()}
    for kernel in random.Random(3).sample(list(by_spec.values()), RUN):
        check(kernel.spec, BATCH, kernel.policy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": 0}, r"kernels\[0\].spec.variants\[1\].max_tokens is 0, and must be a whole number from 1"),
        ({"max_tokens": 60000}, r"variants\[1\].max_tokens is 60000, with which an item takes \d+ bytes"),
        ({"row_tile": 0}, r"variants\[1\].row_tile is 0, and must be"),
        ({"key_chunk": 0}, r"variants\[1\].key_chunk is 0, and must be"),
        ({"key_vectors": 0}, r"variants\[1\].key_vectors is 0, and must be"),
        ({"value_vectors": 0}, r"variants\[1\].value_vectors is 0, and must be"),
        ({"prefetch": -1}, r"variants\[1\].prefetch is -1, and must be"),
    ],
)
def test_tiles_that_no_kernel_has_are_refused_by_name(change, words):
    data = served_plan().to_json()
    data["kernels"][0]["spec"]["variants"][1].update(change)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(with_digest(json.loads(json.dumps(data))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cached_key": []}, r"sharing.cached_key is \(\), and must be pairs, one at least"),
        ({"cached_key": [[9, 1.0], [3, 2.0]]}, "its tokens must ascend"),
        ({"tile_key": 0.0}, r"sharing.tile_key is 0.0, and must be"),
        ({"margin": float("nan")}, r"sharing.margin is nan, and must be"),
        ({"read_key": float("inf")}, r"sharing.read_key is inf, and must be"),
        ({"least_tokens": 0}, r"sharing.least_tokens is 0, and must be"),
    ],
)
def test_costs_that_cannot_be_weighed_are_refused_by_name(change, words):
    data = served_plan().to_json()
    data["kernels"][0]["policy"]["sharing"].update(change)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(with_digest(json.loads(json.dumps(data))))
