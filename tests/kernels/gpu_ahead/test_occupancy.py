"""How many thread blocks a multiprocessor holds."""

import pytest

from llmir.kernels.gpu.occupancy import resident_blocks, shared_memory

KIB = 1 << 10


@pytest.mark.parametrize(
    ("what", "arguments", "blocks"),
    [
        ("most thread blocks", ("sm_90", 1, 32, 16, 0), 32),
        ("warps", ("sm_90", 8, 32, 16, 0), 8),
        ("registers", ("sm_90", 4, 32, 128, 0), 4),
        ("registers, of which a warp has whole units", ("sm_90", 4, 32, 129, 0), 3),
        ("shared memory, with a KiB of the driver's", ("sm_90", 4, 32, 32, 113 * KIB), 2),
        ("one KiB too much for two", ("sm_90", 4, 32, 32, 114 * KIB), 1),
        ("more shared memory than a thread block may use", ("sm_80", 4, 32, 32, 164 * KIB), 0),
        ("tensor memory", ("sm_100", 4, 32, 32, 0, 256), 2),
        ("registers of an MI300X, where two waves of 64 fit each SIMD", ("gfx942", 4, 64, 256, 0), 2),
        ("shared memory of an MI300X, of which the driver keeps none", ("gfx942", 1, 64, 32, 32 * KIB), 2),
    ],
)
def test_what_limits_thread_blocks(what, arguments, blocks):
    assert resident_blocks(*arguments) == blocks


def test_registers_for_no_warp_mean_no_thread_block():
    assert resident_blocks("sm_90", 16, 32, 255, 0) == 0


@pytest.mark.parametrize(
    ("isa", "block", "all_blocks"), [("sm_80", 163, 164), ("sm_90", 227, 228), ("sm_100", 227, 228), ("gfx942", 64, 64)]
)
def test_shared_memory_is_the_target_s(isa, block, all_blocks):
    assert shared_memory(isa) == (block * KIB, all_blocks * KIB)
