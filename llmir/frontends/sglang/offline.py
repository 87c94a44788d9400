"""From a model's name to its module without serving it: what ``llmir compile`` asks of this frontend."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from llmir.errors import LlmirError
from llmir.frontends.common.offline import check_folder, not_configurable
from llmir.frontends.sglang import reading
from llmir.frontends.sglang.versions import VERSIONS
from llmir.targets.machine import Target
from llmir.targets.registry import is_gpu


def import_model(model: str, target: Target | None = None, **server_args: Any) -> Any:
    """The MLIR module of ``model``, a folder or a name SGLang knows, configured as SGLang does without any flags.

    ``target``: the machine whose kernels it is for, this one's processor if not given; a GPU need not be there.
    ``server_args`` over SGLang's defaults, such as ``kv_cache_dtype="fp8_e4m3"``. Reads no weights. Raises LlmirError:
    ModelError where SGLang cannot configure the model, and what the importer raises for what llmir cannot serve.
    """
    with contextlib.redirect_stdout(sys.stderr), reading.as_on_a_cpu():  # stdout is where a command's result goes
        return _import_model(model, target or Target.detect(), server_args)


def _import_model(model: str, target: Target, fields: dict[str, Any]) -> Any:
    check_folder(model)
    try:
        from llmir.frontends.sglang import importer, support
    except ImportError as error:
        raise LlmirError(f"SGLang cannot be imported ({error}): `llmir check` says what to install") from error
    VERSIONS.check("gpu" if is_gpu(target.isa) else "cpu")
    from sglang.srt.arg_groups.model_override_base import model_config_of

    fields = {"device": "cuda" if is_gpu(target.isa) else "cpu", "skip_tokenizer_init": True, **fields}
    try:
        server_args = importer.configure(model_path=model, **fields)
    except LlmirError:
        raise
    except Exception as error:  # whatever arguments are checked by, it is the framework that cannot read them
        raise not_configurable("SGLang", model, error) from error
    support.check_arguments(importer.AsGiven(server_args), model_config_of(server_args), target.isa)
    return importer.import_module(server_args, isa=target.isa)
