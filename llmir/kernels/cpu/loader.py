"""Loads a compiled kernel object into the process: no MLIR, no compiler, no file on disk.

An object is what LLVM writes: a relocatable ELF file for x86-64 in the large code model (System V ABI, AMD64
supplement). Its sections are copied into one anonymous mapping, ordered by protection, relocated while
writable, and then locked: code executes and is read, constants are read, data is read and written. No page
is ever writable and executable at once.

An object calls nothing but what its caller hands it. A symbol that it does not define would be a routine of the C
library or of the compiler's runtime, which LLVM calls where the instruction set has no instruction: whether a process
has it, and how fast it is, is chance. Such an object is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from llmir.errors import KernelError

_RELOCATABLE, _X86_64 = 1, 62
_IDENTITY = b"\x7fELF\x02\x01\x01"  # 64-bit, little endian, version 1

_PROGBITS, _SYMTAB, _STRTAB, _RELA, _NOTE, _NOBITS, _REL, _UNWIND = 1, 2, 3, 4, 7, 8, 9, 0x70000001
_WRITE, _ALLOC, _EXECUTE, _THREAD_LOCAL = 0x1, 0x2, 0x4, 0x400
_UNDEFINED, _ABSOLUTE, _FIRST_RESERVED_INDEX = 0, 0xFFF1, 0xFF00
_LOCAL_BINDING = 0
_PLAIN_SYMBOL_TYPES = frozenset(range(5))  # none, object, function, section, file: not thread-local, not indirect


class _Relocation(NamedTuple):
    """How one relocation type is stored: its struct format, and whether relative to its own place."""

    format: str
    relative: bool


_RELOCATIONS = {  # R_X86_64_64, _PC32, _PLT32, _PC64
    1: _Relocation("<Q", False),
    2: _Relocation("<i", True),
    4: _Relocation("<i", True),
    24: _Relocation("<q", True),
}

_READ, _READ_WRITE, _READ_EXECUTE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_EXEC

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA_ENTRY = struct.Struct("<QQq")


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def protection(self) -> int:
        if self.flags & _EXECUTE:
            return _READ_EXECUTE
        return _READ_WRITE if self.flags & _WRITE else _READ


class _Symbol(NamedTuple):
    name: str
    binding: int
    section: int
    value: int


@dataclass(frozen=True)
class _Segment:
    """Pages of one protection inside the mapping; offsets in bytes."""

    start: int
    size: int
    protection: int


class LoadedObject:
    """A kernel object in memory; its code lives as long as this object or a function taken from it.

    ``symbols`` maps the name of each global symbol to its address.
    """

    def __init__(self, symbols: Mapping[str, int], mapping: mmap.mmap):
        self.symbols = MappingProxyType(dict(symbols))
        self._mapping = mapping

    def address(self, name: str) -> int:
        """The address of global symbol ``name``; raises KernelError if the object has none."""
        try:
            return self.symbols[name]
        except KeyError:
            known = ", ".join(sorted(self.symbols)) or "none"
            raise KernelError(f"the kernel object has no symbol {name!r} (it has: {known}); compile it again") from None

    def function(self, name: str, argument_types: Iterable[Any], result_type: Any = None) -> Callable[..., Any]:
        """``name`` as a ctypes function that releases the GIL while it runs and keeps this object alive."""
        function = ctypes.CFUNCTYPE(result_type, *argument_types)(self.address(name))
        function._kernel_object = self  # type: ignore[attr-defined]
        return function


def process_symbol(name: str) -> int:
    """The address of ``name`` in the libraries this process has loaded.

    Raises KernelError where there is none; for the OpenMP runtime that means torch, which brings it, is not
    imported yet: kernels must share torch's thread pool, so llmir never loads a runtime of its own.
    """
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        if name.startswith(("GOMP_", "omp_")):
            raise KernelError(
                f"the kernel needs {name} from the OpenMP runtime that torch loads: import torch first"
            ) from None
        raise KernelError(f"the kernel needs {name}, which no library in this process has") from None
    address = ctypes.cast(function, ctypes.c_void_p).value
    if address is None:
        raise KernelError(f"the kernel needs {name}, which is a null address in this process")
    return address


def load_object(data: bytes) -> LoadedObject:
    """Load the relocatable x86-64 ELF file ``data``.

    Raises KernelError if the data is foreign, truncated or uses what is not supported, if it has symbols that it does
    not define, all of which are named, or if the system refuses executable memory.
    """
    return _Loader(data).load()


class _Loader:
    """One load: the parsed file, then the mapping that is filled from it."""

    def __init__(self, data: bytes):
        self.data = data
        self.sections = _read_sections(data)
        for index, section in enumerate(self.sections):
            if section.flags & _ALLOC:
                _check_loadable(index, section)
        self.symbols = self._read_symbols()
        _check_complete(self.symbols)
        self.offsets, self.segments, self.size = self._arrange()

    def load(self) -> LoadedObject:
        try:
            mapping = mmap.mmap(-1, max(self.size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _unusable(f"no memory for {self.size} bytes ({error.strerror})") from None
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        for index, offset in self.offsets.items():
            section = self.sections[index]
            if section.type != _NOBITS:
                mapping[offset : offset + section.size] = self.data[section.offset : section.offset + section.size]
        self._relocate(mapping, base)
        for segment in self.segments:
            _protect(base + segment.start, segment.size, segment.protection)
        defined = (s for s in self.symbols if s.name and s.binding != _LOCAL_BINDING and s.section in self.offsets)
        return LoadedObject({s.name: base + self.offsets[s.section] + s.value for s in defined}, mapping)

    def _arrange(self) -> tuple[dict[int, int], list[_Segment], int]:
        """Give every loaded section an offset, sections of one protection together on pages of their own."""
        offsets: dict[int, int] = {}
        segments = []
        end = 0
        for protection in (_READ_EXECUTE, _READ, _READ_WRITE):
            start = end
            for index, section in enumerate(self.sections):
                if section.flags & _ALLOC and section.protection == protection:
                    offsets[index] = _round_up(end, section.alignment)
                    end = offsets[index] + section.size
            end = _round_up(end, mmap.PAGESIZE)
            if end > start:
                segments.append(_Segment(start, end - start, protection))
        return offsets, segments, end

    def _read_symbols(self) -> list[_Symbol]:
        """The symbol table, each symbol checked against the section it lies in."""
        tables = [s for s in self.sections if s.type == _SYMTAB]
        if len(tables) != 1:
            raise _unusable(f"{len(tables)} symbol tables instead of one")
        names = self._section(tables[0].link, _STRTAB, "symbol names")
        symbols = []
        for name, info, _, section, value, _ in _entries(self.data, tables[0], _SYMBOL, "symbol table"):
            symbol = _Symbol(self._string(names, name), info >> 4, section, value)
            if info & 0xF not in _PLAIN_SYMBOL_TYPES:
                raise _unusable(f"symbol {symbol.name!r} is thread-local or indirect")
            if section >= _FIRST_RESERVED_INDEX and section != _ABSOLUTE:
                raise _unusable(f"symbol {symbol.name!r} is in reserved section {section:#x}")
            if section < _FIRST_RESERVED_INDEX and section >= len(self.sections):
                raise _unusable(f"symbol {symbol.name!r} is in section {section} of {len(self.sections)}")
            if section not in (_UNDEFINED, _ABSOLUTE) and value > self.sections[section].size:
                raise _unusable(f"symbol {symbol.name!r} lies outside its section")
            symbols.append(symbol)
        return symbols

    def _relocate(self, mapping: mmap.mmap, base: int) -> None:
        """Write the addresses that the code refers to, once the mapping's own address is known."""
        addresses: dict[int, int] = {}
        for index, table in enumerate(self.sections):
            if table.type == _REL:
                raise _unusable(f"section {index} holds relocations without addends")
            if table.type != _RELA or table.info not in self.offsets:
                continue
            target = self.sections[table.info]
            if target.type == _NOBITS:
                raise _unusable(f"section {index} relocates a section without contents")
            self._section(table.link, _SYMTAB, "relocation symbols")
            for place, info, addend in _entries(self.data, table, _RELA_ENTRY, "relocation table"):
                symbol, kind = info >> 32, _relocation(info & 0xFFFFFFFF)
                if place + struct.calcsize(kind.format) > target.size:
                    raise _unusable(f"a relocation at {place:#x} lies outside section {table.info}")
                if symbol not in addresses:
                    addresses[symbol] = self._symbol_address(symbol, base)
                offset = self.offsets[table.info] + place
                value = addresses[symbol] + addend - (base + offset if kind.relative else 0)
                try:
                    struct.pack_into(kind.format, mapping, offset, value)
                except struct.error:
                    raise _unusable(f"a relocation at {place:#x} of section {table.info} is out of range") from None

    def _symbol_address(self, index: int, base: int) -> int:
        if index >= len(self.symbols):
            raise _unusable(f"a relocation names symbol {index} of {len(self.symbols)}")
        symbol = self.symbols[index]
        if index == 0:  # the null symbol: the addend alone
            return 0
        if symbol.section == _ABSOLUTE:
            return symbol.value
        if symbol.section not in self.offsets:
            raise _unusable(f"symbol {symbol.name!r} is in a section that is not loaded")
        return base + self.offsets[symbol.section] + symbol.value

    def _section(self, index: int, kind: int, what: str) -> _Section:
        if index >= len(self.sections) or self.sections[index].type != kind:
            raise _unusable(f"no section of {what} where one is named")
        return self.sections[index]

    def _string(self, table: _Section, offset: int) -> str:
        if offset >= table.size:
            raise _unusable("a symbol's name lies outside the name table")
        start, limit = table.offset + offset, table.offset + table.size
        end = self.data.find(b"\0", start, limit)
        try:
            return self.data[start : limit if end < 0 else end].decode("ascii")
        except UnicodeDecodeError:
            raise _unusable("a symbol's name is not ASCII") from None


def _read_sections(data: bytes) -> list[_Section]:
    """Check the file header and return the section table, every section inside the file."""
    if len(data) < 64 or not data.startswith(_IDENTITY):
        raise _unusable("it is not a 64-bit little-endian ELF file")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if (kind, machine) != (_RELOCATABLE, _X86_64):
        raise _unusable(f"ELF type {kind} for machine {machine}, not a relocatable file for x86-64")
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    if entry_size != _SECTION.size or count == 0:
        raise _unusable("it has no section table of the known form")
    if table + count * entry_size > len(data):
        raise _unusable(f"it is truncated: the section table ends at {table + count * entry_size} of {len(data)} bytes")
    sections = [_Section(*_SECTION.unpack_from(data, table + i * entry_size)) for i in range(count)]
    for index, section in enumerate(sections):
        if section.type not in (0, _NOBITS) and section.offset + section.size > len(data):
            raise _unusable(f"it is truncated: section {index} ends behind the file")
    return sections


def _check_loadable(index: int, section: _Section) -> None:
    """Raise unless a section that occupies memory is of a kind the loader honours in full."""
    if section.type not in (_PROGBITS, _NOBITS, _NOTE, _UNWIND):
        raise _unusable(f"section {index} is of type {section.type:#x}")
    if section.flags & _THREAD_LOCAL:
        raise _unusable(f"section {index} holds thread-local data")
    if section.flags & _WRITE and section.flags & _EXECUTE:
        raise _unusable(f"section {index} wants to be writable and executable")
    if section.alignment & (section.alignment - 1) or section.alignment > mmap.PAGESIZE:
        raise _unusable(f"section {index} wants alignment {section.alignment}")
    if section.size > _MOST_SECTION_BYTES:
        raise _unusable(f"section {index} wants {section.size} bytes")


def _check_complete(symbols: Sequence[_Symbol]) -> None:
    """Raise unless the object defines every symbol but the first, which ELF reserves for "none"."""
    undefined = sorted({symbol.name for symbol in symbols[1:] if symbol.section == _UNDEFINED})
    if undefined:
        raise KernelError(
            f"the kernel object needs {', '.join(undefined)}, which it does not define: code for its instruction set "
            f"must not call the C library or the compiler's runtime. This is a fault of llmir: report it with the "
            f"kernel's name, the processor and the version of the MLIR bindings"
        )


#: Far above any kernel; a larger zero-filled section is corrupt data that would exhaust the memory.
_MOST_SECTION_BYTES = 1 << 30


def _entries(data: bytes, table: _Section, entry: struct.Struct, what: str) -> Iterable[tuple[Any, ...]]:
    if table.entry_size != entry.size or table.size % entry.size:
        raise _unusable(f"the {what} has entries of {table.entry_size} bytes")
    return entry.iter_unpack(data[table.offset : table.offset + table.size])


def _relocation(kind: int) -> _Relocation:
    try:
        return _RELOCATIONS[kind]
    except KeyError:
        raise _unusable(f"relocation type {kind}") from None


def _protect(address: int, size: int, protection: int) -> None:
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if mprotect(address, size, protection) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise KernelError(f"the system refuses executable memory for kernels ({reason}); allow it for this process")


def _round_up(value: int, alignment: int) -> int:
    return -(-value // max(alignment, 1)) * max(alignment, 1)


def _unusable(reason: str) -> KernelError:
    return KernelError(f"the kernel object cannot be loaded: {reason}; compile it again")
