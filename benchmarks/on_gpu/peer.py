"""What a peer is, that benchmarks/gpu.py times llmir against.

A peer is a kernel as its own project calls it: with its own cache layout (of the same keys and values), its own
preparation of a step, its own choice of variants. One file each: flash_attention_peer.py, flashinfer_peer.py,
unified_attention_peer.py (vLLM's Triton kernel), sglang_peer.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from on_gpu.step import Step

#: Tokens in a page of a peer's cache: vLLM's default on CUDA.
PAGE_SIZE = 16


class Side(Protocol):
    """One implementation on one step, ready to run."""

    name: str
    output: torch.Tensor
    """``[tokens, heads, head_size]``: written by :meth:`run`."""

    def prepare(self) -> None:
        """What is done once a step for all layers, before the first :meth:`run`."""

    def run(self, layer: int) -> None:
        """Attention of one layer."""


class Absent(Exception):
    """A peer cannot be had here; the text says why."""


class Unserved(Exception):
    """A peer has no kernel for a batch; the text says why."""


@dataclass(frozen=True)
class Sources:
    """Where peers' sources were carried to; None: the installed package, if there is one."""

    vllm: Path | None = None
    sglang: Path | None = None
    flashinfer: Path | None = None
    fa3: Path | None = None
    """vLLM's ``_vllm_fa3_C.abi3.so``, or that file packed by xz."""


@dataclass(frozen=True)
class Peer:
    """A peer that is here."""

    name: str
    version: str
    sides: Callable[[Step], Sequence[Side]]
    """The ways in which it would serve a step; raises Unserved."""


def one_line(error: BaseException, most: int = 300) -> str:
    """Kind and first words of an error of another project."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def source_version(package: Path) -> str:
    """The version in a source tree's ``_version.py`` or ``_build_meta.py``; "unknown" where it has none."""
    for file in ("_version.py", "_build_meta.py"):
        path = package / file
        found = re.search(r"__version__.*= *['\"]([^'\"]+)['\"]", path.read_text()) if path.exists() else None
        if found:
            return found[1]
    return "unknown"
