"""The object loader: what it loads runs, what it cannot load is a KernelError, no page is writable and executable."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from elf_writer import ABS64, ALLOC, EXECUTE, NOBITS, PC32, PC64, PLT32, THREAD_LOCAL, WRITE, Section, object_file
from hypothesis import given
from hypothesis import strategies as st

from llmir.errors import KernelError
from llmir.kernels.cpu.loader import load_object, process_symbol

INTEGER = ctypes.c_int64

TWICE = bytes.fromhex("488d043fc3")  # lea rax, [rdi + rdi]; ret
LOAD = bytes.fromhex("48b8 0000000000000000 488b00 c3")  # mov rax, ADDRESS; mov rax, [rax]; ret
COUNT = bytes.fromhex("48b8 0000000000000000 48ff00 488b00 c3")  # mov rax, ADDRESS; inc qword [rax]; as above
JUMP_FAR = bytes.fromhex("48b8 0000000000000000 ffe0")  # mov rax, ADDRESS; jmp rax: a call in the large code model
JUMP_NEAR = bytes.fromhex("e9 00000000")  # jmp RELATIVE
OFFSET = bytes.fromhex("48b8 0000000000000000 c3")  # mov rax, VALUE; ret

CODE, CONSTANTS, DATA, ZEROES = ALLOC | EXECUTE, ALLOC, ALLOC | WRITE, ALLOC | WRITE


def example() -> bytes:
    """An object with every kind of section and relocation that LLVM writes for kernels."""
    parts = [TWICE, LOAD, COUNT, COUNT, JUMP_FAR, JUMP_NEAR, OFFSET]
    starts = [16 * sum(-(-len(p) // 16) for p in parts[:i]) for i in range(len(parts))]
    code = b"".join(p.ljust(-(-len(p) // 16) * 16, b"\xcc") for p in parts)
    names = ["twice", "constant", "count", "count_zeroes", "absolute", "near", "distance"]
    symbols = {name: (1, start) for name, start in zip(names, starts, strict=True)}
    symbols |= {"CONSTANT": (2, 8), "DATA": (3, 0), "ZEROES": (4, 0)}
    at = dict(zip(names, starts, strict=True))
    relocations = [
        (at["constant"] + 2, ABS64, "CONSTANT", 0),
        (at["count"] + 2, ABS64, "DATA", 8),
        (at["count_zeroes"] + 2, ABS64, "ZEROES", 4096),
        (at["absolute"] + 2, ABS64, "twice", 0),
        (at["near"] + 1, PLT32, "twice", -4),
        (at["distance"] + 2, PC64, "twice", 0),
    ]
    sections = [
        Section(CODE, code, relocations=relocations),
        Section(CONSTANTS, struct.pack("<qq", -1, 42)),
        Section(DATA, struct.pack("<qq", -1, 100), alignment=64),
        Section(ZEROES, bytes(8192), kind=NOBITS),
    ]
    return object_file(sections, symbols)


def code_object(code: bytes = TWICE, flags: int = CODE, **options) -> bytes:
    return object_file([Section(flags, code, **options)], {"f": (1, 0)})


def permissions(address: int) -> str:
    """The protection of the page at ``address``, as /proc/self/maps writes it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, mode = line.split()[:2]
        start, end = (int(x, 16) for x in bounds.split("-"))
        if start <= address < end:
            return mode
    raise AssertionError("not mapped")


def call(name: str, *arguments: int) -> int:
    return load_object(example()).function(name, [INTEGER] * len(arguments), INTEGER)(*arguments)


def test_code_runs():
    assert call("twice", 21) == 42


def test_constants_are_reached():
    assert call("constant") == 42


@pytest.mark.parametrize(("name", "start"), [("count", 100), ("count_zeroes", 0)])
def test_data_is_written_and_belongs_to_one_load(name, start):
    functions = [load_object(example()).function(name, [], INTEGER) for _ in range(2)]
    assert [functions[0](), functions[0](), functions[1]()] == [start + 1, start + 2, start + 1]


def test_calls_inside_the_object_by_address():
    assert call("absolute", 4) == 8


def test_calls_inside_the_object_are_relative():
    assert call("near", 4) == 8


def test_relative_64_bit_values_count_from_their_own_place():
    loaded = load_object(example())
    expected = loaded.address("twice") - (loaded.address("distance") + 2)
    assert loaded.function("distance", [], INTEGER)() == expected


def test_no_page_is_writable_and_executable():
    loaded = load_object(example())
    modes = {name: permissions(loaded.address(name)) for name in ("twice", "CONSTANT", "DATA", "ZEROES")}
    assert modes == {"twice": "r-xp", "CONSTANT": "r--p", "DATA": "rw-p", "ZEROES": "rw-p"}


def test_function_outlives_the_object_it_came_from():
    function = load_object(example()).function("constant", [], INTEGER)
    gc.collect()
    assert function() == 42


def test_unknown_function_is_an_error_that_lists_the_known_ones():
    with pytest.raises(KernelError, match=r"no symbol 'g'.*it has: f"):
        load_object(code_object()).function("g", [])


def patch(data: bytes, place: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a 64-bit little-endian ELF file"),
        (b"MZ" + bytes(200), "not a 64-bit little-endian ELF file"),
        (patch(code_object(), 4, "<B", 1), "not a 64-bit little-endian ELF file"),
        (patch(code_object(), 16, "<H", 3), "ELF type 3"),
        (patch(code_object(), 18, "<H", 183), "machine 183"),
        (patch(code_object(), 60, "<H", 0), "no section table"),
        (code_object()[:-1], "truncated"),
        (patch(code_object(), 40, "<Q", 2**63), "truncated"),
        (code_object(flags=ALLOC | WRITE | EXECUTE), "writable and executable"),
        (code_object(flags=CODE | 0x400), "thread-local data"),
        (code_object(kind=14), "type 0xe"),
        (code_object(alignment=48), "alignment 48"),
        (code_object(alignment=1 << 21), "alignment"),
        (code_object(relocations=[(0, 9, "f", 0)]), "relocation type 9"),
        (code_object(relocations=[(0, ABS64, "f", 0)]), "outside section 1"),
        (code_object(relocations=[(0, PC32, "f", 1 << 40)]), "out of range"),
        (object_file([Section(CODE, TWICE)], {"f": (1, 6)}), "outside its section"),
        (object_file([Section(CODE, TWICE)], {"f": (9, 0)}), "section 9 of"),
        (object_file([Section(CODE, TWICE)], {"f": (0xFFF2, 0)}), "reserved section"),
        (object_file([Section(CODE, TWICE)], {"f": (1, 0)}, THREAD_LOCAL), "thread-local or indirect"),
    ],
)
def test_what_cannot_be_loaded_is_named(data, words):
    with pytest.raises(KernelError, match=words):
        load_object(data)


@given(st.data())
def test_damaged_objects_load_or_raise_kernel_error(data):
    damaged = bytearray(example())
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    with contextlib.suppress(KernelError):
        load_object(bytes(damaged[:length]))


def undefined(*symbols: str, used: bool = True) -> bytes:
    """An object with ``symbols`` that it does not define, and code that refers to them."""
    relocations = [(2 + 16 * i, ABS64, symbol, 0) for i, symbol in enumerate(symbols)] if used else []
    code = JUMP_FAR.ljust(16) * len(symbols)
    return object_file([Section(CODE, code, relocations=relocations)], {"f": (1, 0)} | {s: (0, 0) for s in symbols})


@pytest.mark.parametrize("used", [True, False])
def test_all_symbols_that_an_object_does_not_define_are_named_at_once(used):
    with pytest.raises(KernelError, match=r"needs __truncsfbf2, fmaf, memset, which it does not define.*report it"):
        load_object(undefined("memset", "__truncsfbf2", "fmaf", used=used))


@pytest.mark.parametrize("name", ["malloc", "GOMP_parallel"])
def test_what_the_process_has_is_not_for_the_object(name):
    with pytest.raises(KernelError, match=f"needs {name}, which it does not define"):
        load_object(undefined(name))


# -- what callers hand to kernels


def in_new_process(names: list[str], first: str) -> str:
    """Look up ``names`` in a fresh interpreter after running ``first``; returns the error, or "found"."""
    code = f"""
{first}
from llmir.errors import KernelError
from llmir.kernels.cpu.loader import process_symbol
try:
    assert all(process_symbol(name) for name in {names})
    print("found")
except KernelError as error:
    print(error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_missing_symbol_of_the_process_is_named():
    with pytest.raises(KernelError, match="llmir_no_such_function"):
        process_symbol("llmir_no_such_function")


def test_without_torch_there_is_no_openmp_runtime():
    assert "import torch first" in in_new_process(["GOMP_parallel"], "")


def test_openmp_comes_from_the_runtime_torch_loaded():
    pytest.importorskip("torch")
    names = ["GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"]
    assert in_new_process(names, "import torch").strip() == "found"
