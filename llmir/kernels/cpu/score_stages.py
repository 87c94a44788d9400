"""Emits what scores go through between their scaling and the mask, stage by stage (see AttentionSpec).

A stage changes one row's scores of a chunk, a vector at a time. Scores are exponents of two when the last of them is
through; a soft cap takes them as ``Geometry.exponent_scale`` leaves them. A stage that adds something leaves a masked
score, -inf, as it is, so it can wait until the softmax has the scores in registers: ALiBi so took 0.95 of the time of
a pass of its own, in decode of 9/3 x 64 heads on Zen 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from llmir.ir.attention_spec import Alibi, ScoreStage, SoftCap
from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.geometry import LOG2_E, Geometry
from llmir.kernels.cpu.products import Products
from llmir.kernels.cpu.rows import RowTile

#: Stages that add something finite.
_ADDED = (Alibi,)
#: Changes one vector of a row's scores, whose first key is so many after the chunk's first.
VectorChange: TypeAlias = Callable[[ir.Value, int], ir.Value]
#: Gives that for a row of a tile, in the chunk that begins at a key.
StageEmitter: TypeAlias = Callable[[RowTile, ir.Value, ir.Value], VectorChange]


def stage_emitters(geometry: Geometry) -> tuple[list[StageEmitter], list[StageEmitter]]:
    """Those of a kernel's score stages, in their order: before the mask, and after it."""
    stages = geometry.spec.attention.score_stages
    before = len(stages)
    while before and isinstance(stages[before - 1], _ADDED):
        before -= 1
    emitters = [_emitter(stage, geometry.products) for stage in stages]
    return emitters[:before], emitters[before:]


def through(changes: Iterable[VectorChange], scores: ir.Value, first: int) -> ir.Value:
    """``scores`` after all ``changes``, one after the other."""
    for change in changes:
        scores = change(scores, first)
    return scores


def _emitter(stage: ScoreStage, products: Products) -> StageEmitter:
    match stage:
        case SoftCap(cap):
            return _soft_cap(cap, products)
        case Alibi():
            return _alibi(products)


def _soft_cap(cap: float, products: Products) -> StageEmitter:
    """S = cap tanh(S / cap), with tanh |x| = (1 - e) / (1 + e) of e = 2**(-2 |x| log2 e), in (0, 1]."""

    def row_change(_tile: RowTile, _row: ir.Value, _first_key: ir.Value) -> VectorChange:
        type_ = products.f32_vector()
        exponent_cap, one = b.constant(cap * LOG2_E, type_), b.constant(1.0, type_)

        def change(exponent: ir.Value, _first: int) -> ir.Value:
            e = products.exp2(f.negate(f.magnitude(exponent)))
            tanh = f.fdiv(f.fsub(one, e), f.fadd(one, e))
            return f.fmul(exponent_cap, f.with_sign_of(tanh, exponent))

        return change

    return row_change


def _alibi(products: Products) -> StageEmitter:
    """S = S - slope x (position of the query - position of the key)."""

    def row_change(tile: RowTile, row: ir.Value, first_key: ir.Value) -> VectorChange:
        lanes, f32 = products.lanes, b.floating("f32")
        slope = f.splat(b.load(b.offset(tile.slopes, b.mul(row, 4)), f32), lanes)
        position = b.load(b.offset(tile.positions, b.mul(row, 4)), b.integer(32))
        # Taken from each other as integers: exact, and small where weights are large.
        to_first = f.splat(b.sub(b.narrow(first_key), position), lanes)
        distances = f.float_of(b.add(to_first, b.lane_numbers(lanes)), lanes)

        def change(scores: ir.Value, first: int) -> ir.Value:
            distance = f.fadd(distances, b.constant(float(first), products.f32_vector()))
            return f.fma(slope, distance, scores)

        return change

    return row_change
