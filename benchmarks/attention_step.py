"""One attention step with known inputs, run by vLLM's own CPU operation and by llmir's kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES, QUERY_DTYPES
from llmir.kernels import reference

#: Element types of a step: the names that kernels have for them by those that frameworks have.
DTYPE_NAMES = {str(DTYPES[name].torch): name for name in QUERY_DTYPES}
#: Tokens in a block: what vLLM uses on CPU unless told otherwise.
VLLM_BLOCK_SIZE = 128


@dataclass(frozen=True)
class Case:
    """The attention of one model in one step: ``requests`` that hold ``context`` tokens each, the last
    ``new_tokens`` of them new."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    requests: int
    context: int
    new_tokens: int
    element_type: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The element type as torch calls it."""
        found: torch.dtype = getattr(torch, str(DTYPES[self.element_type].torch))
        return found

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that the step has to read."""
        bytes_ = DTYPES[self.element_type].bytes_of(1)
        return 2 * bytes_ * self.requests * self.context * self.num_kv_heads * self.head_size

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products, masked pairs left out."""
        first = self.context - self.new_tokens + 1
        pairs = sum(range(first, self.context + 1))
        return 4 * self.requests * self.num_heads * self.head_size * pairs


@dataclass(frozen=True)
class Step:
    """The inputs of a case.

    ``query``: ``[tokens, num_heads, head_size]``; ``key``, ``value``: ``[requests * context, num_kv_heads,
    head_size]``, one request after the other; ``query_start`` and ``seq_lens``: int32.
    """

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def random(cls, case: Case, seed: int = 0) -> Step:
        """Normally distributed queries, keys and values."""
        generator = torch.Generator().manual_seed(seed)

        def normal(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, case.head_size, generator=generator).to(case.dtype)

        return cls(
            case,
            normal(case.requests * case.new_tokens, case.num_heads),
            normal(case.requests * case.context, case.num_kv_heads),
            normal(case.requests * case.context, case.num_kv_heads),
            torch.arange(case.requests + 1, dtype=torch.int32) * case.new_tokens,
            torch.full((case.requests,), case.context, dtype=torch.int32),
        )

    def block_table(self, block_size: int, seed: int = 1) -> torch.Tensor:
        """Blocks in random places, as after long serving: int32 ``[requests, blocks of a request]``."""
        blocks = -(-self.case.context // block_size)
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(self.case.requests * blocks, generator=generator)
        return places.int().view(self.case.requests, blocks)

    def slot_mapping(self, block_table: torch.Tensor, block_size: int) -> torch.Tensor:
        """The slot of every key in the cache, int64 ``[requests * context]``."""
        position = torch.arange(self.case.context)
        return (block_table.long()[:, position // block_size] * block_size + position % block_size).flatten()

    def exact(self) -> np.ndarray:
        """The float64 result: ``[tokens, num_heads, head_size]``."""
        case = self.case
        attention = AttentionSpec.dense(
            case.num_heads, case.num_kv_heads, case.head_size, case.element_type, case.context, case.head_size**-0.5
        )
        shape = (case.requests, case.context, case.num_kv_heads, case.head_size)
        caches = [stored(x).reshape(shape).swapaxes(1, 2) for x in (self.key, self.value)]
        one_block_each = np.arange(case.requests)[:, None]
        return reference.attention(
            stored(self.query), *caches, one_block_each, self.seq_lens, self.query_start, attention
        )


def stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the reference reads it: bfloat16 as its bits, uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Side(Protocol):
    """One implementation, ready to run a step."""

    output: torch.Tensor
    """``[tokens, num_heads, head_size]``."""

    def runner(self, threads: int) -> Callable[[], object]:
        """What to call for one run on ``threads`` threads; work lists are made before, as once per step."""


class VllmAttention:
    """vLLM's CPU attention, with the settings its own backend chooses on this machine."""

    def __init__(self, step: Step):
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        current_platform.import_kernels()
        case = step.case
        self.ops, self.step = ops, step
        self.isa = _get_attn_isa(case.dtype, VLLM_BLOCK_SIZE, case.head_size)
        self.table = step.block_table(VLLM_BLOCK_SIZE)
        cache = torch.zeros(self.table.numel(), case.num_kv_heads, 2 * VLLM_BLOCK_SIZE, case.head_size).to(case.dtype)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        slots = step.slot_mapping(self.table, VLLM_BLOCK_SIZE)
        ops.cpu_attn_reshape_and_cache(step.key, step.value, self.key_cache, self.value_cache, slots, self.isa)
        self.output = torch.full_like(step.query, torch.nan)

    def runner(self, threads: int) -> Callable[[], object]:
        """See :class:`Side`."""
        step, case = self.step, self.step.case
        torch.set_num_threads(threads)  # the operation's own schedule depends on it
        schedule = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.requests,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_size,
            seq_lens=step.seq_lens,
            dtype=case.dtype,
            query_start_loc=step.query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )
        return lambda: self.ops.cpu_attention_with_kv_cache(
            query=step.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=self.output,
            query_start_loc=step.query_start,
            seq_lens=step.seq_lens,
            scale=case.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
