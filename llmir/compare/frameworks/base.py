"""What a comparison knows of a framework without importing it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmir.compare.engine import Engine


@dataclass(frozen=True)
class Framework:
    """One framework: how an experienced user runs it on this machine, and what a report says about it.

    A comparison against a badly set up framework would flatter llmir, so nothing here is a framework's
    default merely because it is the default.
    """

    name: str
    """As users type it; also the module it is imported as."""
    title: str
    """As its own people write it."""
    packages: tuple[str, ...]
    """Distributions whose versions matter to its speed; those that are not installed are left out."""
    workloads: tuple[str, ...]
    """Compared unless others are asked for."""
    pairs: int
    """Pairs of processes unless another number is asked for."""
    arguments: Callable[[int, int], dict[str, Any]]
    """Engine arguments of both sides, from the longest request (tokens) and the KV cache (bytes)."""
    baseline: Mapping[str, Any]
    """What the framework has on top by itself: its best settings."""
    llmir: Mapping[str, Any]
    """What it has on top with llmir: the flag."""
    quick_start: Mapping[str, Any]
    """What it has on top where it only serves for a moment: no compilation that pays later."""
    environment: Callable[[Collection[int]], dict[str, str]]
    """Environment variables of both sides, from the CPUs they may use; those the user has set stay."""
    recorded_variables: tuple[str, ...]
    """Beginnings of the names of variables that a report records."""
    conditions: tuple[str, ...]
    """What a report's line says of a side, as formats over ``Engine.settings()``."""
    echoes: tuple[str, ...]
    """Beginnings of error messages that only repeat that another process of the framework failed."""
    load: Callable[[], Callable[[str, dict[str, Any]], Engine]]
    """Import the framework and return what starts it with a model and engine arguments."""
