"""A batch as tensors on a device: queries, caches in every layout that a side wants, and the float64 answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from on_gpu.batches import Batch, Shape

#: Tokens whose keys lie side by side in every side's cache: a multiple of every page size, so that one placement
#: serves all of them.
GRAIN = 128
#: Of the interpreter's batches, where a page of llmir's is no larger.
TINY_GRAIN = 16
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: Query rows whose float64 scores are held at once.
_ROWS_AT_ONCE = 128
#: Elements that are drawn at once: the generator of a GPU takes room for what it draws.
_DRAWN_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Features:
    """What of attention differs beyond its shape; as AttentionSpec's fields."""

    element_type: str = "bf16"
    window: int = 0
    soft_cap: float = 0.0
    quantized: bool = False
    sinks: bool = False
    block_size: int = 0
    """Tokens in a block; 0: the plan's."""

    def __str__(self) -> str:
        named = {"window": self.window, "soft cap": self.soft_cap, "fp8 cache": self.quantized, "sinks": self.sinks}
        named[f"blocks of {self.block_size}"] = self.block_size
        return ", ".join([self.element_type, *(name for name, value in named.items() if value)])


PLAIN = Features()


def exact_rows(
    query: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    features: Features = PLAIN,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of some query rows of one request in float64: ``[rows, heads, head_size]``.

    ``query`` [rows, heads, head_size]; ``positions`` [rows] of each in its request; ``keys``, ``values``
    [tokens, KV heads, head_size] of the whole request, as they are after dequantization; ``sinks`` [heads].
    """
    rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    keys, values = keys.double(), values.double()
    seen = torch.arange(len(keys), device=keys.device)
    output = torch.empty(rows, heads, size, dtype=torch.float64, device=query.device)
    for first in range(0, rows, _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        grouped = query[part].double().unflatten(1, (kv_heads, heads // kv_heads))
        scores = torch.einsum("qhgd,khd->qhgk", grouped, keys) * size**-0.5
        if features.soft_cap:
            scores = features.soft_cap * torch.tanh(scores / features.soft_cap)
        distance = positions[part, None] - seen
        visible = (distance >= 0) & (distance < features.window if features.window else True)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        if sinks is not None:
            column = sinks.double().view(1, kv_heads, -1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = torch.softmax(scores, -1)[..., : len(keys)]
        output[part] = torch.einsum("qhgk,khd->qhgd", weights, values).flatten(1, 2)
    return output


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """``|output - exact| / |exact|`` over everything, and of the worst row of one head (NaN where any is NaN)."""
    difference = output.double() - exact
    rows = difference.norm(dim=-1) / exact.norm(dim=-1)
    worst = torch.nan if rows.isnan().any() else float(rows.max())
    return float(difference.norm() / exact.norm()), worst


def to_pages(keys: torch.Tensor, values: torch.Tensor, block_size: int, pages: torch.Tensor) -> None:
    """Writes keys and values [tokens, KV heads, head_size] as llmir's pages [blocks, KV heads, 2, block_size, size]."""
    for which, tokens in enumerate((keys, values)):
        pages[:, :, which] = tokens.unflatten(0, (-1, block_size)).transpose(1, 2)


def from_pages(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`to_pages`."""
    keys, values = (pages[:, :, which].transpose(1, 2).flatten(0, 1) for which in (0, 1))
    return keys, values


class Arena:
    """Memory that all timed cases use one after the other: keys and values token by token, and llmir's pages.

    Drawn once; a case is the beginning of it, so every case of one shape has the same numbers.
    """

    def __init__(self, cache_bytes: int, element_type: str, device: torch.device, generator: torch.Generator):
        elements, dtype = cache_bytes // 4, DTYPES[element_type]  # of keys, and as many of values, two bytes each
        self.tokens = torch.empty(2, elements, dtype=dtype, device=device)
        self.pages = torch.empty(2 * elements, dtype=dtype, device=device)
        for part in self.tokens.view(-1).split(_DRAWN_AT_ONCE):
            part.normal_(generator=generator)


class Step:
    """A timed batch in an arena, as the caches of ``layers`` layers with one block table.

    ``query`` [tokens, heads, head_size]; ``keys``, ``values`` [layers, slots, KV heads, head_size];
    ``query_start`` and ``seq_lens`` int32 on the device, as ``host`` has them in numpy; ``longest``: tokens of the
    longest request; ``most_new``: most new tokens of one.
    """

    def __init__(self, batch: Batch, arena: Arena, layers: int, grain: int, generator: torch.Generator):
        shape, self.batch, self.layers, self.grain, self._arena = batch.shape, batch, layers, grain, arena
        self.units, self.unit_count = batch.placement(grain, np.random.default_rng(generator.initial_seed()))
        self.slots = self.unit_count * grain
        size = (layers, self.slots, shape.num_kv_heads, shape.head_size)
        elements = int(np.prod(size))
        self.keys, self.values = (tokens[:elements].view(size) for tokens in arena.tokens)
        self.device = self.keys.device
        query = self.keys.new_empty(batch.tokens, shape.num_heads, shape.head_size)
        self.query = query.normal_(generator=generator)
        self.host = (batch.query_start, batch.seq_lens)
        self.query_start, self.seq_lens = (torch.from_numpy(a).to(self.device) for a in self.host)
        self.scale, self.most_new, self.longest = shape.head_size**-0.5, max(batch.new), int(batch.seq_lens.max())

    @property
    def shape(self) -> Shape:
        """The attention."""
        return self.batch.shape

    def host_table(self, page_size: int) -> NDArray[np.int32]:
        """The block table for pages of ``page_size``: ``[requests, columns]``; unneeded columns are 0."""
        parts = self.grain // page_size
        table = (self.units[:, :, None] * parts + np.arange(parts)).reshape(self.batch.requests, -1)
        return np.where(table < self.unit_count * parts, table, 0).astype(np.int32)

    def table(self, page_size: int) -> torch.Tensor:
        """:meth:`host_table` on the device."""
        return torch.from_numpy(self.host_table(page_size)).to(self.device)

    def caches(self, page_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer as ``[pages, page_size, KV heads, head_size]``: views."""
        return [
            (keys.unflatten(0, (-1, page_size)), values.unflatten(0, (-1, page_size)))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def request_slots(self, request: int, begin: int, end: int) -> torch.Tensor:
        """Slots of some tokens of a request, int64."""
        tokens = np.arange(begin, end)
        slots = self.units[request, tokens // self.grain].astype(np.int64) * self.grain + tokens % self.grain
        return torch.from_numpy(slots).to(self.device)

    def pages(self, block_size: int) -> torch.Tensor:
        """llmir's caches: ``[layers, blocks, KV heads, 2, block_size, head_size]``, the same keys and values."""
        shape = self.shape
        size = (self.layers, self.slots // block_size, shape.num_kv_heads, 2, block_size, shape.head_size)
        pages = self._arena.pages[: int(np.prod(size))].view(size)
        for layer in range(self.layers):
            to_pages(self.keys[layer], self.values[layer], block_size, pages[layer])
        return pages

    def output(self) -> torch.Tensor:
        """An output of NaN, like ``query``."""
        return torch.full_like(self.query, torch.nan)

    @cached_property
    def sample(self) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """What is compared with float64: rows of the output, the exact ones in the first layer, heads.

        Some requests, of each up to SAMPLE_ROWS first and last new tokens, one KV head.
        """
        head = self.shape.num_kv_heads - 1
        group = self.shape.num_heads // self.shape.num_kv_heads
        heads = slice(head * group, (head + 1) * group)
        rows, exact = [], []
        for request in sampled(self.batch.requests):
            start, length = int(self.batch.query_start[request]), int(self.batch.seq_lens[request])
            new = self.batch.new[request]
            chosen = torch.tensor(sorted({*range(new)[:SAMPLE_ROWS], *range(new)[-SAMPLE_ROWS:]}), device=self.device)
            slots = self.request_slots(request, 0, length)
            keys, values = (cache[0, slots, head : head + 1] for cache in (self.keys, self.values))
            query = self.query[start + chosen][:, heads]
            exact.append(exact_rows(query, length - new + chosen, keys, values))
            rows.append(start + chosen)
        return torch.cat(rows), torch.cat(exact), heads

    def errors(self, output: torch.Tensor) -> tuple[float, float]:
        """:func:`relative_error` of the first layer's output where it is known; NaN where any of it is NaN."""
        if output.isnan().any():
            return torch.nan, torch.nan
        rows, exact, heads = self.sample
        return relative_error(output[rows][:, heads], exact)


SAMPLE_ROWS = 16
#: Requests of a timed batch whose answers are compared.
_SAMPLE_REQUESTS = 3


def sampled(requests: int) -> Iterable[int]:
    """The first, one in the middle, the last."""
    return sorted({int(n) for n in np.linspace(0, requests - 1, _SAMPLE_REQUESTS).round()})
