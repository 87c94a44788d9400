"""Writes small x86-64 object files, whole or broken in a chosen way, for the tests of the loader."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PROGBITS, SYMTAB, STRTAB, RELA, NOBITS = 1, 2, 3, 4, 8
WRITE, ALLOC, EXECUTE = 1, 2, 4
ABS64, PC32, PLT32, PC64 = 1, 2, 4, 24
FUNCTION, OBJECT, THREAD_LOCAL = 2, 1, 6
GLOBAL = 1


@dataclass
class Section:
    flags: int
    data: bytes
    kind: int = PROGBITS
    alignment: int = 16
    relocations: list[tuple[int, int, str, int]] = field(default_factory=list)
    """(place, relocation type, symbol, addend)"""


def object_file(sections: list[Section], symbols: dict[str, tuple[int, int]], symbol_type: int = FUNCTION) -> bytes:
    """An ELF file of ``sections`` (numbered from 1); ``symbols``: name -> (section, 0: undefined; value)."""
    names = b"\0"
    table = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    for name, (section, value) in symbols.items():
        table += struct.pack("<IBBHQQ", len(names), GLOBAL << 4 | symbol_type, 0, section, value, 0)
        names += name.encode() + b"\0"
    relocated = [(number, s) for number, s in enumerate(sections, 1) if s.relocations]
    strings = len(sections) + len(relocated) + 1
    headers, body = [bytes(64)], b""

    def add(kind, flags, data, link=0, info=0, alignment=8, entry_size=0, size=None):
        nonlocal body
        place = 64 + len(body)
        size = len(data) if size is None else size
        headers.append(struct.pack("<IIQQQQIIQQ", 0, kind, flags, 0, place, size, link, info, alignment, entry_size))
        body += data

    for s in sections:
        data = b"" if s.kind == NOBITS else s.data
        add(s.kind, s.flags, data, alignment=s.alignment, size=len(s.data))
    order = list(symbols)
    for number, s in relocated:
        entries = b"".join(struct.pack("<QQq", p, (order.index(n) + 1) << 32 | k, a) for p, k, n, a in s.relocations)
        add(RELA, 0, entries, link=strings + 1, info=number, entry_size=24)
    add(STRTAB, 0, names)
    add(SYMTAB, 0, table, link=strings, info=1, entry_size=24)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(headers), 0)
    return identity + header + body + b"".join(headers)
