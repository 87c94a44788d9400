"""The manifest: what is known of binaries compiled ahead of time, for who launches them or looks for regressions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmir.kernels.gpu.ahead import Binary
from llmir.kernels.gpu.occupancy import shared_memory

#: Raised when a field changes its meaning.
FORMAT = 1

#: What the thread blocks of a launch are.
_GRIDS = {
    "append": "[tokens of the step]",
    "merge": "[any number]: thread blocks take the step's merges, for each query head, in turn",
}
_ITEMS = "[any number]: thread blocks take the variant's items, for each KV head, in turn"


def file_name(symbol: str, binary: Binary) -> str:
    """Where the binary of a kernel's program lies, beside the manifest."""
    return f"{symbol}.{binary.program}{binary.suffix}"


def manifest(kernels: Mapping[str, Sequence[Binary]]) -> dict[str, Any]:
    """A dictionary of JSON values for the binaries of every kernel, which are of one architecture.

    A launch hands over ``parameters`` in order (scratch pointers may be null where ``scratch_bytes`` is 0) and asks for
    ``shared_bytes`` of dynamic shared memory in thread blocks of ``threads`` threads.
    """
    first = next(binary for binaries in kernels.values() for binary in binaries)
    block_bytes, unit_bytes = shared_memory(first.architecture)
    return {
        "format": FORMAT,
        "architecture": first.architecture,
        "triton": first.triton,
        "shared_bytes_of_a_block_at_most": block_bytes,
        "shared_bytes_of_a_multiprocessor": unit_bytes,
        "kernels": {
            symbol: {binary.program: _record(symbol, binary) for binary in binaries}
            for symbol, binaries in kernels.items()
        },
    }


def _record(symbol: str, binary: Binary) -> dict[str, Any]:
    code = binary.code
    return {
        "file": file_name(symbol, binary),
        "sha256": hashlib.sha256(binary.content).hexdigest(),
        "entry": binary.entry,
        "parameters": [asdict(parameter) for parameter in binary.parameters],
        "grid": _GRIDS.get(binary.program, _ITEMS),
        "warps": binary.warps,
        "threads": binary.threads,
        "stages": binary.stages,
        "shared_bytes": binary.shared_bytes,
        "scratch_bytes": binary.scratch_bytes,
        "tensor_memory_columns": binary.tensor_columns,
        "registers_of_a_thread": code.registers,
        "spills": {
            "local_bytes_of_a_thread": code.local_bytes,
            "local_instructions": code.local_accesses,
            "registers": code.spilled_registers,
        },
        "matrix_instructions": code.matrix_instructions,
        "asynchronous_copies": code.asynchronous_copies,
        "blocks_of_a_multiprocessor": binary.resident_blocks,
    }
