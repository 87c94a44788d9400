"""From a model's name to its module without serving it: what ``llmir compile`` asks of this frontend."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmir.errors import LlmirError
from llmir.frontends.common.offline import check_folder, not_configurable
from llmir.targets.machine import Target
from llmir.targets.registry import is_gpu

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def import_model(model: str, target: Target | None = None, **engine_args: Any) -> Any:
    """The MLIR module of ``model``, a folder or a name vLLM knows, configured as vLLM does without any flags.

    ``target``: the machine whose kernels it is for, this one's processor if not given; a GPU need not be there.
    ``engine_args`` over vLLM's defaults, such as ``kv_cache_dtype="fp8"``. Reads no weights. Raises LlmirError:
    ModelError where vLLM cannot configure the model, and what the importer raises for a model that llmir cannot serve.
    """
    target = target or Target.detect()
    config = configure(model, **engine_args)
    from llmir.frontends.vllm import support
    from llmir.frontends.vllm.importer import import_module
    from llmir.frontends.vllm.versions import VERSIONS

    VERSIONS.check("gpu" if is_gpu(target.isa) else "cpu")
    support.check_config(config, target.isa)
    return import_module(config, isa=target.isa)


def configure(model: str, **engine_args: Any) -> VllmConfig:
    """vLLM's configuration of ``model``, with ``engine_args`` over vLLM's defaults; raises ModelError."""
    check_folder(model)
    # vLLM logs to stdout, where a command's result goes; both are read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise LlmirError(f"vLLM cannot be imported ({error}): `llmir check` says what to install") from error
    try:
        return EngineArgs(model=model, **{"load_format": "dummy", **engine_args}).create_engine_config()
    except LlmirError:
        raise
    except Exception as error:  # whatever a configuration is checked by, it is the framework that cannot read it
        raise not_configurable("vLLM", model, error) from error
