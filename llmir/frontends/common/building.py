"""Building a framework's model classes without weights."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from llmir.errors import LlmirError, UnsupportedLayerError

Model = TypeVar("Model", bound=torch.nn.Module)
#: Characters of another's error that are passed on: a sentence or two.
LONGEST_REASON = 300


class ImportModelError(LlmirError):
    """The framework cannot build the model."""


def build_on_meta(build: Callable[[], Model], failure: str) -> Model:
    """What ``build`` gives, its parameters on the meta device.

    ``failure`` says what went wrong if anything does: "vLLM cannot build LlamaForCausalLM for the model 'x'". Raises
    ImportModelError with it, UnsupportedLayerError where a layer cannot be built without weights, and whatever
    LlmirError ``build`` raises.
    """
    try:
        with torch.device("meta"):
            return build()
    except LlmirError:
        raise
    except Exception as error:
        if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
            raise UnsupportedLayerError(
                _failing_prefix(error),
                "building it needs numbers that only weights or ALiBi slopes have, and llmir reads models without them",
            ) from error
        raise ImportModelError(f"{failure}: {_one_line(error)}") from error


def _failing_prefix(error: BaseException) -> str:
    """The path of the layer that was being built: the innermost ``prefix`` that a model's code was given."""
    found = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        prefix = frame.f_locals.get("prefix")
        if isinstance(prefix, str) and prefix:
            found = prefix
    return found


def _one_line(error: BaseException) -> str:
    """An error's own words without its line breaks, at most a sentence or two of them."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."
