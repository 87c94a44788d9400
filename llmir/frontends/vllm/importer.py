"""From vLLM's configuration to llm IR, without weights.

vLLM's own model classes are built on the meta device, as one rank of them would be, and their forward pass is watched
once (``frontends/common/watching.py``). So the data flow in the IR is the model's own, and a model that vLLM composes
of known layers needs nothing here, and of a layer that llmir does not know its name is enough.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.building import build_on_meta
from llmir.frontends.common.layers import recorded_sum
from llmir.frontends.common.levels import import_watched
from llmir.frontends.common.recording import TOKENS
from llmir.frontends.common.support import class_name, nothing_to_do, refuse_layers
from llmir.frontends.common.watching import Layers
from llmir.frontends.vllm.support import check_attention, model_facts
from llmir.ir.bindings import ir
from llmir.ir.module import ModelInfo
from llmir.targets.machine import Target

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def import_module(vllm_config: VllmConfig, rank: int = 0, *, isa: str | None = None) -> ir.Module:
    """The model of a configuration as one llm module, for one tensor-parallel rank, all pipeline stages together.

    ``isa``: of the target whose kernels the module is for, which need not be this machine's; its processor's if not
    given. Raises UnsupportedLayerError for attention layers that the target has no kernel for, UnsupportedFeatureError
    for a model that has none at all, ImportModelError where vLLM cannot build the model.
    """
    isa = isa or Target.detect().isa
    config = _view(vllm_config)
    facts = model_facts(config, isa)
    info = ModelInfo(**{**facts, "rank": rank})
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    from llmir.frontends.vllm.layers import HANDLERS, describe
    from llmir.frontends.vllm.recorded_attention import recorded_attention

    with set_current_vllm_config(config), _one_rank(config, rank), _own_rotary_embeddings():
        with recorded_attention():
            model = _build(config)
        attention = attention_layers(config)
        if not attention:
            raise nothing_to_do(config.model_config.model, "LLMIR", "vLLM")
        refuse_layers(attention, lambda name, layer: _check(name, layer, config, isa))

        def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden = model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
            if isinstance(hidden, tuple):  # hidden states that a drafter would read come along
                hidden = hidden[0]
            if config.model_config.runner_type == "pooling":
                return hidden
            return model.compute_logits(hidden)

        with set_forward_context(None, config, num_tokens=TOKENS):
            return import_watched(
                model,
                info,
                Layers(HANDLERS, attention, _is_one),
                forward,
                lambda name: describe(attention[name], model),
            )


def attention_layers(config: VllmConfig) -> dict[str, Any]:
    """The layers of a model, built with ``config``, that keep keys and values, as vLLM registers them by name."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    layers = config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase) and not isinstance(layer, MambaBase)
    }


def _check(name: str, layer: Any, config: VllmConfig, isa: str) -> None:
    """Raise UnsupportedLayerError if no llmir kernel of the target computes this layer of :func:`attention_layers`."""
    from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention

    if type(layer) not in (Attention, EncoderOnlyAttention):
        raise UnsupportedLayerError(
            name, f"it is of another kind of attention than kernels are for ({class_name(layer)})"
        )
    check_attention(name, layer, config.model_config.dtype, config.cache_config.block_size, isa)


def _is_one(module: Any) -> bool:
    """Whether a module is one layer: it keeps a state of its own, or routes tokens to experts."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    return hasattr(module, "get_kv_cache_spec") or isinstance(module, MoERunnerInterface)


def _view(vllm_config: VllmConfig) -> VllmConfig:
    """A copy to build the model from: one rank, uncompiled, and not asked for llmir."""
    from vllm.config import CompilationMode

    view = copy.copy(vllm_config)
    view.compilation_config = copy.copy(vllm_config.compilation_config)
    view.compilation_config.mode = CompilationMode.NONE
    view.attention_config = copy.copy(vllm_config.attention_config)
    view.attention_config.backend = None
    view.parallel_config = copy.copy(vllm_config.parallel_config)
    view.parallel_config.data_parallel_size = 1
    view.parallel_config.pipeline_parallel_size = 1
    view.cache_config = copy.copy(vllm_config.cache_config)
    return view


@contextmanager
def _one_rank(config: VllmConfig, rank: int) -> Iterator[None]:
    """Process groups as rank ``rank`` of the tensor-parallel group sees them, in a process that is alone."""
    from torch import distributed
    from vllm.distributed import parallel_state

    if distributed.is_initialized():
        raise RuntimeError("import_module needs a process without process groups; run it in a child process")
    # vLLM joins a group that is there; one on a store in memory needs no port and no file.
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        group = parallel_state.get_tp_group()
        group.world_size, group.rank_in_group = config.parallel_config.tensor_parallel_size, rank
        vars(group)["all_reduce"] = recorded_sum(group.world_size)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@contextmanager
def _own_rotary_embeddings() -> Iterator[None]:
    """vLLM shares rotary embeddings among all models of a process; ours are empty and must not reach a real one."""
    from vllm.model_executor.layers import rotary_embedding

    shared = rotary_embedding._ROPE_DICT
    kept = dict(shared)
    shared.clear()
    try:
        yield
    finally:
        shared.clear()
        shared.update(kept)


def _build(config: VllmConfig) -> Any:
    """vLLM's model object with its parameters on the meta device."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolves the dtype before any plugin sees the configuration"
    what = f"vLLM cannot build {config.model_config.architectures[0]} for the model {config.model_config.model!r}"

    def build() -> Any:
        # Where layers register themselves, each of them once.
        config.compilation_config.static_forward_context = {}
        config.compilation_config.static_all_moe_layers = []
        return initialize_model(config)

    with set_default_torch_dtype(dtype):
        return build_on_meta(build, what)
