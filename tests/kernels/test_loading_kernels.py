"""Kernels as a server gets them: of this machine alone, and compiled by another process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch  # noqa: F401  brings the OpenMP runtime
from attention_cases import spec_of

from llmir.errors import KernelError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu import apart
from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.cpu.object_cache import ObjectCache
from llmir.targets.machine import Target

SPEC = spec_of(AttentionSpec.dense(6, 2, 64, "bf16", 32, 0.125, layout="pair"), "avx2")
#: What LLVM does with code for which an instruction set has no rule.
ABORT = """import os, sys; print("LLVM ERROR: Do not know how to split", file=sys.stderr, flush=True); os.abort()"""


def test_a_kernel_that_is_not_cached_is_compiled_by_another_process(tmp_path: Path) -> None:
    check = f"""
import sys, torch
from llmir.ir.attention_spec import AttentionSpec, Mask
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import CpuVariant, KernelSpec
from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.cpu.object_cache import ObjectCache
assert callable(Kernel.load({SPEC!r}, ObjectCache({str(tmp_path)!r})).function)
assert not {{"torch_mlir", "mlir"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", check], check=True)
    assert list(tmp_path.glob("*.o"))


def test_an_abort_of_the_compiler_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", ABORT))
    words = r"compiled for avx2: the compiler ended with SIGABRT \(LLVM ERROR: Do not know how to split\)"
    with pytest.raises(KernelError, match=words):
        Kernel.load(SPEC, ObjectCache(tmp_path))
    assert not list(tmp_path.glob("*.o"))


def test_what_cannot_be_generated_is_said_by_the_other_process_too() -> None:
    spec = replace(SPEC, attention=replace(SPEC.attention, num_heads=7))
    with pytest.raises(KernelError, match="num_heads is 7, and must be a multiple of num_kv_heads, 2"):
        apart.compile_apart(spec)


def test_a_compiler_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(apart, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(KernelError, match="did not end within"):
        apart.compile_apart(SPEC)


@pytest.mark.parametrize("isa", ["avx512_bf16", "sm_90", "none"])
def test_a_kernel_of_another_processor_is_refused(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = Target.named("cpu:avx2")
    monkeypatch.setattr(Target, "detect", lambda: least)
    foreign = KernelSpec(SPEC.attention, isa, SPEC.variants)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=f"is made for {isa}, and this processor .* has avx2: make the plan anew"):
        Kernel.load(foreign, ObjectCache(tmp_path))
