"""What benchmarks/gpu.py checks and times: models' attention, and batches of requests of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

#: Bytes of an element of the caches that are timed, bf16.
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer, bf16."""
        return 2 * ELEMENT_BYTES * self.num_kv_heads * self.head_size

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_size}"


LLAMA = Shape("llama-3-8b", 32, 8, 128)
QWEN = Shape("qwen2-7b", 28, 4, 128)
PHI = Shape("phi-3-mini", 32, 32, 96)
#: For the interpreter.
TINY = Shape("tiny", 4, 2, 64)


@dataclass(frozen=True)
class Batch:
    """One step of some requests: the last ``new[r]`` tokens of each are its queries."""

    name: str
    shape: Shape
    new: tuple[int, ...]
    """New tokens of each request."""
    own: tuple[int, ...]
    """Tokens that a request shares with no other, the new ones included."""
    shared: tuple[tuple[int, int], ...] = ()
    """Levels of the prefix tree from its root: (groups, tokens). The requests of a group follow one another."""

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.own)

    @property
    def prefix(self) -> int:
        """Tokens that a request shares with others."""
        return sum(tokens for _, tokens in self.shared)

    @property
    def seq_lens(self) -> Int32:
        """Tokens of each request, the new ones included: ``[requests]``."""
        return np.array(self.own, np.int32) + np.int32(self.prefix)

    @property
    def query_start(self) -> Int32:
        """Where each request's new tokens begin: ``[requests + 1]``."""
        return np.array([0, *accumulate(self.new)], np.int32)

    @property
    def tokens(self) -> int:
        """New tokens of all requests."""
        return sum(self.new)

    @property
    def decodes(self) -> bool:
        """Whether every request has one new token."""
        return set(self.new) == {1}

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read: what requests share once."""
        distinct = sum(self.own) + sum(groups * tokens for groups, tokens in self.shared)
        return distinct * self.shape.token_bytes

    @property
    def moved_bytes(self) -> int:
        """``kv_bytes``, and the queries read and the output written."""
        return self.kv_bytes + 2 * self.tokens * self.shape.num_heads * self.shape.head_size * ELEMENT_BYTES

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products, masked pairs left out."""
        pairs = sum(n * int(end) - n * (n - 1) // 2 for n, end in zip(self.new, self.seq_lens, strict=True))
        return 4 * self.shape.num_heads * self.shape.head_size * pairs

    def group(self, request: int, groups: int) -> int:
        """The group of a request at a level that has ``groups``."""
        return request * groups // self.requests

    def placement(self, grain: int, random: np.random.Generator) -> tuple[Int32, int]:
        """Units of ``grain`` tokens in random places: int32 ``[requests, columns]``, and how many units there are.

        Requests of a group have the same units where a unit lies wholly in what they share. Columns a request does not
        need hold the number of units: a place that is no request's.
        """
        width = -(-self.seq_lens // grain)
        name = np.full((self.requests, int(width.max())), -1, np.int64)
        begin = tokens = used = 0
        for groups, length in self.shared:
            tokens += length
            count = tokens // grain - begin
            for request in range(self.requests):
                first = used + self.group(request, groups) * count
                name[request, begin : begin + count] = np.arange(first, first + count)
            begin, used = begin + count, used + groups * count
        for request, end in enumerate(width):
            name[request, begin:end] = np.arange(used, used + end - begin)
            used += int(end) - begin
        places = np.append(random.permutation(used), used)
        return places[name].astype(np.int32), used


def decode(shape: Shape, requests: int, context: int) -> Batch:
    """Requests of ``context`` tokens that decode one token each."""
    return Batch(f"decode {requests} x {thousands(context)}", shape, (1,) * requests, (context,) * requests)


def prefill(shape: Shape, tokens: int) -> Batch:
    """One request whose prompt is new."""
    return Batch(f"prefill {thousands(tokens)}", shape, (tokens,), (tokens,))


def shared(name: str, levels: tuple[tuple[int, int], ...], requests: int = 64, seed: int = 5) -> Batch:
    """Requests that decode over shared prefixes, with 128 to 512 tokens of their own."""
    own = np.random.default_rng(seed).integers(128, 513, requests)
    return Batch(f"shared {name}", LLAMA, (1,) * requests, tuple(map(int, own)), levels)


def skewed(requests: int, longest: int, seed: int = 6) -> tuple[int, ...]:
    """Lengths of which few are long and most are short (log-uniform from 64 up)."""
    lengths = np.exp(np.random.default_rng(seed).uniform(np.log(64), np.log(longest), requests))
    return tuple(int(n) for n in np.append(lengths[1:], longest))


#: A long prompt is worked off in chunks of so many tokens beside requests that decode (vLLM's default budget is 2048).
CHUNK = 2048
K = 1024

RAGGED = (
    Batch("ragged decode", LLAMA, (1,) * 64, skewed(64, 32 * K)),
    Batch("ragged prefill + decode", LLAMA, (CHUNK, *(1,) * 32), (8 * K, *skewed(32, 8 * K))),
    Batch("ragged chunks", LLAMA, (512,) * 4 + (1,) * 60, (4 * K, 2 * K, K, 512, *skewed(60, 8 * K))),
)
SHARED = (
    shared("one 16k", ((1, 16 * K),)),
    shared("8 of 16k", ((8, 16 * K),)),
    shared("4 of 16k", ((4, 16 * K),)),
    shared("tree 8k + 4 of 8k", ((1, 8 * K), (4, 8 * K))),
    # 4k tokens of 32/8x128 are 16 MiB, 2k are 8: an H100's L2 cache has 50.
    shared("one 4k", ((1, 4 * K),)),
    shared("4 of 2k", ((4, 2 * K),)),
)


def timed() -> Iterator[Batch]:
    """Every batch that is timed, what matters most first: what is left out where time is short comes last."""
    yield decode(LLAMA, 64, 4 * K)
    yield SHARED[0]
    yield SHARED[1]
    yield prefill(LLAMA, 8 * K)
    yield RAGGED[0]
    yield from SHARED[2:]
    yield RAGGED[1]
    yield decode(LLAMA, 1, 8 * K)
    yield decode(LLAMA, 16, 8 * K)
    yield decode(LLAMA, 256, K)
    yield decode(QWEN, 64, 4 * K)
    yield decode(PHI, 16, 4 * K)
    yield prefill(LLAMA, 4 * K)
    yield prefill(LLAMA, K)
    yield RAGGED[2]
    done = {(1, 8), (16, 8), (64, 4), (256, 1)}
    for context in (1, 4, 8, 32):
        for requests in (1, 4, 16, 64, 256):
            if (requests, context) not in done:
                yield decode(LLAMA, requests, context * K)
    for shape in (QWEN, PHI):
        yield decode(shape, 1, 4 * K)
        yield prefill(shape, 4 * K)
    yield decode(QWEN, 256, K)


def timed_tiny() -> Iterator[Batch]:
    """One batch of each kind, small enough for the interpreter."""
    yield Batch("decode 2 x 40", TINY, (1, 1), (40, 40))
    yield Batch("prefill 24", TINY, (24,), (24,))
    yield Batch("ragged mixed", TINY, (17, 1, 1), (40, 9, 33))
    yield Batch("shared 2 of 64", TINY, (1,) * 4, (5, 9, 1, 17), ((2, 64),))


def thousands(tokens: int) -> str:
    """``4k``."""
    return f"{tokens // K}k" if tokens % K == 0 else str(tokens)
