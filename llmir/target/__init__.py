"""The machine a plan is made for: instruction set, caches, cores, and how fast they are."""

from llmir.target.machine import Target
from llmir.target.records import Cache, Measurements, TargetError

__all__ = ["Cache", "Measurements", "Target", "TargetError"]
