"""GPUs of AMD."""

from __future__ import annotations

from llmir.targets.gpu.chip import LEAST_ROWS, Chip, Multiprocessor, Tile
from llmir.targets.gpu.kind import Gpu

#: Compute units: "AMD Instinct MI300" CDNA3 instruction set architecture, four SIMDs of eight waves and 512 vector
#: registers by 64 lanes, allocated 8 at a time; thread blocks are limited by their waves alone. All tiles share 64 KB;
#: none of prefill spills. Its 8-bit numbers are of another format than QUANTIZED_DTYPE.
CHIPS = {
    # AMD Instinct MI300X data sheet; caches: AMD CDNA 3 whitepaper, an L2 of 2048 bytes a cycle for each of 8 dies and
    # the Infinity Cache. Memory latency: rounded from published pointer chases.
    "gfx942": Chip(
        model="AMD Instinct MI300X",
        units=304,
        gigahertz=2.1,
        bandwidth=5300e9,
        latency=400e-9,
        bf16_rate=1307.4e12,
        f32_rate=163.4e12,
        shared_memory=(64 << 10, 64 << 10),
        caches=((4 << 20, 8, 8 * 2048 * 2.1e9), (256 << 20, 1, 17.2e12)),
        multiprocessor=Multiprocessor(8, 512 * 64, 8 * 64, 32),
        queries_in_registers=True,
        prefill={64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 4, 1)},
        decode={128: Tile(LEAST_ROWS, 32, 4, 3), 256: Tile(LEAST_ROWS, 32, 4, 2)},
    ),
}


class Hip(Gpu):
    """Architectures by AMD's names."""

    prefix = machine = "hip"
    chips, warp_threads = CHIPS, 64
