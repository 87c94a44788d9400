"""GPUs of NVIDIA."""

from __future__ import annotations

from llmir.targets.gpu.chip import LEAST_ROWS, Chip, Multiprocessor, Tile
from llmir.targets.gpu.kind import Gpu

#: At head size 256, half the keys let two thread blocks share an SM instead of one.
_HALF_THE_KEYS = Tile(LEAST_ROWS, 32, 4, 3)

#: Shared memory: tables of compute capabilities in the CUDA C++ Programming Guide; L2 bandwidth of A100: 5120 bytes a
#: cycle (NVIDIA A100 whitepaper). Memory latency: cycles of a pointer chase (Luo et al., "Benchmarking and Dissecting
#: the Nvidia Hopper GPU Architecture", arXiv 2402.13499) at the boost clock. Multiprocessors: "Technical
#: Specifications per Compute Capability" in the same guide, and "Tensor Memory" in the PTX manual; a warp's registers
#: are allocated 256 at a time. Tiles of prefill: a few features still spill a little, 8 to 16 bytes on sm_80 and
#: sm_100, and on the latter, at head size 256, 80 with a soft cap and 240 with 128 query heads a KV head; nothing does
#: on sm_90.
CHIPS = {
    # NVIDIA A100 80 GB data sheet and whitepaper.
    "sm_80": Chip(
        model="NVIDIA A100 SXM 80 GB",
        units=108,
        gigahertz=1.41,
        bandwidth=2039e9,
        latency=466 / 1.41e9,
        bf16_rate=312e12,
        f32_rate=19.5e12,
        shared_memory=(163 << 10, 164 << 10),
        caches=((40 << 20, 1, 5120 * 1.41e9),),
        multiprocessor=Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024),
        prefill={128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 3)},
        decode={256: _HALF_THE_KEYS},
    ),
    # NVIDIA H100 data sheet and whitepaper; L2 as wide as A100's (as in PMC10448217, table 3).
    "sm_90": Chip(
        model="NVIDIA H100 SXM",
        units=132,
        gigahertz=1.83,
        bandwidth=3350e9,
        latency=479 / 1.755e9,
        bf16_rate=989.4e12,
        f32_rate=66.9e12,
        shared_memory=(227 << 10, 228 << 10),
        caches=((50 << 20, 1, 5120 * 1.755e9),),
        multiprocessor=Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024),
        quantizes=True,
        prefill={256: Tile(64, 32, 8, 3)},
        decode={256: _HALF_THE_KEYS},
    ),
    # NVIDIA HGX B200 data sheet, an eighth of it; SMs, clock and L2 size: "Nvidia's B200: Keeping the CUDA Juggernaut
    # Rolling" (Chips and Cheese, 2025). Nothing is published of its L2 bandwidth and memory latency: taken as H100's,
    # the former once for each of its two dies.
    "sm_100": Chip(
        model="NVIDIA B200",
        units=148,
        gigahertz=1.85,
        bandwidth=8000e9,
        latency=479 / 1.755e9,
        bf16_rate=2250e12,
        f32_rate=75e12,
        shared_memory=(227 << 10, 228 << 10),
        caches=((126 << 20, 1, 2 * 5120 * 1.85e9),),
        multiprocessor=Multiprocessor(16, 16384, 256, 32, reserved_bytes=1024, tensor_columns=512),
        quantizes=True,
        prefill={128: Tile(128, 32, 8, 3), 256: Tile(64, 16, 8, 3)},
        decode={256: _HALF_THE_KEYS},
    ),
}


class Cuda(Gpu):
    """Architectures by compute capability."""

    prefix = machine = "cuda"
    chips, warp_threads = CHIPS, 32
