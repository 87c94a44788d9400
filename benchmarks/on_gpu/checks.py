"""What benchmarks/gpu.py checks of llmir's kernels: kinds of batches, and what of attention differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from on_gpu.batches import Batch, Shape
from on_gpu.step import PLAIN, Features

#: Tokens that lengths are made of: long enough on a GPU that requests are split; short for the interpreter.
LENGTH, TINY_LENGTH = 768, 48
SOFT_CAP = 20.0


@dataclass(frozen=True)
class Check:
    """One step of one kernel."""

    batch: Batch
    features: Features
    splits: bool = False
    """Some request's keys must come in parts."""
    shares: bool = False
    """A prefix must be read once for several requests."""

    @property
    def name(self) -> str:
        """Readable: ``mixed, 32/8x128, bf16``."""
        return f"{self.batch.name}, {self.batch.shape}, {self.features}"


def batches(shape: Shape, unit: int, block: int) -> Iterator[tuple[Batch, dict[str, bool]]]:
    """Every kind of batch, and what must be done in it. ``unit``: whole blocks of ``block`` tokens."""
    one, half = (1,) * 6, unit // 2

    def batch(name: str, new: tuple[int, ...], own: tuple[int, ...], *shared: tuple[int, int]) -> Batch:
        return Batch(name, shape, new, own, shared)

    yield batch("decode", one, (1, block - 1, block, block + 1, unit + 3, 2 * unit)), {}
    yield batch("split decode", (1, 1), (3 * unit + 5, unit)), {"splits": True}
    yield batch("ragged decode", (1,) * 9, (1, 2, 3, 5, 9, half, 17, block, 4 * unit - 1)), {}
    yield batch("prefill", (unit + 7,), (unit + 7,)), {}
    yield batch("chunked prefill", (half, half + 1, 3), (2 * unit, half + 1, unit)), {}
    yield batch("mixed", (half + 3, 1, 1, 2, 5), (2 * unit, 7, unit, unit + 1, 5)), {}
    own = (1, 2, block, half, 2 * block + 1, 3)
    yield batch("one prefix", one, own, (1, 2 * unit)), {"shares": True}
    yield batch("groups of prefixes", one, own, (3, 2 * unit)), {"shares": True}
    yield batch("prefix tree", one, own, (1, unit), (3, unit)), {"shares": True}
    yield batch("prefix, some prefill", (1, 2, 3, half, 1, 1), (1, 2, block, half, 2 * block + 1, 3), (2, unit)), {}


def variations(unit: int, block: int) -> Iterator[tuple[Shape, Features]]:
    """What of attention differs, one thing at a time; then much at once. ``unit``: at least as long as ``block``."""
    base = Shape("base", 8, 2, 128)
    for heads, kv_heads, size in ((4, 2, 64), (4, 4, 96), (4, 1, 256), (14, 2, 128), (4, 4, 128), (16, 1, 64)):
        yield Shape("base", heads, kv_heads, size), PLAIN
    window = 2 * unit + unit // 3
    yield base, Features(window=window)
    yield base, Features(soft_cap=SOFT_CAP)
    yield base, Features(sinks=True)
    yield base, Features(quantized=True)
    yield base, Features(element_type="f16")
    yield base, Features(block_size=4 * block)
    yield base, Features(block_size=1)
    yield (
        Shape("base", 8, 2, 64),
        Features(element_type="f16", window=window, soft_cap=SOFT_CAP, quantized=True, sinks=True),
    )


#: Batches that every variation is checked on.
_VARIED = ("split decode", "mixed", "prefix tree")
_VARIED_TINY = ("mixed",)


def checks(block: int, tiny: bool) -> Iterator[Check]:
    """All checks of kernels with blocks of ``block`` tokens."""
    unit = -(-(TINY_LENGTH if tiny else LENGTH) // block) * block
    for batch, must in batches(Shape("base", 4, 2, 64) if tiny else Shape("base", 32, 8, 128), unit, block):
        yield Check(batch, PLAIN, **must)
    for shape, features in variations(unit, block):
        for batch, must in batches(shape, unit, block):
            if batch.name in (_VARIED_TINY if tiny else _VARIED):
                # In a window, what of a prefix all requests see depends on their lengths.
                yield Check(batch, features, **({} if features.window else must))
