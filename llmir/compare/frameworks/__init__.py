"""The frameworks that can be compared: one module each, and the one list of them."""

from __future__ import annotations

from llmir.compare.frameworks.base import Framework
from llmir.compare.frameworks.sglang import SGLANG
from llmir.compare.frameworks.vllm import VLLM
from llmir.errors import LlmirError

#: By the name users give, in the order of a report.
FRAMEWORKS: dict[str, Framework] = {framework.name: framework for framework in (VLLM, SGLANG)}

__all__ = ["FRAMEWORKS", "Framework", "framework_named"]


def framework_named(name: str) -> Framework:
    """The framework of that name; :class:`LlmirError` with the known names if there is none."""
    if name not in FRAMEWORKS:
        raise LlmirError(f"llmir cannot compare {name!r}; it compares {', '.join(FRAMEWORKS)}")
    return FRAMEWORKS[name]
