"""From vLLM's configuration to llm IR, without weights.

vLLM's own model classes are built on the meta device, as one rank of them would be, and their forward pass is watched
once (``recording.py``). So the data flow in the IR is the model's own, and a model that vLLM composes of known layers
needs nothing here.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.vllm.recording import TOKENS, Recorder, attach
from llmir.frontends.vllm.support import model_facts
from llmir.ir import text
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.module import ModelInfo, decoder, new_module

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ImportModelError(LlmirError):
    """vLLM cannot build the model."""


def import_module(vllm_config: VllmConfig, rank: int = 0) -> ir.Module:
    """The model of a configuration as one llm module, for one tensor-parallel rank, all pipeline stages together.

    Raises UnsupportedLayerError for a layer llmir does not know, ImportModelError where vLLM cannot build the model.
    """
    config = _view(vllm_config)
    facts = model_facts(config)
    info = ModelInfo(**{**facts, "rank": rank})
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config), _one_rank(config, rank), _own_rotary_embeddings():
        model = _build(config)
        with context(), ir.Location.unknown():
            module = new_module(info)
            _record(model, module)
            text.verify(module)
            return module


def _record(model: Any, module: ir.Module) -> None:
    """Run the model's forward pass once and write it into the module."""
    from llmir.frontends.vllm.layers import HANDLERS

    with decoder(module) as d:
        recorder = Recorder(model, d)
        attach(model, recorder, HANDLERS)
        ids, positions = (torch.empty(TOKENS, dtype=torch.int64, device="meta") for _ in range(2))
        recorder.set(ids, d.input_ids)
        recorder.set(positions, d.positions)
        with torch.no_grad(), recorder:
            hidden = model(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
            if isinstance(hidden, tuple):  # hidden states that a drafter would read come along
                hidden = hidden[0]
            logits = model.compute_logits(hidden)
        d.output(recorder.value(logits))


def _view(vllm_config: VllmConfig) -> VllmConfig:
    """A copy to build the model from: one rank, uncompiled, with vLLM's own attention, which keeps its arguments."""
    from vllm.config import CompilationMode

    view = copy.copy(vllm_config)
    view.compilation_config = copy.copy(vllm_config.compilation_config)
    view.compilation_config.static_forward_context = {}
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


def _build(config: VllmConfig) -> torch.nn.Module:
    """vLLM's model object with its parameters on the meta device."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolves the dtype before any plugin sees the configuration"
    try:
        with set_default_torch_dtype(dtype), torch.device("meta"):
            return initialize_model(config)
    except NotImplementedError as error:
        if "meta tensor" not in str(error):
            raise
        raise UnsupportedLayerError(
            _failing_prefix(error),
            "building it needs numbers that only weights or ALiBi slopes have, and llmir reads models without them",
        ) from error
    except Exception as error:
        raise ImportModelError(
            f"vLLM cannot build {config.model_config.architectures[0]} for the model "
            f"{config.model_config.model!r}: {_one_line(error)}"
        ) from error


def _failing_prefix(error: BaseException) -> str:
    """The path of the layer that was being built: the innermost ``prefix`` that a model's code was given."""
    found = "the model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        prefix = frame.f_locals.get("prefix")
        if isinstance(prefix, str) and prefix:
            found = prefix
    return found


def _one_line(error: BaseException) -> str:
    """An error's own words without its line breaks, at most a sentence or two of them."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "..."
