"""What llmir's backend for CPUs hands to its kernels: a runner that reads the first number at each address."""

import ctypes
from typing import Any

import pytest
import torch
from gpu_fakes import HEAD_SIZE, HEADS, KV_HEADS, NO_MERGES, Requests, plan, runner

from llmir.errors import UnsupportedLayerError
from llmir.frontends.sglang import backend as cpu
from llmir.runtime.schedule import Schedule

#: 1.0 in bfloat16, the first half of which in float32 is nothing.
ONE = 0x3F80
NAMES = ("query", "key", "value", "output")


class Reading:
    """In the place of CpuAttentionRunner."""

    def __init__(self, kernel: Any, object_cache: Any = None):
        self.spec = kernel.spec
        self.seen: dict[str, int] = {}

    def begin_step(self, *step: Any) -> Schedule:
        return Schedule(None, NO_MERGES, 0, 0)

    def attend(
        self, query: Any, key: Any, value: Any, output: Any, cache: int, slots: int, append: int, **of_heads: int
    ) -> None:
        for name, (address, _) in zip(NAMES, (query, key, value, output), strict=True):
            number = ctypes.c_uint16.from_address(address)
            self.seen[name] = number.value
        number.value = ONE


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The backend, and a batch of 40 new tokens that it prepared."""
    monkeypatch.setattr(cpu.CpuAttentionRunner, "load", Reading)
    around = runner(plan(isa="avx512"), monkeypatch)
    made = cpu.LlmirAttentionBackend(around)
    requests = Requests(around.req_to_token_pool.req_to_token)
    requests.add("a", 60)
    batch = requests.extend(a=40)
    batch.seq_lens, batch.extend_seq_lens = batch.seq_lens_cpu, torch.tensor(batch.extend_seq_lens_cpu)
    made.init_forward_metadata(batch)
    return made, batch, around.model.layers[0].attn


def ones(heads: int, tokens: int = 40, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(tokens, heads * HEAD_SIZE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_read_the_models_type_whatever_a_model_computed(served: Any, dtype: torch.dtype) -> None:
    made, batch, layer = served
    given = ones(HEADS, dtype=dtype), ones(KV_HEADS, dtype=dtype), ones(KV_HEADS, dtype=dtype)
    output = made.forward_extend(*given, layer, batch)
    seen = made._runners[0].seen
    assert (seen["query"], seen["key"], seen["value"]) == (ONE, ONE, ONE)
    assert (output.shape, output.dtype, output[0, 0].item()) == ((40, HEADS * HEAD_SIZE), dtype, 1.0)


@pytest.mark.parametrize(("name", "index"), [("query", 0), ("key", 1), ("value", 2)])
def test_fewer_tokens_than_the_batch_has_are_refused(served: Any, name: str, index: int) -> None:
    made, batch, layer = served
    given = [ones(HEADS), ones(KV_HEADS), ones(KV_HEADS)]
    given[index] = given[index][:39]
    with pytest.raises(UnsupportedLayerError, match=f"layers.0.attn.*its {name} is .39"):
        made.forward_extend(*given, layer, batch)
