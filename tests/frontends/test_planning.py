"""Which machine a plan is made for, from the device a framework serves on and the user's options."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import PLAN, made_for

from llmir.errors import LlmirError, PlanError
from llmir.frontends.common.options import Options
from llmir.frontends.common.plan_cache import plan_key
from llmir.frontends.common.planning import check_carried, host_of, plan_for, target_of
from llmir.targets.machine import Target

logger = logging.getLogger("llmir.test")
HOPPER = Target.named("cuda:sm_90")
FACTS = {"framework": "vllm 0.32.0", "model": "tiny", "world_size": 1}


def test_a_cpu_is_this_machines() -> None:
    assert host_of("cpu") == Target.detect()


def test_a_gpu_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Target, "named", lambda name: asked.append(name) or HOPPER)
    assert host_of("gpu") is HOPPER
    assert asked == ["gpu"]


def test_without_options_the_host_is_the_target() -> None:
    assert target_of(Options(), HOPPER) is HOPPER


def test_a_target_that_the_host_runs_may_be_named() -> None:
    assert target_of(Options(target="cuda:sm_90"), HOPPER) == HOPPER


@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_100", "hip:gfx942", "cpu"])
def test_another_target_is_refused(name: str) -> None:
    with pytest.raises(LlmirError, match=f"cannot run kernels for target {name!r}, it has sm_90: leave out"):
        target_of(Options(target=name), HOPPER)


def test_plans_for_a_gpu_and_its_host_have_keys_of_their_own() -> None:
    assert plan_key(FACTS, Options(), HOPPER) != plan_key(FACTS, Options(), Target.detect())


def test_a_plan_file_must_be_for_the_gpu(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    made_for(Target.detect()).write(file)
    with pytest.raises(PlanError, match="was made for a machine"):
        plan_for(FACTS, Options(plan=str(file)), lambda: PLAN, logger, HOPPER)
    shipped = Path(__file__).parents[2] / "benchmarks/plans/cuda-sm_90/llama-3-8b.json"
    facts = {**FACTS, "framework": "vllm 0.26.0", "model": "meta-llama/Meta-Llama-3-8B"}
    assert plan_for(facts, Options(plan=str(shipped)), lambda: PLAN, logger, HOPPER).world_size == 1


def test_a_processor_without_kernels_is_refused_by_what_it_lacks() -> None:
    old = replace(Target.named("cpu:avx2"), isa="none", features=("avx",))
    for options in (Options(), Options(target="cpu:avx2"), Options(target="cpu"), Options(plan="plan.json")):
        with pytest.raises(LlmirError, match="lacks avx2, f16c, fma: serve on a GPU or without llmir here"):
            target_of(options, old)


def test_start_up_says_that_amx_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = Target.named("cpu:avx512_bf16")
    file = tmp_path / "plan.json"
    made_for(best).write(file)
    caplog.set_level(logging.INFO)
    plan_for(FACTS, Options(plan=str(file)), lambda: PLAN, logger, best)
    assert "AMX" not in caplog.text
    with_amx = replace(best, features=(*best.features, "amx_bf16", "amx_tile"))
    plan_for(FACTS, Options(plan=str(file)), lambda: PLAN, logger, with_amx)
    assert "AMX, which no kernel of llmir uses yet" in caplog.text


def test_a_plan_that_came_with_a_configuration_must_be_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    least = Target.named("cpu:avx2")
    monkeypatch.setattr(Target, "detect", lambda: least)
    check_carried(made_for(least), "cpu")
    with pytest.raises(PlanError, match="made for a machine x86_64-avx512_bf16, and this one is x86_64-avx2"):
        check_carried(PLAN, "cpu")
    with pytest.raises(PlanError, match="made for a machine x86_64-avx512_bf16, and this is to be served on a GPU"):
        check_carried(PLAN, "gpu")
