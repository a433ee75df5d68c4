"""A typed GGUF metadata value, as `converters.gguf.values.encode` takes it."""

from __future__ import annotations

from typing import Any

from converters.gguf.values import ValueType

KV = tuple[ValueType, Any]
"""(type, value); the element type of an ARRAY is that of its first element, as in gguf-py."""


def kv(kind: str, value: Any) -> KV:
    """`value` as the GGUF type of that name, such as UINT32."""
    return ValueType[kind], value
