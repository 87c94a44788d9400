"""Figures of a machine, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from llmir.kernels.cpu.object_cache import ObjectCache
from llmir.target import Measurements, Target


def measured(
    target: Target, folder: Path | None, sources: Sequence[Path], measure: Callable[[], Measurements]
) -> Target:
    """``target`` with its figures: those kept in ``folder``, or what ``measure`` finds, kept for the next time.

    ``sources``: the files that decide how figures are measured. No folder: nothing is kept.
    """
    if folder is None:
        return target.with_measurements(measure())
    figures = ObjectCache(folder, suffix=".calibration.json").get_or_build(
        _key(target, sources), lambda: json.dumps(asdict(measure())).encode()
    )
    return Target.from_json({**target.to_json(), "measured": json.loads(figures)})


def _key(target: Target, sources: Sequence[Path]) -> str:
    """What the figures depend on: the machine, and how they are measured."""
    machine = {**target.to_json(), "measured": [field.name for field in fields(Measurements)]}
    text = json.dumps(machine, sort_keys=True) + "".join(source.read_text() for source in sources)
    return hashlib.sha256(text.encode()).hexdigest()
