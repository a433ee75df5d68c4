"""Metadata values of a GGUF file: their types, and their bytes to Python values and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from edgeport.errors import ConvertError, CorruptCheckpoint


class ValueType(IntEnum):
    """The types of metadata values, with the numbers of gguf-py's GGUFValueType."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


CODES = dict(zip(ValueType, ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d"), strict=True))
"""struct's code of each fixed-size type."""
LEAST = {ValueType.STRING: 8, ValueType.ARRAY: 12} | {
    kind: struct.calcsize("<" + code) for kind, code in CODES.items() if code
}
"""The fewest bytes that a value of a type takes."""
LENGTH = struct.Struct("<Q")
ARRAY = struct.Struct("<IQ")
"""What an array starts with: the type of its elements, and how many."""


@dataclass(frozen=True, slots=True)
class Field:
    """A metadata value as its file spells it, so that it can be copied without being understood."""

    type: ValueType
    raw: bytes

    @property
    def value(self) -> Any:
        """A number, bool, str or (nested) list, decoded at each call. Raises CorruptCheckpoint."""
        return decode(self.type, self.raw, 0)[0]


def decode(kind: ValueType, raw: bytes, at: int) -> tuple[Any, int]:
    """The value at byte `at` of bytes that a reader has stepped over, and the byte after it."""
    if code := CODES[kind]:
        return struct.unpack_from("<" + code, raw, at)[0], at + LEAST[kind]
    if kind == ValueType.STRING:
        start = at + 8
        at = start + LENGTH.unpack_from(raw, at)[0]
        try:
            return raw[start:at].decode(), at
        except UnicodeDecodeError:
            raise CorruptCheckpoint(f"a string should be UTF-8 and is {raw[start:at][:40]!r}") from None
    number, count = ARRAY.unpack_from(raw, at)
    element = ValueType(number)
    at += 12
    if code := CODES[element]:
        return list(struct.unpack_from(f"<{count}{code}", raw, at)), at + count * LEAST[element]
    values = []
    for _ in range(count):
        item, at = decode(element, raw, at)
        values.append(item)
    return values, at


def encode(kind: int, value: Any) -> Field:
    """A field of a value; the elements of an ARRAY are of its first element's type, as in gguf-py.

    Raises ConvertError for an empty array, whose type nothing says (see `encode_array`), and for a value that
    does not fit its type.
    """
    kind = ValueType(kind)
    if kind != ValueType.ARRAY:
        return Field(kind, encode_bytes(kind, value))
    if not len(value):
        raise ConvertError("an empty array does not say of what type its elements would be")
    return encode_array(ValueType.UINT8 if isinstance(value, bytes) else _type_of(value[0]), value)


def encode_array(element: int, items: Sequence[Any]) -> Field:
    """An ARRAY field whose elements are of a given type."""
    element = ValueType(element)
    if code := CODES[element]:
        try:
            body = struct.pack(f"<{len(items)}{code}", *items)
        except (struct.error, OverflowError) as error:
            raise ConvertError(f"an array of {element.name} cannot hold its values: {error}") from error
    else:
        body = b"".join(encode_bytes(element, item) for item in items)
    return Field(ValueType.ARRAY, ARRAY.pack(element, len(items)) + body)


def encode_bytes(kind: ValueType, value: Any) -> bytes:
    """The bytes of a value, without its type. Raises ConvertError."""
    if kind == ValueType.ARRAY:
        return encode(kind, value).raw
    if kind == ValueType.STRING:
        try:
            text = value if isinstance(value, bytes | bytearray) else str(value).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a character
            raise ConvertError(f"{str(value)[:64]!r} is not text that UTF-8 can hold: {error.reason}") from error
        return LENGTH.pack(len(text)) + text
    try:
        return struct.pack("<" + CODES[kind], value)
    except (struct.error, OverflowError) as error:
        raise ConvertError(f"{value!r} is no {kind.name}: {error}") from error


def _type_of(value: Any) -> ValueType:
    kinds = ((str | bytes | bytearray, ValueType.STRING), (list, ValueType.ARRAY), (float, ValueType.FLOAT32))
    for python, kind in (*kinds, (bool, ValueType.BOOL), (int, ValueType.INT32)):
        if isinstance(value, python):
            return kind
    raise ConvertError(f"GGUF metadata has no type for a {type(value).__name__}")
