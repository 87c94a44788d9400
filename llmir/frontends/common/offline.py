"""What ``llmir compile`` and its like do with a model before a framework looks at it."""

from __future__ import annotations

from pathlib import Path

from llmir.errors import LlmirError


class ModelError(LlmirError):
    """There is no such model, or the framework cannot read its configuration."""


def check_folder(model: str) -> None:
    """Raise ModelError for what can only be a folder and is none, before a framework asks a model hub for it."""
    path = Path(model)
    only_a_path = path.is_absolute() or model.startswith((".", "~")) or len(path.parts) != 2
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "params.json")):
            raise ModelError(f"folder {model!r} holds no model: it has no config.json")
    elif only_a_path or path.exists():
        raise ModelError(f"no such model: {model!r} is no folder; give the folder of a model, or a name on a model hub")


def not_configurable(framework: str, model: str, error: Exception) -> ModelError:
    """The error to raise where ``framework`` cannot configure ``model`` and said so with ``error``."""
    return ModelError(
        f"{framework} cannot configure model {model!r} ({_reason(error)}): check the name, or give the folder that "
        f"holds its config.json"
    )


def _reason(error: Exception) -> str:
    """The first line of an error that says something, without the frame around it of who checked a configuration."""
    text = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    lines = [line.strip() for line in text.removeprefix("Value error, ").split("\n")]
    return next((line for line in lines if line and line[-1] != ":"), type(error).__name__).rstrip(".")
