"""SGLang's Triton kernels as a peer: decode and extend, called as its triton backend calls them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

import numpy as np
import torch

from on_gpu.peer import Absent, Peer, Side, Sources, source_version
from on_gpu.sources import is_installed, load, multiprocessors, shim_sglang
from on_gpu.step import Step

NAME = "SGLang Triton"
#: As sglang/srt/server_args.py has it (triton_attention_num_kv_splits).
_SPLITS = 8
#: As sglang/srt/layers/attention/triton_backend.py has it.
_LEAST_SCHEDULED = 256
_OPS = "sglang.kernels.ops.attention"


class Decode:
    """``decode_attention_fwd``: split over the keys of a request."""

    def __init__(self, decode: ModuleType, schedule: ModuleType, step: Step):
        self.name = f"{NAME}, decode"
        self._attend, self._choose, self._step = decode.decode_attention_fwd, schedule.get_num_kv_splits_triton, step
        self.output = step.output()
        requests, heads, device = step.batch.requests, step.shape.num_heads, step.device
        self._logits = torch.empty(requests, heads, _SPLITS, step.shape.head_size, device=device)
        self._lse = torch.empty(requests, heads, _SPLITS, device=device)
        self._splits = torch.empty(requests, dtype=torch.int32, device=device)
        self._indptr, self._indices = slots_of(step, step.batch.seq_lens)
        self._keys, self._values = list(step.keys), list(step.values)

    def prepare(self) -> None:
        """In how many parts each request is read."""
        requests = self._step.batch.requests
        self._choose[(1,)](
            self._splits,
            self._step.seq_lens,
            requests,
            1,
            self._step.shape.num_heads,
            self._step.shape.num_kv_heads,
            _SPLITS,
            multiprocessors(),
            MAX_NUM_SEQ=max(_LEAST_SCHEDULED, 1 << (requests - 1).bit_length()),
        )

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        step = self._step
        self._attend(
            step.query,
            self._keys[layer],
            self._values[layer],
            self.output,
            self._indptr,
            self._indices,
            self._logits,
            self._lse,
            self._splits,
            _SPLITS,
            step.scale,
            1.0,
            1.0,
        )


class Extend:
    """``extend_attention_fwd``: new tokens against each other, and against what is in the cache before them."""

    def __init__(self, extend: ModuleType, step: Step):
        self.name = f"{NAME}, extend"
        self._attend, self._step, self.output = extend.extend_attention_fwd, step, step.output()
        batch = step.batch
        self._indptr, self._indices = slots_of(step, batch.seq_lens - np.array(batch.new, np.int32))
        self._keys, self._values = list(step.keys), list(step.values)
        new = [
            step.request_slots(request, int(end) - count, int(end))
            for request, (end, count) in enumerate(zip(batch.seq_lens, batch.new, strict=True))
        ]
        slots = torch.cat(new)
        # The kernel wants the new keys and values apart from the cache too, as the model has just computed them.
        self._new = [(keys[slots], values[slots]) for keys, values in zip(step.keys, step.values, strict=True)]

    def prepare(self) -> None:
        """Nothing is scheduled."""

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        step = self._step
        self._attend(
            step.query,
            *self._new[layer],
            self.output,
            self._keys[layer],
            self._values[layer],
            step.query_start,
            self._indptr,
            self._indices,
            None,
            True,
            None,
            step.most_new,
            1.0,
            1.0,
            sm_scale=step.scale,
        )


def slots_of(step: Step, lengths: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of each request's first tokens: int32 ``[requests + 1]`` and int64 ``[sum of lengths]``."""
    indptr = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(step.device)
    slots = [step.request_slots(request, 0, int(length)) for request, length in enumerate(lengths)]
    return indptr, torch.cat(slots)


def find(sources: Sources, device: torch.device) -> Peer:
    """The kernels out of a carried source tree, or of the installed SGLang."""
    if sources.sglang:
        shim_sglang(sources.sglang)
        version = source_version(sources.sglang / "sglang")
    elif device.type == "cuda" and is_installed("sglang"):
        version = metadata.version("sglang")
    else:
        raise Absent("SGLang is not installed and no --sglang-source was given")
    decode, extend, schedule = (load(f"{_OPS}.{name}") for name in ("decode_attention", "extend_attention", "metadata"))

    def sides(step: Step) -> Sequence[Side]:
        return [Decode(decode, schedule, step)] if step.batch.decodes else [Extend(extend, step)]

    return Peer(NAME, version, sides)
