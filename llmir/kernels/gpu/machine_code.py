"""What is in a compiled GPU kernel, read from its machine code: parameters, registers, spills, instructions of note."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmir.errors import KernelError

#: Products of matrices: of a warp (HMMA), of a warp group on Hopper (HGMMA), into tensor memory on Blackwell (UTCHMMA),
#: of a wave on CDNA (v_mfma); each also for other element types.
_MATRIX = re.compile(r"\b(?:UTC[A-Z]*MMA|[BDHIQ]G?MMA)(?:\.\w+)*|\bv_mfma_\w+")
#: Copies from memory into shared memory that no thread waits for: of a thread (LDGSTS, cp.async), of the tensor memory
#: accelerator (UTMALDG, UBLKCP), of a wave on CDNA (loads with "lds").
_ASYNCHRONOUS = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)(?:\.\w+)*|\b(?:buffer|global)_load_\w+(?=[^\n]*\blds\b)")
#: Loads and stores of a thread's own memory, which is where values go that registers have no room for.
_LOCAL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_\w+")

_CUBIN_PARAMETER = re.compile(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)")
_CUBIN_USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
_AMD_NUMBER = re.compile(r"^ +(?:- )?\.(\w+): +(\d+)$", re.MULTILINE)
_AMD_PARAMETER = re.compile(r"\.offset: +(\d+)\n +\.size: +(\d+)\n +\.value_kind: +(\w+)")
#: Seconds for a tool to read one kernel.
_PATIENCE = 120.0
#: A hidden argument is one that the driver fills in.
_AMD_HIDDEN = "hidden"


@dataclass(frozen=True)
class MachineCode:
    """Facts of one kernel function."""

    registers: int
    """Of a thread; on CDNA vector registers, those for matrix products included."""
    local_bytes: int
    """Of a thread's own memory, where values spill to."""
    local_accesses: int
    """Instructions that load from it or store to it."""
    spilled_registers: int | None
    """As the compiler counted them, those moved to registers of matrix products included; None: it does not tell."""
    static_shared_bytes: int
    """Shared memory of a thread block that is not asked for at launch."""
    parameters: tuple[tuple[int, int], ...]
    """(offset, size) in bytes of every run-time parameter, in order."""
    matrix_instructions: dict[str, int]
    """Instructions that multiply matrices: how many of each stand in the code."""
    asynchronous_copies: dict[str, int]
    """Instructions that copy into shared memory without waiting: how many of each stand in the code."""

    @property
    def spills(self) -> bool:
        """Whether any value is kept in memory because registers had no room for it."""
        return bool(self.local_bytes or self.local_accesses)


def of_cubin(cubin: bytes) -> MachineCode:
    """The facts of a cubin with one kernel, by the tools in Triton's wheel; KernelError where they cannot read it."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        facts = _output(knobs.nvidia.cuobjdump.path, "-elf", "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    usage = {name: int(value) for name, value in _CUBIN_USAGE.findall(facts)}
    if "REG" not in usage or not code:
        raise KernelError("cuobjdump and nvdisasm found no kernel in a cubin: install Triton again")
    parameters = sorted(tuple(int(number, 16) for number in found) for found in _CUBIN_PARAMETER.findall(facts))
    return MachineCode(
        registers=usage["REG"],
        local_bytes=max(usage["STACK"], usage["LOCAL"]),
        local_accesses=len(_LOCAL.findall(code)),
        spilled_registers=None,
        static_shared_bytes=usage["SHARED"],
        parameters=tuple((offset, size) for _, offset, size in parameters),
        matrix_instructions=_counted(_MATRIX.findall(code)),
        asynchronous_copies=_counted(_ASYNCHRONOUS.findall(code)),
    )


def of_amdgcn(assembly: str) -> MachineCode:
    """The facts of a kernel in the assembly that its hsaco was made from, by the metadata at its end."""
    code, _, metadata = assembly.partition(".amdgpu_metadata")
    facts = {name: int(value) for name, value in _AMD_NUMBER.findall(metadata)}
    parameters = [found for found in _AMD_PARAMETER.findall(metadata) if not found[2].startswith(_AMD_HIDDEN)]
    try:
        return MachineCode(
            registers=facts["vgpr_count"],
            local_bytes=facts["private_segment_fixed_size"],
            local_accesses=len(_LOCAL.findall(code)),
            spilled_registers=facts["vgpr_spill_count"],  # scalar registers spill into vector registers
            static_shared_bytes=facts["group_segment_fixed_size"],
            parameters=tuple((int(offset), int(size)) for offset, size, _ in parameters),
            matrix_instructions=_counted(_MATRIX.findall(code)),
            asynchronous_copies=_counted(_ASYNCHRONOUS.findall(code)),
        )
    except KeyError as error:
        raise KernelError(f"a kernel's metadata has no {error}: install Triton again") from error


def _output(*command: str) -> str:
    """Standard output of one of the tools."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{command[0]} did not end within {_PATIENCE:.0f} s: install Triton again") from error
    if done.returncode != 0:
        raise KernelError(
            f"{command[0]} ended with status {done.returncode} ({done.stderr.strip()}): install Triton again"
        )
    return done.stdout


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
