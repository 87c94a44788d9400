"""How many thread blocks a multiprocessor holds at a time, by what each of them takes of it."""

from __future__ import annotations

from dataclasses import dataclass

from llmir.kernels.gpu.toolchain import backend
from llmir.target import Target


@dataclass(frozen=True)
class Multiprocessor:
    """What a streaming multiprocessor (NVIDIA) or a compute unit (AMD) has for thread blocks, besides shared memory."""

    warps: int
    """Of each of its SCHEDULERS."""
    registers: int
    """32-bit registers of each of its schedulers, for all threads."""
    register_unit: int
    """A warp's registers are whole multiples of this."""
    blocks: int
    reserved_bytes: int = 0
    """Shared memory that the driver keeps for itself in each thread block."""
    tensor_columns: int = 0
    """Columns of tensor memory; 0: it has none."""


#: Parts of a multiprocessor with registers of their own, on all architectures here; a warp lives in one of them.
SCHEDULERS = 4
#: NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and "Tensor Memory" in the PTX
#: manual; a warp's registers are allocated 256 at a time. AMD: "AMD Instinct MI300" CDNA3 instruction set architecture:
#: four SIMDs of eight waves and 512 vector registers by 64 lanes, allocated 8 at a time; thread blocks are limited by
#: their waves alone.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024),
    "sm_90": Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024),
    "sm_100": Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024, tensor_columns=512),
    "gfx942": Multiprocessor(8, 512 * 64, 8 * 64, 32),
}


def shared_memory(architecture: str) -> tuple[int, int]:
    """Bytes of shared memory that a thread block may use on ``architecture``, and that a multiprocessor has."""
    target = Target.named(f"{backend(architecture)}:{architecture}")
    return target.shared_memory, target.cache_bytes(1)


def resident_blocks(
    architecture: str, warps: int, warp_threads: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Thread blocks of ``warps`` warps that a multiprocessor holds at a time; 0: not even one fits.

    ``registers`` of a thread; ``shared_bytes`` and ``tensor_columns`` of a thread block, without the driver's share.
    """
    chip, (most, all_bytes) = MULTIPROCESSORS[architecture], shared_memory(architecture)
    if shared_bytes > most:
        return 0
    per_warp = -(-registers * warp_threads // chip.register_unit) * chip.register_unit
    limits = [chip.blocks, SCHEDULERS * min(chip.warps, chip.registers // per_warp) // warps]
    if shared_bytes + chip.reserved_bytes:
        limits.append(all_bytes // (shared_bytes + chip.reserved_bytes))
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)
