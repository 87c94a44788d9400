"""Figures of a machine, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from llmir.cache import MEASUREMENTS
from llmir.kernels.cpu.object_cache import ObjectCache
from llmir.kernels.source_digest import closure_digest
from llmir.targets.machine import Target
from llmir.targets.records import Measurements


def measured(
    target: Target, folder: Path | None, module: str, toolchain: str, measure: Callable[[], Measurements]
) -> Target:
    """``target`` with its figures: those kept below ``folder``, or what ``measure`` finds, kept for the next time.

    ``module``: the one that measures, whose sources, with all it imports, decide how. ``toolchain``: what else does,
    the versions of what compiles the measuring kernels. No folder: nothing is kept. What ``measure`` raises is passed
    on, and nothing is kept.
    """
    if folder is None:
        return target.with_measurements(measure())
    figures = ObjectCache(folder / MEASUREMENTS, suffix=".calibration.json").get_or_build(
        calibration_key(target, module, toolchain), lambda: json.dumps(asdict(measure())).encode()
    )
    return Target.from_json({**target.to_json(), "measured": json.loads(figures)})


def calibration_key(target: Target, module: str, toolchain: str) -> str:
    """What the figures depend on: the machine, and how they are measured; 64 hexadecimal digits."""
    parts = {
        "machine": {**target.to_json(), "measured": [field.name for field in fields(Measurements)]},
        "sources": closure_digest(module),
        "toolchain": toolchain,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
