"""Records that Python and Lua share: dataclasses whose fields stand once, packed in one place.

Fields of type int, float and bool travel as little-endian doubles, in their order. Fields of type
str follow, each ended by a zero byte. Other fields do not travel.
"""

from __future__ import annotations

import struct
from dataclasses import Field, dataclass, fields
from operator import attrgetter
from typing import Any, TypeVar

_R = TypeVar("_R")
_NUMBERS: dict[str, type[int] | type[float]] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True, slots=True)
class _Layout:
    numbers: list[Field[Any]]
    strings: list[Field[Any]]
    get_numbers: attrgetter[tuple[float, ...]]
    struct: struct.Struct


_layouts: dict[type, _Layout] = {}


def _layout(record: type) -> _Layout:
    found = _layouts.get(record)
    if found is None:
        numbers = [field for field in fields(record) if field.type in _NUMBERS]
        strings = [field for field in fields(record) if field.type == "str"]
        get = attrgetter(*(field.name for field in numbers))
        found = _Layout(numbers, strings, get, struct.Struct(f"<{len(numbers)}d"))
        _layouts[record] = found
    return found


def pack(record: Any) -> bytes:
    """A record as Lua's `read_NAME` takes it."""
    layout = _layout(type(record))
    numbers = layout.struct.pack(*layout.get_numbers(record))
    return numbers + b"".join(
        getattr(record, field.name).encode() + b"\0" for field in layout.strings
    )


def unpack(record: type[_R], raw: bytes, **others: Any) -> _R:
    """A record as Lua's `pack_NAME` made it; `others` are fields that do not travel."""
    layout = _layout(record)
    values = layout.struct.unpack_from(raw)
    named: dict[str, Any] = {
        field.name: _NUMBERS[str(field.type)](value)
        for field, value in zip(layout.numbers, values, strict=True)
    }
    if layout.strings:
        rest = raw[layout.struct.size :].decode(errors="replace").split("\0")
        named |= {field.name: value for field, value in zip(layout.strings, rest, strict=False)}
    return record(**named, **others)


def size(record: type) -> int:
    """How many bytes the numbers of a record take."""
    return _layout(record).struct.size


def lua_reader(name: str, record: type) -> str:
    """Lua's `read_NAME(packed)`: a table; with the fields' defaults where `packed` is false."""
    layout = _layout(record)
    every = [*layout.numbers, *layout.strings]
    names = ", ".join(field.name for field in every)
    defaults = ", ".join(f"{field.name} = {_lua(field.default)}" for field in every)
    values = ", ".join(f"{field.name} = {field.name}" for field in every)
    return (
        f"local function read_{name}(packed)\n"
        f"  if not packed then return {{{defaults}}} end\n"
        f"  local {names} = struct.unpack('{_format(layout)}', packed)\n"
        f"  return {{{values}}}\n"
        "end\n"
    )


def lua_writer(name: str, record: type) -> str:
    """Lua's `pack_NAME(record)`: a string."""
    layout = _layout(record)
    values = ", ".join(f"record.{field.name}" for field in [*layout.numbers, *layout.strings])
    return (
        f"local function pack_{name}(record)\n"
        f"  return struct.pack('{_format(layout)}', {values})\n"
        "end\n"
    )


def lua_locals(name: str, record: type, packed: str) -> str:
    """Lua's `local NAME_FIELD, ...` for all fields; with their defaults where `packed` is false."""
    layout = _layout(record)
    default = layout.struct.pack(*(field.default for field in layout.numbers))
    default += b"".join(str(field.default).encode() + b"\0" for field in layout.strings)
    escaped = "".join(f"\\{byte:03d}" for byte in default)
    fields = _lua_fields(name, layout)
    return f"local {fields} = struct.unpack('{_format(layout)}', {packed} or '{escaped}')\n"


def lua_packed(name: str, record: type) -> str:
    """Lua's `local NAME_packed`: what `lua_locals` made, as a string."""
    layout = _layout(record)
    fields = _lua_fields(name, layout)
    return f"local {name}_packed = struct.pack('{_format(layout)}', {fields})\n"


def _lua_fields(name: str, layout: _Layout) -> str:
    return ", ".join(f"{name}_{field.name}" for field in [*layout.numbers, *layout.strings])


def _format(layout: _Layout) -> str:
    return f"<{'d' * len(layout.numbers)}{'s' * len(layout.strings)}"


def _lua(default: object) -> str:
    return f"'{default}'" if isinstance(default, str) else repr(float(default))  # type: ignore[arg-type]  # numbers and strings only
