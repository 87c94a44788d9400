"""The peers that benchmarks/gpu.py times llmir against: which are here, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from on_gpu import flash_attention_peer, flashinfer_peer, sglang_peer, unified_attention_peer
from on_gpu.peer import Absent, Peer, Sources, one_line


@dataclass(frozen=True)
class Peers:
    """Who is here, and why the others are not."""

    present: tuple[Peer, ...]
    absent: dict[str, str]

    @classmethod
    def find(cls, sources: Sources, device: torch.device) -> Peers:
        """Everybody who can be loaded."""
        finders: dict[str, Callable[[Sources, torch.device], Peer]] = {
            flash_attention_peer.NAME: flash_attention_peer.find,
            flashinfer_peer.NAME: flashinfer_peer.find,
            unified_attention_peer.NAME: unified_attention_peer.find,
            sglang_peer.NAME: sglang_peer.find,
        }
        present, absent = [], {}
        for name, find in finders.items():
            try:
                present.append(find(sources, device))
            except Absent as reason:
                absent[name] = str(reason)
            except Exception as error:  # whatever another project's import raises is why it is absent
                absent[name] = one_line(error)
        return cls(tuple(present), absent)
