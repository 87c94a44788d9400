"""llmir's backend for GPUs with vLLM's own classes around it, and no GPU: a runner that notes what it is asked.

What lies on the device is on torch's meta device here, where reading a number is an error: the host waits for none.
"""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gpu_plans import BLOCK, HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, gpu_plan
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common import sharing_report
from llmir.frontends.vllm import block_tables, gpu_backend, plugin
from llmir.frontends.vllm.gpu_backend import LlmirGpuAttentionBackend, LlmirGpuMetadata, LlmirGpuMetadataBuilder
from llmir.frontends.vllm.planning import PLAN_KEY
from llmir.kernels.work_list import ITEM_FIELDS
from llmir.plan import Plan
from llmir.runtime.gpu import StepLimits
from llmir.runtime.merges import NO_MERGES
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step

META = torch.device("meta")
MOST_REQUESTS, MOST_TOKENS, COLUMNS = 64, 512, 32
#: Cache blocks of two requests that begin with the same one.
TABLE = np.array([[7, 8, 9], [7, 5, 6]], np.int32)


class NotingRunner:
    """What GpuAttentionRunner is asked to do."""

    def __init__(self, kernel: Any, limits: StepLimits, device: torch.device):
        self.spec, self.limits, self.device = kernel.spec, limits, device
        self.steps: list[tuple[list[int], list[int], Any, int]] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @classmethod
    def load(cls, kernel: Any, limits: StepLimits, device: torch.device) -> "NotingRunner":
        return cls(kernel, limits, device)

    def begin_step(self, step: Step, threads: int) -> Any:
        self.steps.append((step.query_start.tolist(), step.seq_lens.tolist(), step.block_table, threads))
        return Schedule(np.empty((0, ITEM_FIELDS), np.int32), NO_MERGES, shared_requests=0, keys_not_read=0)

    def attend(self, *tensors: Any, **others: Any) -> None:
        self.calls.append((tensors, others))


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU is asked for, and no class of vLLM stays wrapped."""
    plugin.register()
    monkeypatch.setattr(gpu_backend, "GpuAttentionRunner", NotingRunner)
    monkeypatch.setattr(block_tables, "watch", lambda: None)
    monkeypatch.setattr(block_tables, "_tables", {})
    with set_current_vllm_config(VllmConfig()):
        yield


def attention(name: str = LAYERS[0], **changes: Any) -> Attention:
    """A layer of vLLM's with llmir's implementation for GPUs."""
    facts = {"num_kv_heads": KV_HEADS, "attn_backend": LlmirGpuAttentionBackend, "prefix": name, **changes}
    return Attention(HEADS, HEAD_SIZE, SCALE, **facts)


def spec(**changes: Any) -> FullAttentionSpec:
    facts = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
    return FullAttentionSpec(**{**facts, **changes})


def build(plan: Plan, *layers: Attention, kv_cache_spec: Any = None) -> LlmirGpuMetadataBuilder:
    """vLLM's configuration with a plan, as far as a builder asks it."""
    config: Any = SimpleNamespace(
        additional_config={PLAN_KEY: plan.to_json()},
        compilation_config=SimpleNamespace(static_forward_context={layer.layer_name: layer for layer in layers}),
        scheduler_config=SimpleNamespace(max_num_seqs=MOST_REQUESTS, max_num_batched_tokens=MOST_TOKENS),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(rank=0, world_size=1),
    )
    return LlmirGpuMetadataBuilder(kv_cache_spec or spec(), [layer.layer_name for layer in layers], config, META)


def runner_of(layer: Attention) -> NotingRunner:
    return layer.impl._runner


def batch(query_lens: list[int], seq_lens: list[int], tokens: int | None = None, **changes: Any) -> Any:
    """A step's metadata as vLLM makes it; ``tokens`` is their number after padding."""
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    requests, tokens = len(query_lens), tokens or int(starts[-1])
    facts = {
        "query_start_loc": torch.empty(requests + 1, dtype=torch.int32, device=META),
        "query_start_loc_cpu": torch.from_numpy(starts),
        "seq_lens": torch.empty(requests, dtype=torch.int32, device=META),
        "seq_lens_cpu_upper_bound": torch.tensor(seq_lens, dtype=torch.int32),
        "num_reqs": requests,
        "num_actual_tokens": tokens,
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "block_table_tensor": torch.empty(requests, COLUMNS, dtype=torch.int32, device=META),
        "slot_mapping": torch.empty(tokens, dtype=torch.int64, device=META),
    }
    return CommonAttentionMetadata(**{**facts, **changes})


def know(asked: Any, rows: np.ndarray | None) -> None:
    """Let a batch's block table be known on the host."""
    block_tables._tables[asked.block_table_tensor.data_ptr()] = lambda requests, columns: rows


# ---- setting up


def test_layers_of_a_kernel_share_a_runner() -> None:
    first, second = attention(LAYERS[0]), attention(LAYERS[1])
    build(gpu_plan(), first, second)
    assert runner_of(first) is runner_of(second)


def test_a_runner_is_made_for_the_largest_step() -> None:
    layer = attention()
    build(gpu_plan(), layer)
    assert runner_of(layer).limits == StepLimits(requests=MOST_REQUESTS, tokens=MOST_TOKENS)
    assert runner_of(layer).device == META


def test_vllm_may_capture_any_batch() -> None:
    assert LlmirGpuMetadataBuilder.get_cudagraph_support(None, spec()) is AttentionCGSupport.ALWAYS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kv_sharing_target_layer_name": LAYERS[0]}, "shares the KV cache"),
        ({"alibi_slopes": [0.5] * HEADS}, "Alibi"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "int8_per_token_head"),
        ({"kv_cache_dtype": "nvfp4"}, "nvfp4"),
        ({"chunk_lookback": 4}, "chunk_lookback"),
        ({"sinks": torch.zeros(HEADS)}, "sinks are of torch.float32"),
    ],
)
def test_layers_without_a_kernel_are_refused_while_caches_are_set_up(arguments: dict[str, Any], reason: str) -> None:
    layer = attention()
    layer.impl = gpu_backend.LlmirGpuAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, **arguments)
    with pytest.raises(UnsupportedLayerError, match=reason):
        build(gpu_plan(), layer)


@pytest.mark.parametrize(
    ("planned", "found"),
    [({"quantized": True}, {}), ({"sinks": True}, {}), ({"block_size": 32}, {}), ({"window": 64}, {})],
)
def test_a_layer_unlike_the_plan_is_refused(planned: dict[str, Any], found: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayerError):
        build(gpu_plan(**planned), attention(**found))


def test_a_layer_with_everything_is_served() -> None:
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    layer = attention(sinks=sinks, logits_soft_cap=30.0, per_layer_sliding_window=64)
    build(gpu_plan(sinks=True, soft_cap=30.0, window=64), layer)
    assert runner_of(layer).spec.attention.sinks


# ---- steps


def test_a_step_is_made_of_what_the_host_knows() -> None:
    layer = attention()
    builder = build(gpu_plan(sharing=False), layer)
    builder.build(0, batch([1, 5], [20, 37]))
    assert runner_of(layer).steps == [([0, 1, 6], [20, 37], None, 0)]


def test_metadata_are_the_tensors_on_the_device() -> None:
    builder, asked = build(gpu_plan(), attention()), batch([1, 5], [20, 37])
    made = builder.build(0, asked)
    assert made.block_table is asked.block_table_tensor
    assert made.slot_mapping is asked.slot_mapping
    assert made.num_actual_tokens == 6


def test_padding_gets_no_items_but_goes_into_the_graph() -> None:
    layer = attention()
    made = build(gpu_plan(), layer).build(0, batch([1, 1, 0, 0], [20, 37, 0, 0], tokens=4))
    [(query_start, seq_lens, _, _)] = runner_of(layer).steps
    assert (query_start, seq_lens) == ([0, 1, 2], [20, 37])
    assert made.num_actual_tokens == 4
    assert len(made.block_table) == 4


def test_a_captured_batch_shares_nothing() -> None:
    layer = attention()
    builder, asked = build(gpu_plan(), layer), batch([1, 1], [512, 512])
    know(asked, TABLE)
    made = builder.build_for_cudagraph_capture(asked)
    assert runner_of(layer).steps == [([0, 1, 2], [512, 512], None, 0)]
    assert made.block_table is asked.block_table_tensor


def test_prefixes_are_found_in_the_table_on_the_host() -> None:
    layer = attention()
    builder, asked = build(gpu_plan(), layer), batch([1, 1], [40, 41])
    know(asked, TABLE)
    builder.build(0, asked)
    assert runner_of(layer).steps[0][2] is TABLE


def test_requests_that_begin_with_blocks_of_their_own_are_not_compared_further() -> None:
    layer = attention()
    builder, asked = build(gpu_plan(), layer), batch([1, 1], [40, 41])
    widths = []

    def rows(requests: int, columns: int) -> np.ndarray:
        widths.append(columns)
        return TABLE[:, ::-1]

    block_tables._tables[asked.block_table_tensor.data_ptr()] = rows
    builder._sharing = SimpleNamespace(blind=lambda reason: pytest.fail(reason), update=lambda: None)
    builder.build(0, asked)
    assert runner_of(layer).steps[0][2] is None
    assert widths == [block_tables.COLUMN_STEP]


def test_without_a_table_on_the_host_nothing_is_shared_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_backend, "logger", logging.getLogger("llmir.test"))  # vLLM's passes on what it likes
    monkeypatch.setattr(sharing_report, "_counters", lambda logger: None)
    layer = attention()
    builder = build(gpu_plan(), layer)
    for _ in range(3):
        builder.build(0, batch([1, 1], [40, 41]))
    assert [step[2] for step in runner_of(layer).steps] == [None] * 3
    said = [record.getMessage() for record in caplog.records if "by themselves" in record.getMessage()]
    assert len(said) == 1


def test_steps_that_cannot_share_need_no_table() -> None:
    sharing = SimpleNamespace(blind=lambda reason: pytest.fail(reason), update=lambda: None)
    for builder, asked in (
        (build(gpu_plan(sharing=False), attention(LAYERS[0])), batch([1, 1], [40, 41])),
        (build(gpu_plan(), attention(LAYERS[1])), batch([1], [40])),
    ):
        builder._sharing = sharing
        builder.build(0, asked)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "not causal"),
        ({"causal": torch.ones(2, dtype=torch.bool)}, "not causal"),
        ({"seq_lens_cpu_upper_bound": None}, "no sequence lengths on the host"),
        ({"block_table_tensor": torch.empty(2, 4, dtype=torch.int64, device=META)}, "int32 rows"),
        ({"query_start_loc_cpu": torch.tensor([0, 0, 2], dtype=torch.int32)}, "requests without tokens"),
    ],
)
def test_batches_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    builder = build(gpu_plan(), attention())
    with pytest.raises(UnsupportedLayerError, match=reason):
        builder.build(0, batch([1, 1], [40, 41], **changes))


def test_cascade_attention_is_never_used() -> None:
    assert not build(gpu_plan(), attention()).use_cascade_attention(128)


# ---- layers


def call(layer: Attention, metadata: LlmirGpuMetadata | None, cache_dtype: torch.dtype, **changes: Any) -> Any:
    """One call of a layer as vLLM makes it: the tensors that it was given, and what came back."""
    tokens = 3
    given = {
        **{name: torch.ones(tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16) for name in ("query", "output")},
        **{name: torch.ones(tokens, KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16) for name in ("key", "value")},
        "kv_cache": torch.zeros(8, KV_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=cache_dtype),
        **changes,
    }
    if metadata is not None:
        metadata.slot_mapping = torch.zeros(tokens, dtype=torch.int64)
    result = layer.impl.forward(layer, attn_metadata=metadata, **given)
    return tuple(given[name] for name in ("query", "key", "value", "output", "kv_cache")), result


def test_a_call_is_one_call_of_the_runner() -> None:
    layer = attention()
    metadata = build(gpu_plan(), layer).build(0, batch([1, 2], [20, 37]))
    given, result = call(layer, metadata, torch.bfloat16)
    [(tensors, others)] = runner_of(layer).calls
    *passed, table, slots, appended = tensors
    assert all(one is other for one, other in zip(passed, given, strict=True))
    assert (table is metadata.block_table, slots is metadata.slot_mapping, appended) == (True, True, 3)
    assert others["sinks"] is None
    assert result is given[3]


def test_an_fp8_cache_comes_with_its_scales() -> None:
    layer = attention()
    layer.impl = gpu_backend.LlmirGpuAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, kv_cache_dtype="fp8")
    builder = build(gpu_plan(quantized=True), layer, kv_cache_spec=spec(dtype=torch.uint8))
    given, _ = call(layer, builder.build(0, batch([1, 2], [20, 37])), torch.uint8)
    [(tensors, others)] = runner_of(layer).calls
    assert tensors[4].dtype == torch.float8_e4m3fn
    assert tensors[4].data_ptr() == given[4].data_ptr()
    assert others["key_scale"] is layer._k_scale
    assert others["value_scale"] is layer._v_scale


def test_sinks_come_with_each_call() -> None:
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    layer = attention(sinks=sinks)
    metadata = build(gpu_plan(sinks=True), layer).build(0, batch([1, 2], [20, 37]))
    call(layer, metadata, torch.bfloat16)
    assert runner_of(layer).calls[0][1]["sinks"] is sinks


def test_without_metadata_the_output_is_zeros() -> None:
    layer = attention()
    build(gpu_plan(), layer)
    given, result = call(layer, None, torch.bfloat16)
    assert result is given[3]
    assert not result.any()
    assert not runner_of(layer).calls


@pytest.mark.parametrize("scale", ["output_scale", "output_block_scale"])
def test_a_quantized_output_is_refused(scale: str) -> None:
    layer = attention()
    metadata = build(gpu_plan(), layer).build(0, batch([1, 2], [20, 37]))
    with pytest.raises(UnsupportedLayerError, match=f"{LAYERS[0]}.*output is to be quantized"):
        call(layer, metadata, torch.bfloat16, **{scale: torch.ones(1)})


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(8, KV_HEADS, 2 * BLOCK, 2 * HEAD_SIZE),
        torch.zeros(8, BLOCK, KV_HEADS, 2 * HEAD_SIZE).transpose(1, 2),
        torch.zeros(16, KV_HEADS, BLOCK, 2 * HEAD_SIZE)[::2],
        torch.zeros(8, KV_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=torch.float16),
    ],
    ids=["other blocks", "heads within a token", "other layers between", "another element type"],
)
def test_a_cache_that_is_no_array_of_pages_is_refused(cache: torch.Tensor) -> None:
    layer = attention()
    metadata = build(gpu_plan(), layer).build(0, batch([1, 2], [20, 37]))
    with pytest.raises(UnsupportedLayerError, match="not an array of pages"):
        call(layer, metadata, torch.bfloat16, kv_cache=cache)


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_a_tensor_of_another_type_is_refused_by_name(name: str) -> None:
    layer = attention()
    metadata = build(gpu_plan(), layer).build(0, batch([1, 2], [20, 37]))
    heads = HEADS if name in ("query", "output") else KV_HEADS
    with pytest.raises(UnsupportedLayerError, match=f"{LAYERS[0]}.*its {name} is .* in float32"):
        call(layer, metadata, torch.bfloat16, **{name: torch.ones(3, heads, HEAD_SIZE)})
    assert not runner_of(layer).calls


def test_sinks_that_are_not_one_a_head_are_refused() -> None:
    layer = attention(sinks=torch.zeros(1, HEADS, dtype=torch.bfloat16))
    with pytest.raises(UnsupportedLayerError, match="not one for each of its heads"):
        build(gpu_plan(sinks=True), layer)


def test_scales_for_each_head_are_refused() -> None:
    layer = attention()
    layer.impl = gpu_backend.LlmirGpuAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, kv_cache_dtype="fp8")
    metadata = build(gpu_plan(quantized=True), layer, kv_cache_spec=spec(dtype=torch.uint8)).build(0, batch([3], [20]))
    layer._k_scale = torch.ones(KV_HEADS)
    with pytest.raises(UnsupportedLayerError, match=r"a scale of its KV cache is .*, not one float32"):
        call(layer, metadata, torch.uint8)
