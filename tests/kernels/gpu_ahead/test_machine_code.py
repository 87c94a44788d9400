"""What stands in the machine code of kernels compiled ahead of time, with the pinned release of Triton."""

from dataclasses import replace
from itertools import pairwise

import pytest
from ahead_cases import FEATURES, LLAMA_3_8B, MODELS, PLANS, spec_of

from llmir.ir.dtypes import DTYPES
from llmir.ir.kernel_spec import KernelSpec, padded
from llmir.kernels.gpu.occupancy import shared_memory
from llmir.plan import Plan

#: A tile of so many rows or more is one of wgmma's.
WARP_GROUP_ROWS = 64
CUBINS = ("sm_80", "sm_90", "sm_100")
MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
SHIPPED = sorted(PLANS.glob("*.json"))


def no_spills(programs):
    return {name: binary.code for name, binary in programs.items() if binary.code.spills} == {}


def fits(programs):
    return all(
        binary.resident_blocks > 0 and binary.shared_bytes <= shared_memory(binary.architecture)[0]
        for binary in programs.values()
    )


def units(binary):
    """The matrix instructions of a binary, without their shapes."""
    return {name.split(".")[0].split("_f32")[0] for name in binary.code.matrix_instructions}


def shipped_specs(path):
    return [kernel.spec for kernel in Plan.read(path).kernels]


def test_there_are_plans_of_the_models_that_figures_are_given_for():
    heads = {
        (s.num_heads, s.num_kv_heads, s.head_size) for p in SHIPPED for s in (k.attention for k in shipped_specs(p))
    }
    assert heads >= set(MODELS.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShippedPlans:
    def test_spill_nothing(self, binaries, path):
        assert all(no_spills(binaries(spec)) for spec in shipped_specs(path))

    def test_stay_within_the_shared_memory_of_the_chip(self, binaries, path):
        assert all(fits(binaries(spec)) for spec in shipped_specs(path))

    def test_multiply_with_wgmma_where_rows_allow(self, binaries, path):
        for spec in shipped_specs(path):
            for variant in spec.gpu_variants:
                wanted = {"HGMMA"} if variant.row_tile >= WARP_GROUP_ROWS else {"HMMA"}
                assert units(binaries(spec)[variant.name]) == wanted

    def test_prefill_has_rows_for_wgmma(self, path):
        assert all(spec.variant("prefill").row_tile >= WARP_GROUP_ROWS for spec in shipped_specs(path))


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_every_feature_compiles_for_sm_90_without_spills(binaries, changes):
    programs = binaries(spec_of(**changes))
    assert no_spills(programs)
    assert fits(programs)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_size_compiles_for_sm_90_without_spills(binaries, head_size):
    programs = binaries(spec_of(heads=(*LLAMA_3_8B[:2], head_size)))
    assert no_spills(programs)
    assert fits(programs)


@pytest.mark.parametrize("isa", MATRIX_UNIT)
class TestEveryArchitecture:
    def test_spills_nothing(self, binaries, isa):
        assert no_spills(binaries(spec_of(isa)))

    def test_fits(self, binaries, isa):
        assert fits(binaries(spec_of(isa)))

    def test_prefill_multiplies_on_its_best_matrix_unit(self, binaries, isa):
        assert units(binaries(spec_of(isa))["prefill"]) == {MATRIX_UNIT[isa]}

    def test_only_attention_multiplies_matrices(self, binaries, isa):
        programs = binaries(spec_of(isa))
        multiplying = {name for name, binary in programs.items() if binary.code.matrix_instructions}
        assert multiplying == {"decode", "prefill"}


@pytest.mark.parametrize("isa", CUBINS)
def test_only_keys_and_values_are_copied_ahead(binaries, isa):
    """Copies of 16 bytes a thread; of the page numbers, which are loaded one tile ahead into registers, of 4."""
    programs = binaries(spec_of(isa))
    for name in ("decode", "prefill"):
        copies = programs[name].code.asynchronous_copies
        assert copies
        assert all(copy.endswith(".128") for copy in copies)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_a_stage_more_is_a_tile_of_keys_and_values_more_in_shared_memory(binaries, name):
    spec = spec_of()
    variant, s = spec.variant(name), spec.attention
    tile_bytes = 2 * variant.key_chunk * padded(s.head_size) * DTYPES[s.dtype].bytes_of(1)
    taken = [
        binaries(KernelSpec(s, spec.isa, (replace(variant, stages=stages),)))[name].shared_bytes for stages in (2, 3, 4)
    ]
    assert [after - before for before, after in pairwise(taken)] == [tile_bytes, tile_bytes]


def test_an_fp8_cache_takes_half_the_shared_memory_for_keys_and_values(binaries):
    variant = spec_of().variant("decode")
    tiles = (variant.stages - 1) * 2 * variant.key_chunk * LLAMA_3_8B[2] * DTYPES["bf16"].bytes_of(1)
    saved = binaries(spec_of())["decode"].shared_bytes - binaries(spec_of(quantized=True))["decode"].shared_bytes
    assert saved >= tiles // 2
