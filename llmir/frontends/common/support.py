"""What llmir cannot serve in any framework, and the errors that say so.

Imports neither a framework nor torch. A check is a sentence about what was found and whether it was; the gravest
stands first, because only the first is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.targets.registry import kind_of, unsupported

#: The remedy that every refusal ends with.
WITHOUT = "leave out --attention-backend {name} to serve this with {framework}'s own kernels"


class UnsupportedFeatureError(LlmirError):
    """A feature that the user asked the framework for does not work with llmir's kernels."""


def refuse(checks: Mapping[str, bool], remedy: str) -> None:
    """Raise UnsupportedFeatureError for the first of ``checks`` that found what its words say."""
    for problem, found in checks.items():
        if found:
            raise UnsupportedFeatureError(f"llmir cannot serve this: {problem}; {remedy}")


def refuse_layer(path: str, spec: AttentionSpec | None, isa: str, checks: Mapping[str, bool]) -> None:
    """Raise UnsupportedLayerError for all that the attention layer at ``path`` has and no kernel computes.

    ``checks`` are what the framework's layers may have and a ``spec`` cannot say; None stands for a layer of which none
    can be made. ``isa`` is what kernels are compiled for.
    """
    found = [problem for problem, applies in checks.items() if applies]
    reasons = [f"it has {' and '.join(found)}"] if found else []
    if spec is not None:
        reasons += unsupported(spec, isa)
    if reasons:
        raise UnsupportedLayerError(path, ", and ".join(reasons))


def refuse_layers(layers: Mapping[str, Any], check: Callable[[str, Any], None]) -> None:
    """Raise one UnsupportedLayerError for all of the attention ``layers`` (by path) that ``check`` raises one for."""
    reasons: dict[str, list[str]] = {}
    for path, layer in layers.items():
        try:
            check(path, layer)
        except UnsupportedLayerError as error:
            reasons.setdefault(error.reason, []).append(error.layer)
    if not reasons:
        return
    (first, *_), *_ = reasons.values()
    sentences = [f"{reason}{_and_others(len(paths) - 1)}" for reason, paths in reasons.items()]
    places = ["", *(f"layer {paths[0]!r}: " for paths in list(reasons.values())[1:])]
    raise UnsupportedLayerError(first, "; ".join(map("".join, zip(places, sentences, strict=True))))


def _and_others(count: int) -> str:
    return "" if not count else f" (and so {'has 1 more layer' if count == 1 else f'have {count} more layers'})"


def nothing_to_do(model: str, name: str, framework: str) -> UnsupportedFeatureError:
    """The error to raise for a model without an attention layer."""
    remedy = WITHOUT.format(name=name, framework=framework)
    return UnsupportedFeatureError(
        f"the model {model!r} has no attention layer, so there is nothing for llmir to do; {remedy}"
    )


def dtype_check(dtype: str, isa: str) -> dict[str, bool]:
    """The check of a model's dtype, by :func:`dtype_name`, on what ``isa`` is of."""
    kind = kind_of(isa)
    *others, last = known = [str(DTYPES[name].torch) for name in kind.dtypes]
    words = f"{', '.join(others)} and {last}" if others else last
    return {f"the model runs in {dtype}, and llmir has kernels for {words} {kind.where}": dtype not in known}


def architecture(config: Any) -> dict[str, Any]:
    """What a model's transformers configuration says about its shape, without where it was found or who wrote it."""
    incidental = ("_name_or_path", "transformers_version")
    return {name: fact for name, fact in config.to_dict().items() if name not in incidental}


def installed_version(*distributions: str) -> str:
    """Version of the first of ``distributions`` that is installed; a framework may have several names."""
    for distribution in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return "unknown"


def class_name(instance: Any) -> str:
    """The class of something of a framework's, with its module: names alone come more than once."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def dtype_name(dtype: Any) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
