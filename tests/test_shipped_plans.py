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
