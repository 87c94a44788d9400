"""What kernels' objects are made of, of every instruction set on any machine: instructions and symbols."""

from __future__ import annotations

from collections import Counter
from functools import cache

import iced_x86
import pytest
from attention_cases import layout_of, spec_of

from llmir.ir.attention_spec import AttentionSpec
from llmir.kernels.cpu import calibration, loader, lowering
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: What every x86-64 processor has, by the disassembler's names.
BASELINE = {"INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "X64", "CMOV", "SSE", "SSE2", "MULTIBYTENOP"}
#: What comes with a feature, by the disassembler's names.
IMPLIED = {"avx2": {"AVX", "AVX2"}}
FEATURE_NAMES = {value: name for name, value in vars(iced_x86.CpuidFeature).items() if isinstance(value, int)}

CASES = [
    (element_type, head_size, block_size)
    for element_type in ("bf16", "f16", "f32")
    for head_size in (40, 64, 256)  # of large heads LLVM likes to call memset
    for block_size in (1, 32)
]


@cache
def compiled(isa: str, element_type: str, head_size: int, block_size: int) -> bytes:
    features = {
        "window": 100,
        "soft_cap": 30.0,
        "sinks": True,
        "alibi": True,
        "layout": layout_of(element_type, isa, block_size),
    }
    attention = AttentionSpec.dense(6, 2, head_size, element_type, block_size, 0.125, **features)
    return lowering.compile_object(spec_of(attention, isa))


measuring = cache(calibration._compile)


def instructions(data: bytes) -> list[iced_x86.Instruction]:
    """All instructions of an object's code."""
    found = []
    for section in loader._read_sections(data):
        if section.protection == loader._READ_EXECUTE and section.flags & loader._ALLOC:
            code = data[section.offset : section.offset + section.size]
            found += iced_x86.Decoder(64, code)
    return found


def allowed(isa: str) -> set[str]:
    """Features that code for ``isa`` may need, by the disassembler's names."""
    features = INSTRUCTION_SETS[isa].features
    return BASELINE.union(*(IMPLIED.get(feature, {feature.upper()}) for feature in features))


def beyond(isa: str, data: bytes) -> set[str]:
    """Features that the code of an object needs and ``isa`` does not have."""
    needed = {FEATURE_NAMES[feature] for i in instructions(data) for feature in i.cpuid_features()}
    return needed - allowed(isa)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_has_no_instruction_beyond_its_name(isa, case):
    assert beyond(isa, compiled(isa, *case)) == set()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_what_measures_a_machine_has_no_instruction_beyond_its_name(isa):
    assert beyond(isa, measuring(isa)) == set()


@pytest.mark.parametrize(
    ("isa", "lesser", "feature"), [("avx512_bf16", "avx512", "AVX512_BF16"), ("avx512", "avx2", "AVX512F")]
)
def test_an_instruction_beyond_is_found(isa, lesser, feature):
    assert feature in beyond(lesser, compiled(isa, "bf16", 64, 32))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_kernels_use_the_widest_vectors_of_their_name(isa):
    registers = Counter(
        iced_x86.RegisterInfo(i.op_register(operand)).size
        for i in instructions(compiled(isa, "f32", 64, 32))
        for operand in range(i.op_count)
        if i.op_kind(operand) == iced_x86.OpKind.REGISTER
    )
    assert max(registers) == INSTRUCTION_SETS[isa].vector_bytes


@pytest.mark.parametrize(("isa", "mnemonic", "count"), [("avx512_bf16", "VDPBF16PS", 1), ("avx2", "VFMADD231PS", 1)])
def test_bfloat16_is_multiplied_as_the_machine_does_it_best(isa, mnemonic, count):
    wanted = getattr(iced_x86.Mnemonic, mnemonic)
    assert sum(i.mnemonic == wanted for i in instructions(compiled(isa, "bf16", 64, 32))) >= count


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_calls_nothing_that_its_object_does_not_define(isa, case):
    loader.load_object(compiled(isa, *case))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_what_measures_a_machine_calls_nothing_that_its_object_does_not_define(isa):
    loader.load_object(measuring(isa))
