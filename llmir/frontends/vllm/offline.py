"""From a model's name to its module without serving it: what ``llmir compile`` asks of this frontend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmir.errors import LlmirError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ModelError(LlmirError):
    """There is no such model, or vLLM cannot read its configuration."""


def import_model(model: str) -> Any:
    """The MLIR module of ``model``, a folder or a name vLLM knows, configured as vLLM does without any flags.

    Reads no weights. Raises LlmirError: ModelError where vLLM cannot configure the model, and what the importer
    raises for a model that llmir cannot serve.
    """
    config = configure(model)
    from llmir.frontends.vllm import support
    from llmir.frontends.vllm.importer import import_module

    support.check_config(config)
    return import_module(config)


def configure(model: str, **engine_args: Any) -> VllmConfig:
    """vLLM's configuration of ``model``, with ``engine_args`` over vLLM's defaults; raises ModelError."""
    _check_folder(model)
    # vLLM logs to stdout, where a command's result goes; both are read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise LlmirError(f"vLLM cannot be imported ({error}): `llmir check` says what to install") from error
    try:
        return EngineArgs(model=model, **{"load_format": "dummy", **engine_args}).create_engine_config()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"vLLM cannot configure model {model!r} ({_reason(error)}): check the name, or give the folder that "
            f"holds its config.json"
        ) from error


def _check_folder(model: str) -> None:
    """Raise ModelError for what can only be a folder and is none, before vLLM asks a model hub for it."""
    path = Path(model)
    only_a_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) != 2
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "params.json")):
            raise ModelError(f"folder {model!r} holds no model: it has no config.json")
    elif only_a_path or path.exists():
        raise ModelError(f"no such model: {model!r} is no folder; give the folder of a model, or a name on a model hub")


def _reason(error: Exception) -> str:
    """The first line of an error that says something, without pydantic's frame around it."""
    text = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    return text.removeprefix("Value error, ").split("\n")[0].rstrip(".")
