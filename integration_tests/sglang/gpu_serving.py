"""A few steps of SGLang served by llmir's backend for GPUs, its Triton programs in Triton's interpreter.

Run as a program of its own, with TRITON_INTERPRET=1: prompts, one of which begins as another does, then decode steps as
replays of a padded CUDA graph. Every output is held against the definition in float64. Writes one line of JSON, for
each feature the largest relative error, how many requests read anything together in each step, and the seed.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from gpu_fakes import HEAD_SIZE, HEADS, KV_HEADS, PAGE, Requests, padded, plan, runner

from llmir.frontends.sglang.gpu_backend import LlmirGpuBackend

LAYERS, GRAPH = 2, 4
SCALE = 0.25


class Serving:
    """The backend, and what it should compute: keys and values of every request and layer, as they are kept."""

    def __init__(self, monkeypatch: Any, *, quantized: bool, sinks: bool):
        of = runner(plan(LAYERS, quantized=quantized, sinks=sinks, element_type="f16"), monkeypatch)
        self.layers = [layer.attn for layer in of.model.layers]
        if quantized:
            for layer in self.layers:
                layer.k_scale = layer.v_scale = torch.tensor(SCALE)
        self.backend = LlmirGpuBackend(of)
        self.backend.init_cuda_graph_state(GRAPH, GRAPH)
        self.requests = Requests(self.backend._req_to_token)
        self.quantized = quantized
        self.sinks = torch.randn(HEADS).half() if sinks else None
        self.kept: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.errors: list[float] = []

    def begin(self, name: str, like: str | None = None, prefix: int = 0) -> None:
        """A request, which may begin as another does."""
        self.requests.add(name, 160, like, prefix)
        for layer in range(LAYERS):
            self.kept[name, layer] = self.kept[like, layer][:prefix] if like else []

    def prefill(self, **new: int) -> int:
        """Process new tokens of prompts."""
        batch = self.requests.extend(**new)
        self.backend.init_forward_metadata(batch)
        return self._run(batch, dict(new))

    def decode(self, *names: str) -> int:
        """A token of each of these requests, as a graph's replay has it."""
        batch = padded(self.requests.decode(*names), GRAPH)
        self.backend.init_forward_metadata_out_graph(batch)
        return self._run(batch, dict.fromkeys(names, 1))

    def _run(self, batch: Any, new: dict[str, int]) -> int:
        """All layers of a step; gives how many requests read anything together in it."""
        tokens = len(batch.out_cache_loc)
        forward = self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
        sizes = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
        for number, layer in enumerate(self.layers):
            q, k, v = torch.randn(tokens, sum(sizes)).half().split(sizes, dim=1)
            call = {} if self.sinks is None else {"sinks": self.sinks}
            output = forward(q, k, v, layer, batch, **call).view(tokens, HEADS, HEAD_SIZE)
            begin = 0
            for name, count in new.items():
                there = self.kept[name, number] = list(self.kept[name, number])
                for token in range(begin, begin + count):
                    there.append((self._as_kept(k[token]), self._as_kept(v[token])))
                    exact = self._exact(q[token], there)
                    error = (output[token].double() - exact).norm() / exact.norm()
                    self.errors.append(float(error))
                begin += count
            assert torch.isfinite(output[begin:]).all(), "padding has outputs too"
        count, before = self.backend._planned.sharing, getattr(self, "_counted", 0)
        self._counted = count.requests
        return count.requests - before

    def _as_kept(self, row: torch.Tensor) -> torch.Tensor:
        if self.quantized:
            return (row.float() / SCALE).to(torch.float8_e4m3fn).double() * SCALE
        return row.double()

    def _exact(self, query: torch.Tensor, there: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The definition: [heads, head_size] of one token, which sees all that is kept."""
        keys, values = (
            torch.stack(rows).view(-1, KV_HEADS, HEAD_SIZE).repeat_interleave(HEADS // KV_HEADS, 1)
            for rows in zip(*there, strict=True)
        )
        scores = torch.einsum("hd,khd->hk", query.double().view(HEADS, HEAD_SIZE), keys) * HEAD_SIZE**-0.5
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], dim=1)
        weights = scores.softmax(dim=1)[:, : len(there)]
        return torch.einsum("hk,khd->hd", weights, values)


FEATURES = {
    "plain": {"quantized": False, "sinks": False},
    "quantized": {"quantized": True, "sinks": False},
    "sinks": {"quantized": False, "sinks": True},
}


def serve(monkeypatch: Any, **features: bool) -> dict[str, Any]:
    """The steps, and what they gave."""
    seed = int(np.random.default_rng().integers(1 << 31))
    torch.manual_seed(seed)
    serving = Serving(monkeypatch, **features)
    shared = []
    serving.begin("a")
    shared.append(serving.prefill(a=3 * PAGE + 3))
    serving.begin("b", like="a", prefix=2 * PAGE)
    serving.begin("c")
    shared.append(serving.prefill(b=5, c=20))
    shared += [serving.decode("a", "b", "c") for _ in range(2)]
    shared.append(serving.prefill(c=7))  # as after a prompt in chunks; c's row is of another moment now
    shared.append(serving.decode("c", "b", "a"))
    return {"error": max(serving.errors), "shared": shared, "seed": seed}


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        print(json.dumps({feature: serve(patch, **facts) for feature, facts in FEATURES.items()}))
