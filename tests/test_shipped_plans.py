"""The plans in benchmarks/plans are what the compiler makes today."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmir.plan import Plan

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import ship_plans

FILES = {f"{path.parent.name}/{path.stem}": (path, model, target) for path, model, target in ship_plans.files()}


def decided(plan: Plan) -> Plan:
    """A plan without what depends on the machine that made it."""
    return replace(plan, versions={}, module_hash="")


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_plan_is_what_the_compiler_makes_today(name):
    path, model, target = FILES[name]
    today = Plan.loads(ship_plans.plan_of(model, target).dumps())
    assert decided(Plan.read(path)) == decided(today), "run: python tools/ship_plans.py"


def test_no_other_plans_are_shipped():
    assert set(ship_plans.FOLDER.rglob("*.json")) == {path for path, _, _ in FILES.values()}


def test_shipped_plans_are_small():
    assert all(path.stat().st_size < 16_000 for path, _, _ in FILES.values())


def test_explain_tells_a_gpu_s_plan(run):
    code, out, _ = run("explain", ship_plans.FOLDER / "cuda-sm_90/llama-3-8b.json")
    assert code == 0
    assert "cuda:sm_90: NVIDIA H100 SXM, sm_90, 132 SMs" in out and "not measured" in out
    assert "compiled when serving starts" in out and "This plan is for cuda-sm_90" in out


def test_explain_shows_why_blocks_of_any_size_are_read_alike(run):
    _, out, _ = run("explain", ship_plans.FOLDER / "cuda-sm_90/llama-3-8b.json")
    assert "kb on their way to a thread block  64" in out and "kb that hide the latency" in out
