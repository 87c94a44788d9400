"""Reading models beside a GPU: SGLang is made to believe that there is none."""

import os
import sys
from types import ModuleType

import pytest
import torch

from llmir.frontends.sglang.reading import KERNELS, as_on_a_cpu


@pytest.fixture
def torch_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch is built for CUDA and finds a GPU, and SGLang's kernels for it are installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels = ModuleType(KERNELS)
    kernels.for_gpus = True
    monkeypatch.setitem(sys.modules, KERNELS, kernels)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")


@pytest.mark.usefixtures("torch_for_gpus")
def test_sglang_finds_no_gpu_while_a_model_is_read() -> None:
    with as_on_a_cpu():
        assert not torch.cuda.is_available()
        assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert torch.cuda.is_available()


@pytest.mark.usefixtures("torch_for_gpus")
def test_kernels_for_cpus_can_be_imported_and_not_called() -> None:
    with as_on_a_cpu():
        from sgl_kernel import shm_allreduce_cpu

        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.shm_allreduce_cpu"):
            shm_allreduce_cpu()
    assert sys.modules[KERNELS].for_gpus


def test_a_torch_without_gpus_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    before = sys.modules.get(KERNELS), torch.cuda.is_available
    with as_on_a_cpu():
        assert (sys.modules.get(KERNELS), torch.cuda.is_available) == before
