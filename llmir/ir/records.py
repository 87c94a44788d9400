"""Reads records (frozen dataclasses of plain values) from JSON values and attributes, field by field.

``asdict`` writes them; tuples come back from lists, and of a union the member whose fields are there.
"""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


class RecordError(TypeError):
    """What was read does not fit the record; the message names the place and what belongs there."""


def read(kind: Any, value: Any, where: str) -> Any:
    """``value`` (JSON) as the annotated type ``kind``; RecordError naming the place where it does not fit."""
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else read(_choice(arguments, value), value, where)
    if origin is typing.Literal:
        fits = value in arguments
    elif origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, list | tuple) else arguments
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
        fits = False
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        fits = False
    elif kind is float:
        fits = type(value) in (int, float)
    else:
        fits = type(value) is kind
    if not fits:
        raise RecordError(f"{where} must be {_name(kind)}, not {value!r}")
    return float(value) if kind is float else value


def _choice(kinds: tuple[Any, ...], value: Any) -> Any:
    """Which type of a union ``value`` is to be read as: of records, or tuples of records, that whose fields it has."""
    record = value[0] if isinstance(value, list | tuple) and value else value
    for kind in kinds:
        element = kind if is_dataclass(kind) else next(iter(typing.get_args(kind)), None)
        if is_dataclass(element) and isinstance(record, dict) and {f.name for f in fields(element)} == set(record):
            return kind
    return kinds[0]


def _read_record(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from a dictionary with exactly its fields."""
    names = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        odd = sorted(names.symmetric_difference(value)) if isinstance(value, dict) else [type(value).__name__]
        raise RecordError(f"{where} has missing or unknown fields {odd}")
    hints = _hints(kind)
    return kind(**{name: read(hints[name], value[name], f"{where}.{name}") for name in sorted(names)})


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of a record's fields: each start reads some hundred records, and looking them up costs the most."""
    return typing.get_type_hints(kind)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
