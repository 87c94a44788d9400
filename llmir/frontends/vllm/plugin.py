"""vLLM's door to llmir, the ``vllm.general_plugins`` entry point: ``--attention-backend LLMIR`` (or ``CUSTOM``).

vLLM loads plugins in every process it starts, whether or not anybody asked for llmir, so this file imports
nothing heavy, and what it wraps does exactly what it did before unless the flag is given.

Two things of vLLM have to be wrapped. Its CPU platform ignores the attention backend that was asked for, and only
``check_and_update_config`` sees the whole configuration before anything is built from it: the one moment to refuse
a model, to make the plan, and to set the block size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "LLMIR"
BACKEND_PATH = "llmir.frontends.vllm.backend.LlmirAttentionBackend"


def register() -> None:
    """Make llmir's attention backend known to vLLM; called in each of its processes, any number of times."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
        # Enum members pickle by value, and a new process unpickles its configuration before it loads plugins,
        # when the value is not there yet. So this one pickles as a call that registers it first.
        member = AttentionBackendEnum[BACKEND_NAME]
        member.__reduce_ex__ = _reduce_backend  # type: ignore[method-assign, assignment]
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():  # somebody else's CUSTOM stays theirs
        register_backend(custom, BACKEND_PATH)
    _wrap_platform(type(current_platform))


def _reduce_backend(protocol: object) -> tuple[Any, ...]:
    return _unpickle_backend, ()


def _unpickle_backend() -> AttentionBackendEnum:
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND_NAME]


def is_llmir(backend: AttentionBackendEnum | None) -> bool:
    """Whether a selected attention backend is llmir's, under either of its names."""
    if backend is None:
        return False
    return backend.name == BACKEND_NAME or (backend.name == "CUSTOM" and backend.get_path() == BACKEND_PATH)


def _wrap_platform(platform: type[Any]) -> None:
    """Let a platform honour llmir's backend; everything else goes to what the platform had."""
    if "_llmir_wrapped" in vars(platform):
        return
    select_backend = platform.get_attn_backend_cls.__func__
    update_config = platform.check_and_update_config.__func__

    @functools.wraps(select_backend)
    def get_attn_backend_cls(
        cls: type[Any], selected_backend: AttentionBackendEnum, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if is_llmir(selected_backend):
            from llmir.frontends.vllm.support import check_selection

            check_selection(attn_selector_config)
            return selected_backend.get_path()
        return select_backend(cls, selected_backend, attn_selector_config, num_heads)

    @functools.wraps(update_config)
    def check_and_update_config(cls: type[Any], vllm_config: VllmConfig) -> None:
        update_config(cls, vllm_config)
        attention = vllm_config.attention_config
        if is_llmir(attention.backend) or any(map(is_llmir, attention.backend_per_kind.values())):
            from llmir.frontends.vllm.planning import prepare

            prepare(vllm_config)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform.check_and_update_config = classmethod(check_and_update_config)
    platform._llmir_wrapped = True
