"""SGLang's door to llmir, the ``sglang.srt.plugins`` entry point: ``--attention-backend llmir``.

SGLang loads plugins in every process it starts, whether or not anybody asked for llmir, so this file imports nothing
heavy, and what it registers does nothing unless the flag is given. SGLang logs a plugin that fails and goes on; so a
failure is kept here and raised when llmir is asked for.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llmir.errors import LlmirError

BACKEND_NAME = "llmir"
#: The step of SGLang's argument resolution after which the attention backend is known and the page size is not.
RESOLUTION_STEP = "handle_attention_backend_compatibility"
#: What ``sys.argv`` begins with under SGLang's own commands.
LAUNCHERS = ("launch_server.py", "sglang")
POOL_HOOK = "sglang.srt.platforms.interface.SRTPlatform.get_kv_pool_cls"

logger = logging.getLogger("sglang.llmir")


class RegistrationError(LlmirError):
    """SGLang has not the plugin interface that llmir is written to."""


def register() -> None:
    """Make llmir's attention backend known to SGLang; called in each of its processes."""
    try:
        _register()
    except Exception as error:
        _report(error)


def _register() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND_NAME in choices.ATTENTION_BACKEND_CHOICES:
        return
    register_attention_backend(BACKEND_NAME)(_backend)
    register_resolution_hook(RESOLUTION_STEP)(_resolve)
    HookRegistry.register(POOL_HOOK, _pool, HookType.AFTER)
    choices.add_attention_backend_choices([BACKEND_NAME])


def is_asked_for(server_args: Any) -> bool:
    """Whether any phase of these server arguments, as far as they are resolved, is to use llmir."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    return BACKEND_NAME in (view.attention_backend, view.prefill_attention_backend, view.decode_attention_backend)


def _resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's own step, then llmir's: refuse, or plan and decide the page size."""
    previous(server_args)
    if is_asked_for(server_args):
        from llmir.frontends.sglang.planning import prepare

        try:
            prepare(server_args)
        except LlmirError as error:
            if Path(sys.argv[0]).name in LAUNCHERS:  # a person at a shell, to whom no traceback says more
                raise SystemExit(f"error: {error}") from error
            raise


def _pool(pool_class: type | None, platform: Any, *, kind: str) -> type | None:
    """llmir's KV pool where llmir serves; else whatever the platform had."""
    from sglang.srt.runtime_context import get_server_args

    if kind != "mha" or not is_asked_for(get_server_args()):
        return pool_class
    from llmir.frontends.sglang.pool import LlmirKVPool

    return LlmirKVPool


def _backend(runner: Any) -> Any:
    """The backend for the device that a model runner is on."""
    if runner.device == "cuda":  # ROCm's devices go by this name too
        from llmir.frontends.sglang.gpu_backend import LlmirGpuBackend

        return LlmirGpuBackend(runner)
    from llmir.frontends.sglang.backend import LlmirAttentionBackend

    return LlmirAttentionBackend(runner)


def _report(error: Exception) -> None:
    """Say that llmir is not there; stop, where the command line asks for it."""
    message = (
        f"llmir could not register with this SGLang ({type(error).__name__}: {error}): it is written to SGLang 0.5.23; "
        f"`llmir check` says what is installed"
    )
    if _command_line_asks():
        # Not an Exception: SGLang would log that and go on without llmir.
        raise SystemExit(message) from error
    logger.error(message)
    _refuse_by_factory(message)


def _command_line_asks() -> bool:
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    pairs = itertools.pairwise(words)
    return any(word.endswith("attention-backend") and after == BACKEND_NAME for word, after in pairs)


def _refuse_by_factory(message: str) -> None:
    """Where the engine is started from Python: asking for llmir raises what went wrong, not an unknown name."""

    def refuse(runner: Any) -> NoReturn:
        raise RegistrationError(message)

    try:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    except ImportError:
        return  # nothing of SGLang's that llmir knows is left; SGLang names the unknown backend itself
    ATTENTION_BACKENDS[BACKEND_NAME] = refuse
