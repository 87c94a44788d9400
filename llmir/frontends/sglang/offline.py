"""From a model's name to its module without serving it: what ``llmir compile`` asks of this frontend."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from llmir.errors import LlmirError
from llmir.frontends.common.offline import check_folder, not_configurable


def import_model(model: str) -> Any:
    """The MLIR module of ``model``, a folder or a name SGLang knows, configured as SGLang does without any flags.

    Reads no weights. Raises LlmirError: ModelError where SGLang cannot configure the model, and what the importer
    raises for a model that llmir cannot serve.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is where a command's result goes
        return _import_model(model)


def _import_model(model: str) -> Any:
    check_folder(model)
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # read when SGLang is imported
    try:
        from llmir.frontends.sglang import importer, support
    except ImportError as error:
        raise LlmirError(f"SGLang cannot be imported ({error}): `llmir check` says what to install") from error
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    try:
        server_args = importer.configure(model_path=model, skip_tokenizer_init=True)
    except (OSError, ValueError, AssertionError) as error:
        raise not_configurable("SGLang", model, error) from error
    support.check_arguments(resolving_view(server_args), model_config_of(server_args))
    return importer.import_module(server_args)
