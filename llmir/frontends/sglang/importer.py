"""From SGLang's server arguments to llm IR, without weights.

SGLang's own model classes are built on the meta device, as one rank of them would be, and their forward pass is
watched once (``frontends/common/watching.py``). So the data flow in the IR is the model's own, and a model that
SGLang composes of known layers needs nothing here, and of a layer that llmir does not know its name is enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs

from llmir.frontends.common.building import build_on_meta
from llmir.frontends.common.layers import recorded_sum
from llmir.frontends.common.levels import import_watched
from llmir.frontends.common.support import nothing_to_do, refuse_layers
from llmir.frontends.common.watching import Layers
from llmir.frontends.sglang import support
from llmir.ir.bindings import ir
from llmir.ir.module import ModelInfo
from llmir.targets.machine import Target


def configure(**fields: Any) -> ServerArgs:
    """Server arguments to read a whole model with: ``fields`` as a user gave them, but without llmir and weights.

    Pipeline stages have layers of one model, so they share its plan. With ``device="cuda"`` this describes serving on a
    GPU; none is needed.
    """
    plain = {"attention_backend": "torch_native", "prefill_attention_backend": None, "decode_attention_backend": None}
    server_args = ServerArgs(**{"device": "cpu", **fields, **plain, "load_format": "dummy", "pp_size": 1})
    server_args.resolve_once()
    return server_args


def import_module(server_args: ServerArgs, rank: int = 0, *, isa: str | None = None) -> ir.Module:
    """The model of resolved server arguments as one llm module, for one tensor-parallel rank.

    ``isa``: of the target whose kernels the module is for; this machine's processor's if not given. Raises
    UnsupportedLayerError for attention layers that no kernel computes, UnsupportedFeatureError for a model that has
    none at all, ImportModelError where SGLang cannot build the model.
    """
    args, config = AsGiven(server_args), model_config_of(server_args)
    info = ModelInfo(**{**support.model_facts(args, config), "rank": rank})
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    from llmir.frontends.sglang.layers import AttentionOptions

    with _one_rank(server_args, args.tp_size, rank):
        model = _build(config, args)
        options = AttentionOptions(
            dtype=config.dtype,
            page_size=info.allowed_block_sizes[0],
            max_length=config.context_len,
            isa=isa or Target.detect().isa,
            quantized=support.quantizes(args),
        )
        attention = {path: module for path, module in model.named_modules() if isinstance(module, RadixAttention)}
        if not attention:
            raise nothing_to_do(args.model_path, "llmir", "SGLang")
        refuse_layers(attention, options.check)
        support.check_model(model, config)

        layers = Layers(options.handlers(), attention)

        def forward(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            _watch_native_calls(model, layers.handlers)
            # There is no pool of keys and values: who asks for one learns that he writes none into it himself.
            batch = _batch(ids, positions)
            if getattr(model, "is_mrope_enabled", False):  # a position in time, height and width: one for text
                batch.mrope_positions = positions.expand(3, -1)
            with forward_context(ForwardContext(attn_backend=SimpleNamespace(token_to_kv_pool=None))):
                return model.forward(ids, positions, batch)

        return import_watched(model, info, layers, forward, lambda name: options.describe(attention[name]))


class AsGiven:
    """Server arguments as resolved, but for the page size: resolution fills one in where the user gave none."""

    def __init__(self, server_args: ServerArgs):
        self._view = resolving_view(server_args)
        self.page_size = server_args.page_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


@contextmanager
def _one_rank(server_args: ServerArgs, tp_size: int, rank: int) -> Iterator[None]:
    """Published arguments and process groups as rank ``rank`` sees them, in a process that is alone."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish, reset_context
    from torch import distributed

    if distributed.is_initialized():
        raise RuntimeError("import_module needs a process without process groups; run it in a child process")
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    # SGLang joins a group that is there; one on a store in memory needs no port and no file.
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = get_parallel()
        with parallel.override(tp_size=1, attn_tp_size=1, moe_tp_size=1, tp_rank=0, attn_tp_rank=0, moe_tp_rank=0):
            parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
            parallel_state.initialize_model_parallel(backend="gloo")
        for group in (parallel.tp_group, parallel.attn_tp_group):
            group.world_size, group.rank_in_group = tp_size, rank
            group.all_reduce = recorded_sum(tp_size)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        reset_context()


def _build(config: Any, args: Any) -> torch.nn.Module:
    """SGLang's model object with its parameters on the meta device; head counts padded where its CPU ranks do."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    load_config = LoadConfig()

    def build_model() -> torch.nn.Module:
        with set_default_torch_dtype(config.dtype):
            padded = config
            if not support.on_gpu(args):
                padded = adjust_config_with_unaligned_cpu_tp(config, load_config, args.tp_size)
            return _initialize_model(padded, load_config, _get_quantization_config(padded, load_config))

    bootstrap.init_layer_runtime(model_config=config)
    architecture = (config.hf_config.architectures or ["a model without a class"])[0]
    return build_on_meta(build_model, f"SGLang cannot build {architecture} for the model {args.model_path!r}")


def _watch_native_calls(model: torch.nn.Module, handlers: Collection[type]) -> None:
    """Some models call a layer's ``forward_native``, its plain PyTorch, directly; that is a call of the layer too."""
    for module in model.modules():
        if type(module) in handlers and hasattr(module, "forward_native"):
            vars(module)["forward_native"] = module.forward


def _batch(ids: torch.Tensor, positions: torch.Tensor) -> Any:
    """What SGLang's models get with their tokens: one prompt, all of it new."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    count = torch.tensor([len(ids)])
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=ids,
        req_pool_indices=torch.zeros(1, dtype=torch.int64),
        seq_lens=count,
        seq_lens_cpu=count,
        seq_lens_sum=len(ids),
        out_cache_loc=torch.empty_like(ids),
        positions=positions,
        extend_num_tokens=len(ids),
        extend_seq_lens=count,
        extend_prefix_lens=torch.zeros_like(count),
    )
