"""SGLang's model runner on a GPU, as far as llmir's backend looks at it, with CPU tensors in place of device ones."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from llmir.frontends.sglang import pool as pools
from llmir.frontends.sglang.planning import PLAN_ATTRIBUTE
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, SharingCosts, StepPolicy, Variants
from llmir.plan import FORMAT, Plan, PlannedKernel
from llmir.runtime.merges import Merges
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step
from llmir.targets.registry import is_gpu
from llmir.targets.x86 import tiles

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 64, 16
REQUESTS, CONTEXT, SLOTS = 8, 512, 1024
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
#: Costs by which everything that can be shared is.
ALWAYS_SHARED = SharingCosts(64, PAGE, 10.0, ((1, 10.0),), 0.0001, 16, 0.0001, 0.0, 1.0)
NO_MERGES = Merges(*(np.empty(0, np.int32) for _ in range(4)), 0)


def plan(
    layers: int = 2, *, isa: str = "sm_90", quantized: bool = False, sinks: bool = False, element_type: str = "bf16"
) -> Plan:
    """A plan for one kernel that serves all layers."""
    attention = AttentionSpec.dense(
        HEADS, KV_HEADS, HEAD_SIZE, element_type, PAGE, HEAD_SIZE**-0.5, layout="row", quantized=quantized, sinks=sinks
    )
    variants: Variants = (GpuVariant("decode", 8, 16, 32, 4, 3), GpuVariant("prefill", 16, 32, 32, 4, 3))
    if not is_gpu(isa):
        variants = (tiles.decode_variant(attention, isa), tiles.prefill_variant(attention, isa))
    names = tuple(f"layers.{i}.attn" for i in range(layers))
    kernel = PlannedKernel("attention", KernelSpec(attention, isa, variants), POLICY, names, None)
    return Plan(
        format=FORMAT,
        framework="sglang",
        framework_version="0",
        model="m",
        rank=0,
        world_size=1,
        block_size=PAGE,
        layout="row",
        element_type=attention.cache.dtype,
        fused=True,
        kernels=(kernel,),
        decisions=(),
        target={"measured": None},
        target_fingerprint=f"cuda-{isa}",
        workload={},
        module_hash="",
        versions={},
    )


POLICY = StepPolicy(8, 1 << 20, 2, ALWAYS_SHARED)


class Layer(torch.nn.Module):
    """A decoder layer that is nothing but attention."""

    def __init__(self, number: int):
        super().__init__()
        self.attn = RadixAttention(HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, KV_HEADS, number)


class Model(torch.nn.Module):
    """A model that is nothing but attention layers."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(number) for number in range(layers))


@dataclass
class Recorded:
    """In the place of GpuAttentionRunner: keeps what it is told."""

    spec: KernelSpec
    limits: Any
    steps: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, kernel: PlannedKernel, limits: Any, device: torch.device) -> "Recorded":
        return cls(kernel.spec, limits)

    def begin_step(self, step: Step, threads: int = 0) -> Schedule:
        arrays = {name: getattr(step, name) for name in ("query_start", "seq_lens", "block_table")}
        self.steps.append({name: None if array is None else array.copy() for name, array in arrays.items()})
        return Schedule(np.empty((0, 11), np.int32), NO_MERGES, 0, 0)

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        output: Any,
        cache: Any,
        block_table: Any,
        slots: Any,
        append: int,
        **rest,
    ) -> None:
        names = ("query", "key", "value", "output", "cache", "block_table", "slots", "append_tokens")
        tensors = (query, key, value, output, cache, block_table, slots, append)
        self.calls.append({**dict(zip(names, tensors, strict=True)), **rest})
        output.fill_(7)


def pool(made: Plan, monkeypatch: Any, **changes: Any) -> pools.LlmirKVPool:
    """llmir's KV pool for a plan."""
    monkeypatch.setattr(pools, "get_server_args", lambda: None)
    monkeypatch.setattr(pools, "plan_of", lambda server_args: made)
    attention = made.kernels[0].spec.attention
    dtype = torch.float8_e4m3fn if attention.cache.quantized else DTYPES[attention.dtype]
    arguments = {
        "size": SLOTS,
        "page_size": PAGE,
        "dtype": dtype,
        "head_num": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "layer_num": len(made.kernels[0].layers),
        "device": "cpu",
        "enable_memory_saver": False,
        **changes,
    }
    return pools.LlmirKVPool(**arguments)


def runner(made: Plan, monkeypatch: Any) -> SimpleNamespace:
    """A model runner whose server arguments carry the plan."""
    from llmir.frontends.sglang import base_backend, gpu_backend

    monkeypatch.setattr(
        base_backend,
        "get_parallel",
        lambda: SimpleNamespace(tp_rank=0, pp_rank=0, world_group=SimpleNamespace(world_size=1)),
    )
    schedule = SimpleNamespace(chunked_prefill_size=256, max_prefill_tokens=512)
    monkeypatch.setattr(gpu_backend, "get_schedule", lambda: schedule)
    monkeypatch.setattr(gpu_backend, "max_prefill_buffer_tokens", lambda: 256)
    attention = made.kernels[0].spec.attention
    return SimpleNamespace(
        device="cuda",
        token_to_kv_pool=pool(made, monkeypatch),
        req_to_token_pool=ReqToTokenPool(REQUESTS, CONTEXT, "cpu", enable_memory_saver=False),
        model=Model(len(made.kernels[0].layers)),
        model_config=SimpleNamespace(dtype=DTYPES[attention.dtype], context_len=CONTEXT),
        server_args=SimpleNamespace(**{PLAN_ATTRIBUTE: made.to_json()}),
    )


def backend(monkeypatch: Any, made: Plan | None = None) -> Any:
    """llmir's backend with a runner of kernels that only records: ``backend._runners[layer]``."""
    from llmir.frontends.sglang import gpu_backend

    monkeypatch.setattr(gpu_backend, "GpuAttentionRunner", Recorded)
    return gpu_backend.LlmirGpuBackend(runner(made or plan(), monkeypatch))


class Requests:
    """What SGLang's scheduler keeps of requests: rows of ``req_to_token``, lengths, ids."""

    def __init__(self, req_to_token: torch.Tensor):
        self._table = req_to_token
        self._next_page = 1
        self.length: dict[str, int] = {}
        self._row: dict[str, int] = {}

    def add(self, name: str, length: int, like: str | None = None, prefix: int = 0) -> None:
        """A request with room for ``length`` tokens, the first ``prefix`` (whole pages) ``like``'s."""
        row = self._row[name] = len(self._row) + 1
        self.length[name] = 0
        first_new = prefix // PAGE
        for page in range(-(-length // PAGE)):
            places = torch.arange(page * PAGE, (page + 1) * PAGE)
            if page < first_new:
                self._table[row, places] = self._table[self._row[like], places]
            else:
                self._table[row, places] = (self._next_page * PAGE + torch.arange(PAGE)).int()
                self._next_page += 1
        self.length[name] = prefix

    def slots(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self._table[self._row[name], begin:end].long()

    def extend(self, **new: int) -> SimpleNamespace:
        """The batch of a prefill: so many new tokens of each request."""
        slots = torch.cat([self.slots(name, self.length[name], self.length[name] + n) for name, n in new.items()])
        for name, count in new.items():
            self.length[name] += count
        return self._batch(ForwardMode.EXTEND, list(new), slots, extend_seq_lens_cpu=list(new.values()))

    def decode(self, *names: str) -> SimpleNamespace:
        """The batch of a step in which each of these requests gets a token."""
        slots = torch.cat([self.slots(name, self.length[name], self.length[name] + 1) for name in names])
        for name in names:
            self.length[name] += 1
        return self._batch(ForwardMode.DECODE, list(names), slots)

    def _batch(self, mode: ForwardMode, names: list[str], slots: torch.Tensor, **fields: Any) -> SimpleNamespace:
        lengths = torch.tensor([self.length[name] for name in names])
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(names),
            spec_info=None,
            seq_lens_cpu=lengths,
            req_pool_indices=torch.tensor([self._row[name] for name in names]),
            out_cache_loc=slots,
            rids=names,
            _attn_output=None,
            **fields,
        )


def padded(batch: SimpleNamespace, size: int) -> SimpleNamespace:
    """The batch as a graph of ``size`` requests is replayed for it: padding of length 1 in row 0 and slot 0."""
    more = size - batch.batch_size
    pad = torch.nn.functional.pad
    return SimpleNamespace(
        **{
            **vars(batch),
            "batch_size": size,
            "seq_lens_cpu": pad(batch.seq_lens_cpu, (0, more), value=1),
            "req_pool_indices": pad(batch.req_pool_indices, (0, more)),
            "out_cache_loc": pad(batch.out_cache_loc, (0, more)),
        }
    )
