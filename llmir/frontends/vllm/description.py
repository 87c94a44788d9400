"""What llmir's two backends, for CPUs and for GPUs, have in common: what vLLM asks of them before it serves.

The plan comes with vLLM's configuration (``additional_config["llmir_plan"]``, put there before the engine started), so
this works the same in every process vLLM starts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.attention import Attention
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.agreement import check_agreement
from llmir.frontends.common.support import dtype_name
from llmir.frontends.common.tensors import LayerTensors, torch_dtype
from llmir.frontends.vllm.planning import PLAN_KEY
from llmir.frontends.vllm.plugin import BACKEND_NAME, is_llmir
from llmir.frontends.vllm.support import CACHE_DTYPES
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import BY_TORCH
from llmir.plan import Plan
from llmir.runtime.layers import PlannedLayers
from llmir.targets.registry import head_sizes

#: As which vLLM allocates a cache of eight-bit floats.
QUANTIZED_DTYPES = (torch.uint8, torch.float8_e4m3fn)


def plan_of(vllm_config: VllmConfig) -> Plan:
    """The plan that travels with ``vllm_config``; parsed once a configuration."""
    additional = vllm_config.additional_config
    plan = additional.get(PLAN_KEY) if isinstance(additional, dict) else None
    if plan is None:
        raise UnsupportedLayerError("all", "vLLM's configuration carries no llmir plan; is the llmir plugin disabled?")
    key = id(plan)
    if key not in _parsed_plans:
        _parsed_plans[key] = (plan, Plan.from_json(plan))
    return _parsed_plans[key][1]


#: Parsed plans by the identity of their JSON, which is kept alive beside them.
_parsed_plans: dict[int, tuple[Any, Plan]] = {}


class PlannedBackend(AttentionBackend):
    """A backend whose kernels come with a plan."""

    forward_includes_kv_cache_update: bool = True
    #: Tokens that the blocks of any plan for the device are a multiple of.
    block_size_step: int
    on_gpu: bool

    @staticmethod
    def get_name() -> str:
        """The name of the backend selected: LLMIR, or CUSTOM where the user spelled it so."""
        config = get_current_vllm_config_or_none()
        backend = config.attention_config.backend if config is not None else None
        return backend.name if backend is not None and is_llmir(backend) else BACKEND_NAME

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:  # type: ignore[override]
        """The block size that the kernels of the engine that asks were compiled for.

        Where vLLM asks without a configuration, about a layer's cache, that cache has the engine's block size.
        """
        config = get_current_vllm_config_or_none()
        if config is not None:
            return [plan_of(config).block_size]
        if kv_cache_spec is not None:
            return [kv_cache_spec.block_size]
        return [MultipleOf(cls.block_size_step)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes there are kernel generators for."""
        return head_sizes(on_gpu=cls.on_gpu)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Pages of one KV head are contiguous: [blocks, KV heads, page]. Asked by the vLLM that has layouts."""
        return (kv_cache_interface.KVCacheLayout.LBHNC,)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """The same pages, to a vLLM before it had layouts; without an order of strides they lie as the shape says."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are compiled into the kernels."""
        return True


def _with_its_configuration(get_kv_cache_spec: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's method that asks its backend for block sizes, with the configuration that it got current.

    vLLM before 0.32 asks without saying for which cache.
    """

    @functools.wraps(get_kv_cache_spec)
    def wrapped(self: Attention, vllm_config: VllmConfig) -> Any:
        with set_current_vllm_config(vllm_config):
            return get_kv_cache_spec(self, vllm_config)

    return wrapped


Attention.get_kv_cache_spec = _with_its_configuration(Attention.get_kv_cache_spec)  # type: ignore[method-assign]


def bind_layers(planned: PlannedLayers[Any], builder: Any, logger: logging.Logger) -> None:
    """Give each layer of a metadata builder its kernel.

    Called while vLLM sets up its caches, so that what cannot be served is refused before serving.
    """
    config = builder.vllm_config
    if config.parallel_config.world_size > 1:
        check_agreement(plan_of(config), _from_all_ranks, logger)
    layers = config.compilation_config.static_forward_context
    for name in builder.layer_names:
        layer = layers[name]
        assert isinstance(layer, Attention) and isinstance(layer.impl, PlannedImpl)
        layer.impl.bind(name, builder.kv_cache_spec, config.model_config.dtype, planned)
    for symbol, count in planned.kernels.items():
        logger.info("llmir: %s serves %d layers", symbol, count)


def _from_all_ranks(own: Any) -> list[Any]:
    """What every rank gives."""
    world = get_world_group()
    everyone: list[Any] = [None] * world.world_size
    torch.distributed.all_gather_object(everyone, own, group=world.cpu_group)
    return everyone


def check_batch(layer: str, batch: CommonAttentionMetadata) -> None:
    """Raise UnsupportedLayerError, with a ``layer`` of the group, for a batch that no kernel computes."""
    if batch.causal is not True:
        raise UnsupportedLayerError(layer, "a step asks for attention that is not causal")
    if batch.block_table_tensor.dtype != torch.int32 or batch.block_table_tensor.stride(1) != 1:
        raise UnsupportedLayerError(layer, "vLLM's block table is not one of int32 rows")


class PlannedImpl(AttentionImpl[Any]):
    """One attention layer: what vLLM says of it, to be compared with the plan's."""

    #: vLLM's names of the cache dtypes that keep 8-bit floats, which the device's kernels know.
    quantized_dtypes: tuple[str, ...] = ()
    _runner: Any = None
    _layer: str
    #: What the layer's kernel takes its tensors to be, once its cache is known.
    _tensors: LayerTensors

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks: torch.Tensor | None = extra.get("sinks")
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32, device="cpu")
        further = sorted(name for name, value in extra.items() if value is not None and name != "sinks")
        # What a spec says is compared with the plan's.
        refused = {
            f"its attention type is {attn_type}, and llmir serves decoders": attn_type != AttentionType.DECODER,
            f"its KV cache is of {kv_cache_dtype}, which has no kernel": (
                kv_cache_dtype not in (*CACHE_DTYPES, *self.quantized_dtypes)
            ),
            f"it needs {further}": bool(further),
        }
        self._refusal = next((reason for reason, applies in refused.items() if applies), None)

    def bind(
        self, layer: str, kv_cache_spec: kv_cache_interface.AttentionSpec, model_dtype: Any, planned: PlannedLayers[Any]
    ) -> None:
        """Take the layer's kernel from the plan; UnsupportedLayerError where that is not the layer's."""
        for name, numbers in {"sinks": self.sinks, "ALiBi slopes": self.slopes}.items():
            if numbers is not None and (numbers.shape != (self.num_heads,) or not numbers.is_contiguous()):
                found = list(numbers.shape)
                raise UnsupportedLayerError(layer, f"its {name} are {found}, not one for each of its heads")
        self._layer = layer
        self._runner = planned.bind(layer, self.spec(layer, kv_cache_spec, model_dtype))

    def take_cache(self, kv_cache: torch.Tensor) -> None:
        """Check a cache that the layer is called with for the first time; what it is called with goes by it."""
        attention = self._runner.spec.attention
        check_cache(self._layer, kv_cache, attention)
        self._tensors = LayerTensors(self._layer, attention, kv_cache.device)

    def spec(self, layer: str, kv_cache_spec: kv_cache_interface.AttentionSpec, model_dtype: Any) -> AttentionSpec:
        """The layer as vLLM will run it; raises UnsupportedLayerError where that is more than kernels can do."""
        if self._refusal:
            raise UnsupportedLayerError(layer, self._refusal)
        quantized = self.kv_cache_dtype in self.quantized_dtypes
        dtype = dtype_name(model_dtype if quantized else kv_cache_spec.dtype)
        return AttentionSpec.dense(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=BY_TORCH[dtype].name if dtype in BY_TORCH else dtype,
            block_size=kv_cache_spec.block_size,
            scale=self.scale,
            window=self.sliding_window or 0,
            soft_cap=self.logits_soft_cap or 0.0,
            quantized=quantized,
            sinks=self.sinks is not None,
            alibi=self.slopes is not None,
        )


def check_cache(layer: str, kv_cache: torch.Tensor, attention: AttentionSpec) -> None:
    """Raise UnsupportedLayerError unless a cache is one contiguous array of pages of the kernel's type.

    The kernels address pages by their number alone.
    """
    expected = (attention.num_kv_heads, attention.cache.block_size, 2 * attention.head_size)
    dtypes = QUANTIZED_DTYPES if attention.cache.quantized else (torch_dtype(attention.dtype),)
    if tuple(kv_cache.shape[1:]) != expected or not kv_cache.is_contiguous() or kv_cache.dtype not in dtypes:
        found = f"{tuple(kv_cache.shape)} with strides {kv_cache.stride()} in {dtype_name(kv_cache.dtype)}"
        wanted = f"{expected} in {' or '.join(map(dtype_name, dtypes))}"
        raise UnsupportedLayerError(layer, f"vLLM's KV cache is {found}, not an array of pages of {wanted}")
