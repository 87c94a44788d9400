"""The instruction sets of x86-64 that kernels are compiled for, and what each of them can do.

A kernel's code is compiled for exactly the features of its instruction set, whatever the machine that compiles it has.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Multiply-adds that a core has under way: two multipliers, four cycles each (Zen 3 to 5, Intel since Skylake). With
#: fewer sums they wait: 3 x 3 sums in place of 3 x 2, or each of six in two parts, took 0.90 to 0.98 of the time in
#: decode of 9/3 x 64 heads in float16 and bfloat16 on Zen 3; float32, bound by memory, took 0.97 to 1.03.
SUMS_IN_FLIGHT = 8


@dataclass(frozen=True)
class InstructionSet:
    """One of them."""

    name: str
    features: frozenset[str]
    """What a machine must have, as /proc/cpuinfo calls it; everything that code may use beyond the x86-64 baseline."""
    lanes: int
    """float32 lanes of a vector register."""
    registers: int
    """Vector registers."""
    tuned_for: str
    """The processor, by LLVM's name, whose latencies and ports instructions are ordered by; code runs on all others."""
    accumulators: int
    """Registers that may hold sums: the others hold operands and what the compiler needs for addresses and masks."""
    multiplies_pairs: bool = False
    """Whether it has a dot product of bfloat16 pairs, and an instruction that rounds to bfloat16."""
    scales: bool = False
    """Whether it has an instruction that multiplies by a power of two."""
    masks: bool = False
    """Whether it stores some of a vector's 16-bit lanes."""

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector register."""
        return 4 * self.lanes

    @property
    def llvm_features(self) -> tuple[str, ...]:
        """The features as LLVM calls them, sorted."""
        return tuple(sorted(feature.replace("_", "") for feature in self.features))


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

#: By name, the best first: a machine's is the first one whose features it has. vLLM's CPU build asks for AVX2 too.
INSTRUCTION_SETS: dict[str, InstructionSet] = {
    instructions.name: instructions
    for instructions in (
        InstructionSet(
            "avx512_bf16",
            _AVX512 | {"avx512_bf16"},
            lanes=16,
            registers=32,
            tuned_for="znver4",
            accumulators=24,
            multiplies_pairs=True,
            scales=True,
            masks=True,
        ),
        InstructionSet(
            "avx512",
            _AVX512,
            lanes=16,
            registers=32,
            tuned_for="icelake-server",
            accumulators=24,
            scales=True,
            masks=True,
        ),
        InstructionSet("avx2", _AVX2, lanes=8, registers=16, tuned_for="znver3", accumulators=12),
    )
}
