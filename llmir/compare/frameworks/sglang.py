"""SGLang, as a comparison runs it on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from llmir.compare.engine import Engine
from llmir.compare.frameworks.base import Framework

#: SGLang's cache is sized in tokens: twice what 16 requests of the longest kind need, so that nothing is evicted
#: while it is timed. Workloads of more requests share prefixes, and need no more.
_LONGEST_REQUESTS_IN_CACHE = 32


#: The best of what runs on two cores without AMX, by benchmarks/sglang_settings.py (results/zen5/sglang-settings.json):
#: torch_native, pages of one token, all cores, and chunks of this size, which began answers soonest of the settings
#: that were among the fastest. flex_attention decoded as fast and began later, other page sizes changed nothing. Decode
#: does not depend on the size of a chunk, and the rows of that benchmark in which nothing else differs spread over 403
#: to 568 ms a token: no finer choice could be told from noise. The dtype is measured on each machine (dtype.py).
_CHUNK = 2048


def _arguments(longest: int, kv_cache_bytes: int) -> dict[str, Any]:
    return {
        "device": "cpu",
        "chunked_prefill_size": _CHUNK,
        "context_length": longest,
        "max_total_tokens": _LONGEST_REQUESTS_IN_CACHE * longest,
        "log_level": "info",
    }


def _environment(cpus: Collection[int]) -> dict[str, str]:
    """SGLang's CPU engine, one OpenMP thread a CPU.

    The threads are not bound: SGLang starts its scheduler from a process whose own first thread would already be
    bound to one CPU, and the scheduler would inherit that one for all its threads.
    """
    return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(len(cpus))}


def _load() -> Callable[[str, dict[str, Any]], Engine]:
    from llmir.compare.sglang_engine import SglangEngine

    return SglangEngine


SGLANG = Framework(
    name="sglang",
    title="SGLang",
    packages=("sglang", "sgl-kernel", "sglang-kernel"),
    workloads=("short", "chat", "extend"),
    pairs=2,
    arguments=_arguments,
    baseline={"attention_backend": "torch_native", "page_size": 1},
    llmir={"attention_backend": "llmir"},
    quick_start={},
    environment=_environment,
    recorded_variables=("SGLANG_",),
    conditions=("{attention_backend} attention", "{dtype}", "page size {page_size}", "{threads} threads"),
    echoes=(),
    load=_load,
)
