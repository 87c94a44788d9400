"""Building a framework's model classes without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from llmir.errors import LlmirError

Model = TypeVar("Model", bound=nn.Module)
#: Characters of another's error that are passed on: a sentence or two.
LONGEST_REASON = 300
#: What gives memory that holds no numbers yet, as weights are until they are loaded.
UNFILLED = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)


class ImportModelError(LlmirError):
    """The framework cannot build the model."""


def build_on_meta(build: Callable[[], Model], failure: str) -> Model:
    """What ``build`` gives, its parameters on the meta device; it is called again where that has no numbers for it.

    ``failure`` says what went wrong if anything does: "vLLM cannot build LlamaForCausalLM for the model 'x'". Raises
    ImportModelError with it, and whatever LlmirError ``build`` raises.
    """
    try:
        try:
            with torch.device("meta"):
                return build()
        except LlmirError:
            raise
        except Exception:  # it may compute with numbers of its own, such as ALiBi slopes
            with WeightsOnMeta():
                model = build()
            _move_to_meta(model)
            return model
    except LlmirError:
        raise
    except Exception as error:
        raise ImportModelError(f"{failure}: {one_line(error)}") from error


class WeightsOnMeta(TorchFunctionMode):
    """Within, memory that is not filled in yet is on the meta device, and numbers that are computed are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in UNFILLED:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _move_to_meta(model: nn.Module) -> None:
    """Parameters and buffers that hold numbers lose them; those that are shared stay shared."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to("meta"))


def one_line(error: BaseException) -> str:
    """An error's own words without its line breaks, at most a sentence or two of them."""
    words = " ".join(str(error).split())
    if " " not in words:  # a key that is missing, or nothing at all
        words = f"{type(error).__name__} {words}".rstrip()
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."
