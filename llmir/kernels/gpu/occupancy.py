"""How many thread blocks a multiprocessor holds at a time, by what each of them takes of it."""

from __future__ import annotations

from llmir.targets.gpu.architectures import chip_of

#: Parts of a multiprocessor with registers of their own, on all architectures here; a warp lives in one of them.
SCHEDULERS = 4


def shared_memory(architecture: str) -> tuple[int, int]:
    """Bytes of shared memory that a thread block may use on ``architecture``, and that a multiprocessor has."""
    return chip_of(architecture).shared_memory


def resident_blocks(
    architecture: str, warps: int, warp_threads: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Thread blocks of ``warps`` warps that a multiprocessor holds at a time; 0: not even one fits.

    ``registers`` of a thread; ``shared_bytes`` and ``tensor_columns`` of a thread block, without the driver's share.
    """
    chip, (most, all_bytes) = chip_of(architecture).multiprocessor, shared_memory(architecture)
    if shared_bytes > most:
        return 0
    per_warp = -(-registers * warp_threads // chip.register_unit) * chip.register_unit
    limits = [chip.blocks, SCHEDULERS * min(chip.warps, chip.registers // per_warp) // warps]
    if shared_bytes + chip.reserved_bytes:
        limits.append(all_bytes // (shared_bytes + chip.reserved_bytes))
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)
