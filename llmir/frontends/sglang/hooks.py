"""What llmir changes in SGLang's own functions, in the processes where it serves, through SGLang's hook registry.

Both are about what SGLang does on GPUs alone: its models may write the KV cache in the kernel that turns keys by their
position, and a replayed CUDA graph is announced without the ids of its requests.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from llmir.errors import LlmirError
from llmir.frontends.common.support import UnsupportedFeatureError

_MODELS = "sglang.srt.models.utils"
_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"


@functools.cache
def keep_models_from_the_cache() -> None:
    """Let models leave the KV cache to the attention backend: they know SGLang's layout, not that of llmir's pages.

    Raises LlmirError where SGLang has not the functions by which its models decide that.
    """
    from sglang.srt.models import utils

    HookRegistry.register(f"{_MODELS}.enable_fused_set_kv_buffer", _never, HookType.REPLACE)
    HookRegistry.register(f"{_MODELS}.create_fused_set_kv_buffer_arg", _refuse, HookType.REPLACE)
    HookRegistry.apply_hooks()  # reaches modules that have imported them already; logs what fails
    if utils.enable_fused_set_kv_buffer(None) is not False:
        raise LlmirError(f"SGLang's models cannot be kept from writing the KV cache themselves ({_MODELS} is another)")


@functools.cache
def name_replayed_requests() -> None:
    """Let the view of a batch that a CUDA graph is replayed for carry ``rids``, as ForwardBatch does."""
    HookRegistry.register(f"{_RUNNER}.build_replay_fb_view", _with_request_ids, HookType.AFTER)
    HookRegistry.apply_hooks()


def _never(forward_batch: Any) -> bool:
    return False


def _refuse(value: Any, layer: Any, forward_batch: Any) -> NoReturn:
    raise UnsupportedFeatureError(
        f"the model writes the KV cache of layer {layer.layer_id} itself, in SGLang's layout, which llmir's is not; "
        f"leave out --attention-backend llmir"
    )


def _with_request_ids(view: Any, *args: Any, **arguments: Any) -> Any:
    batch = arguments["forward_batch"] if "forward_batch" in arguments else args[0]
    view.rids = batch.rids
    return view
