"""vLLM's door to llmir, the ``vllm.general_plugins`` entry point: ``--attention-backend LLMIR`` (or ``CUSTOM``).

vLLM loads plugins in every process it starts, whether or not anybody asked for llmir, so this file imports
nothing heavy, and what it wraps does exactly what it did before unless the flag is given.

Two things of vLLM's platform have to be wrapped. Which backend a layer gets: the CPU platform ignores the one that was
asked for, and those of CUDA and ROCm, which honour it, refuse without saying what else to do. And
``check_and_update_config``, which alone sees the whole configuration before anything is built from it: the one moment
to refuse a model, to make the plan, and to set the block size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "LLMIR"
#: The backend's classes by the device of vLLM's platform; ROCm's is called cuda too.
BACKEND_PATHS = {
    "cpu": "llmir.frontends.vllm.backend.LlmirAttentionBackend",
    "cuda": "llmir.frontends.vllm.gpu_backend.LlmirGpuAttentionBackend",
}


def register() -> None:
    """Make llmir's attention backend known to vLLM; called in each of its processes, any number of times."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # On other devices the name is known all the same, so that asking for it is answered with what llmir serves.
    path = BACKEND_PATHS.get(current_platform.device_type, BACKEND_PATHS["cpu"])
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        _add_member(AttentionBackendEnum, path)
        # Enum members pickle by value, and a new process unpickles its configuration before it loads plugins,
        # when the value is not there yet. So this one pickles as a call that registers it first.
        member = AttentionBackendEnum[BACKEND_NAME]
        member.__reduce_ex__ = _reduce_backend  # type: ignore[method-assign, assignment]
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():  # somebody else's CUSTOM stays theirs
        register_backend(custom, path)
    _wrap_platform(type(current_platform))


def _add_member(backends: Any, path: str) -> None:
    """Make BACKEND_NAME one of vLLM's backends, whose value is the path of the class."""
    if hasattr(backends, "register"):
        backends.register(BACKEND_NAME, path)
        return
    # vLLM had no names but its own and CUSTOM before it had register().
    member = object.__new__(backends)
    member._name_, member._value_ = BACKEND_NAME, path
    backends._member_map_[BACKEND_NAME] = backends._value2member_map_[path] = member
    backends._member_names_.append(BACKEND_NAME)


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
    return backend.name == BACKEND_NAME or (backend.name == "CUSTOM" and backend.get_path() in BACKEND_PATHS.values())


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
            if platform.device_type != "cuda":
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
