"""From how many tokens on reading a part of the cache once, for several requests, pays on a target."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from llmir.costs.block import FIGURES_ERROR
from llmir.costs.sharing import Readers
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelVariant, SharingCosts
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model

#: Sharing must cost at most this part of reading alone: the figures of either may be wrong by so much.
MARGIN = 1 - 2 * FIGURES_ERROR
#: Requests that decode one token each, for which the break-even is told: up to about what frameworks admit by default.
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)
#: Shared tokens for which the gain is told.
LENGTHS = (1024, 4096, 16384)


def costs_on(target: Target, attention: AttentionSpec, decode: KernelVariant, prefill: KernelVariant) -> SharingCosts:
    """What reading a part of one KV head's cache costs; ``least_tokens`` is one block, and one chunk of keys.

    Reading: as decode reads pages of this size with all threads at work. From a cache: requests follow one another,
    and each reads all KV heads, so what has to fit is a part's keys and values of all of them. A tile: its products and
    its softmax steps. A row: it leaves two states, of the shared part and of its own, as if its request had been split.
    """
    kernels, figures = kernel_model(target), target.figures
    gather = attention.cache.token_head_bytes * kernels.gather_seconds(attention)

    def read(bandwidth: float) -> float:
        return (attention.cache.token_head_bytes * figures.threads / bandwidth + gather) * 1e9

    read_key = read(figures.piece_rate(kernels.piece_bytes(attention)))
    # Neither is a smaller working set slower than a larger one, nor a cache than memory: something disturbed it.
    times = (read(rate) for _, rate in reversed(figures.cached_bandwidth))
    cached = reversed(list(accumulate(times, min, initial=read_key))[1:])
    sizes = (working_set // attention.cache.token_bytes for working_set, _ in figures.cached_bandwidth)
    split = kernels.split_seconds(attention) / attention.queries_per_kv
    return SharingCosts(
        most_rows=prefill.max_tokens * attention.queries_per_kv // 2,
        least_tokens=max(attention.cache.block_size, prefill.key_chunk),
        read_key=read_key,
        cached_key=tuple(zip(sizes, cached, strict=True)),
        tile_key=kernels.tile_key_seconds(attention, prefill) * 1e9,
        decode_rows=decode.max_tokens * attention.queries_per_kv,
        decode_row_key=kernels.decode_row_key_seconds(attention, decode, prefill) * 1e9,
        row=(2 * split + kernels.merge_seconds) * 1e9,
        margin=MARGIN,
    )


@dataclass(frozen=True)
class BreakEven:
    """The break-even of requests that decode one token each, by their number."""

    attention: AttentionSpec
    row_tile: int
    """Of the prefill variant, by which a shared part is read."""
    costs: SharingCosts
    longest: int
    """Tokens that can be shared at all."""

    def tokens(self, requests: int) -> int | None:
        """The fewest shared tokens, in whole blocks, from which reading them once pays; None: never.

        What a token gains does not fall with their number, and what rows cost is the same for any.
        """
        sizes = range(self.attention.cache.block_size, self.longest + 1, self.attention.cache.block_size)
        found = bisect_left(sizes, True, key=lambda tokens: self._pays(requests, tokens))
        return sizes[found] if found < len(sizes) else None

    @cached_property
    def curve(self) -> dict[int, int | None]:
        """:meth:`tokens` of all BATCHES."""
        return {requests: self.tokens(requests) for requests in BATCHES}

    @property
    def least_tokens(self) -> int | None:
        """The fewest of any batch; None: it pays for none."""
        return min((tokens for tokens in self.curve.values() if tokens is not None), default=None)

    def nanoseconds(self, requests: int, tokens: int) -> tuple[float, float]:
        """What reading by each request costs, and reading once."""
        readers = self._readers(requests)
        return float(readers.alone(tokens)[0]), float(readers.shared(tokens)[0])

    def point(self, requests: int) -> dict[str, Any]:
        """One point of the curve, and by how much the shared part is read faster: 1 where it is not shared."""
        tokens = self.curve[requests]
        point: dict[str, Any] = {
            "decoding_requests": requests,
            "rows": requests * self.attention.queries_per_kv,
            "from_tokens": "never" if tokens is None else tokens,
        }
        if tokens is not None:
            point["from_kb_a_layer"] = tokens * self.attention.cache.token_bytes / 1024
        for length in LENGTHS:
            if length <= self.longest:
                alone, shared = self.nanoseconds(requests, length)
                point[f"gain_at_{length // 1024}k"] = alone / shared if self._pays(requests, length) else 1.0
        return point

    def _readers(self, requests: int) -> Readers:
        return Readers(self.costs, np.full(requests, self.attention.queries_per_kv), self.row_tile)

    def _pays(self, requests: int, tokens: int) -> bool:
        return bool(self._readers(requests).share(tokens)[0])
