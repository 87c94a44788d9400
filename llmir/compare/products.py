"""How long a matrix product takes in each dtype, by torch alone: ``python -m llmir.compare.products``.

Run in a framework's environment, it tells in seconds which dtypes the processor multiplies only by emulation, before a
framework is started for minutes to find that out. Prints seconds by dtype, as JSON.
"""

from __future__ import annotations

import json
import os
import time

import torch

from llmir.compare.options import DTYPES

#: A product as prefill has many: [tokens, hidden] times [hidden, hidden].
_TOKENS, _HIDDEN = 256, 1024
_REPEATS = 5


def seconds_of(dtype: torch.dtype) -> float:
    """The least of a few, after one that is not counted."""
    tokens, weights = torch.randn(_TOKENS, _HIDDEN).to(dtype), torch.randn(_HIDDEN, _HIDDEN).to(dtype)
    times = []
    for _ in range(1 + _REPEATS):
        began = time.perf_counter()
        torch.nn.functional.linear(tokens, weights)
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(json.dumps({name: seconds_of(getattr(torch, name)) for name in DTYPES}))
