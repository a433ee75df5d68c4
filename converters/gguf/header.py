"""The head of a GGUF file: its metadata and where its tensors lie, read with pread and written to the byte.

    "GGUF" | version u32 | tensors u64 | keys u64 | pairs | infos | padding | data, each tensor padded

    pair:    key string | type u32 | value            string: length u64 | UTF-8
    info:    name string | dimensions u32 | columns first, u64 each | type u32 | offset in the data u64

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from converters.gguf.values import (
    CODES,
    LEAST,
    Field,
    ValueType,
    encode,
    encode_bytes,
)
from edgeport.codecs import ggml
from edgeport.errors import AmbiguousFormat, ConvertError, CorruptCheckpoint, NotACheckpoint, PlanViolation
from edgeport.tensor import TensorSpec

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 1 << 30
MAX_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # llama.cpp keeps names in 64 bytes, the last of them zero
WINDOW_BYTES = 1 << 18

TYPES: dict[str, ggml.Block] = ggml.TYPES | {
    "F32": ggml.Block(0, 1, 4, "rw"),
    "F16": ggml.Block(1, 1, 2, "rw"),
    "I8": ggml.Block(24, 1, 1, ""),
    "I16": ggml.Block(25, 1, 2, ""),
    "I32": ggml.Block(26, 1, 4, ""),
    "I64": ggml.Block(27, 1, 8, ""),
    "F64": ggml.Block(28, 1, 8, "r"),
    "BF16": ggml.Block(30, 1, 2, "rw"),
}
"""Every type that a tensor of a GGUF can have."""

NAMES = {block.id: name for name, block in TYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor of the file: `dtype` is the ggml type's name, `offset` counts from the start of the file."""

    offset: int


@dataclass(frozen=True, slots=True)
class Split:
    """The file's place in a model of several: `no` counts from 0, `tensors` is the count in all of them."""

    no: int
    count: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    version: int
    kv: Mapping[str, Field]
    tensors: Mapping[str, StoredTensor]
    alignment: int
    data_offset: int
    _values: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def value(self, key: str, default: Any = None) -> Any:
        """The decoded value of `key`, kept for the next call: do not change a list that comes back."""
        if key not in self._values:
            if key not in self.kv:
                return default
            try:
                self._values[key] = self.kv[key].value
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(f"{self.path}: {key!r}: {error}") from None
        return self._values[key]

    @property
    def split(self) -> Split | None:
        """Where the file stands among the files of a split model; None for a model in one file."""
        facts = [self.value(f"split.{key}", 0) for key in ("no", "count", "tensors.count")]
        if facts[1] == 0:
            return None
        if not all(isinstance(fact, int) and fact >= 0 for fact in facts) or not facts[0] < facts[1]:
            raise CorruptCheckpoint(f"{self.path}: split.no, .count and .tensors.count cannot be {facts}")
        return Split(*facts)


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor whose rows divide into the blocks of its type."""
    block = TYPES[dtype]
    return prod(shape) // block.size * block.nbytes


def read_header(path: Path | str) -> Header:
    """Read the head of a GGUF v2 or v3 file, little-endian, and check every promise it makes.

    Raises NotACheckpoint for what is no such file, AmbiguousFormat for an unknown type of tensor,
    CorruptCheckpoint for the rest. Nothing is allocated on a file's word beyond its own size.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _parse(_Reader(path, descriptor))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NotACheckpoint(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Bytes of the file in order, through a window that grows only for a value that is longer."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.window = bytearray()
        self.base = 0
        self.at = 0

    @property
    def position(self) -> int:
        return self.base + self.at

    @property
    def left(self) -> int:
        return self.size - self.position

    def fail(self, what: str) -> NoReturn:
        raise CorruptCheckpoint(f"{self.path}: {what}")

    def reach(self, count: int, what: str) -> int:
        """Step over `count` bytes and hold them in the window; the window's index of the first of them."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.window):
            if self.position > min(self.size, MAX_HEADER_BYTES):
                self.at = start
                end = "the file ends" if self.left < count else "the header passes 1 GiB"
                self.fail(
                    f"{end} inside {what}, at byte {self.position} of {self.size}, which needs {count} bytes"
                )
            self.fill(max(self.at - len(self.window), WINDOW_BYTES), what)
        return start

    def fill(self, count: int, what: str) -> None:
        before = len(self.window)
        while len(self.window) < self.at:
            more = os.pread(self.descriptor, before + count - len(self.window), self.base + len(self.window))
            if not more:
                self.fail(f"the file shrank while its header was read, inside {what}")
            self.window += more

    def drop(self) -> None:
        """Forget what was read, so that the window holds one value."""
        del self.window[: self.at]
        self.base, self.at = self.base + self.at, 0

    def integer(self, code: str, what: str) -> int:
        start = self.reach(_SIZES[code], what)
        return int(_UNPACK[code](self.window, start)[0])

    def string(self, what: str) -> str:
        length = self.integer("Q", f"the length of {what}")
        start = self.reach(length, what)
        try:
            return self.window[start : self.at].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} should be UTF-8 and is {bytes(self.window[start : self.at][:40])!r}")

    def value(self, kind: ValueType, what: str, depth: int = 0) -> None:
        """Step over a value, whose bytes are in the window after that."""
        if kind == ValueType.STRING:
            self.reach(self.integer("Q", f"the length of {what}"), what)
        elif kind != ValueType.ARRAY:
            self.reach(LEAST[kind], what)
        else:
            if depth == MAX_DEPTH:
                self.fail(f"{what} nests arrays deeper than {MAX_DEPTH}")
            element = self.type(what)
            count = self.integer("Q", f"the length of {what}")
            if count * LEAST[element] > self.left:
                self.fail(
                    f"{what} promises {count} elements of {element.name}, and {self.left} bytes are left"
                )
            if CODES[element]:
                self.reach(count * LEAST[element], what)
                return
            for _ in range(count):
                self.value(element, what, depth + 1)

    def type(self, what: str) -> ValueType:
        number = self.integer("I", f"the type of {what}")
        if number not in _TYPE_NUMBERS:
            self.fail(f"{what} has the value type {number}, where 0 to {max(ValueType)} are known")
        return ValueType(number)


_SIZES = {"I": 4, "Q": 8}
_UNPACK = {code: struct.Struct("<" + code).unpack_from for code in _SIZES}
_TYPE_NUMBERS = frozenset(int(kind) for kind in ValueType)


def _parse(file: _Reader) -> Header:
    version = _version(file)
    tensor_count = file.integer("Q", "the count of tensors")
    key_count = file.integer("Q", "the count of keys")
    # a pair takes 13 bytes and a tensor's info 24, even without a name
    if key_count * 13 + tensor_count * 24 > file.left:
        file.fail(f"{key_count} keys and {tensor_count} tensors are promised, and {file.left} bytes are left")
    kv: dict[str, Field] = {}
    for index in range(key_count):
        file.drop()
        key = file.string(f"key {index} of {key_count}")
        if key in kv:
            file.fail(f"the key {key[:64]!r} is there twice")
        kind = file.type(f"the value of {key[:64]!r}")
        start = file.at
        file.value(kind, f"the value of {key[:64]!r}")
        kv[key] = Field(kind, bytes(file.window[start : file.at]))
    alignment = _alignment(file, kv)
    infos = [_info(file, f"tensor {index} of {tensor_count}") for index in range(tensor_count)]
    data_offset = -(-file.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, offset in infos:
        if name in tensors:
            file.fail(f"the tensor {name[:64]!r} is there twice")
        if offset % alignment:
            file.fail(
                f"the tensor {name[:64]!r} starts at {offset}, no multiple of the alignment {alignment}"
            )
        tensors[name] = StoredTensor(name, dtype, shape, nbytes(shape, dtype), data_offset + offset)
    _check_ranges(file, tensors)
    return Header(file.path, version, kv, tensors, alignment, data_offset)


def _version(file: _Reader) -> int:
    if file.size < 24:
        raise NotACheckpoint(f"{file.path}: a GGUF file has at least 24 bytes, and this one has {file.size}")
    start = file.reach(8, "the magic")
    magic = bytes(file.window[start : start + 4])
    if magic != MAGIC:
        raise NotACheckpoint(f"{file.path}: a GGUF file starts with {MAGIC!r}, and this one with {magic!r}")
    (version,) = _UNPACK["I"](file.window, start + 4)
    if version & 0xFFFF == 0 and version:
        raise NotACheckpoint(
            f"{file.path}: big-endian GGUF is not supported; convert it with gguf-convert-endian"
        )
    if version not in (2, VERSION):
        raise NotACheckpoint(
            f"{file.path}: GGUF version 2 or {VERSION} was expected, and version {version} came"
        )
    return int(version)


def _alignment(file: _Reader, kv: Mapping[str, Field]) -> int:
    if ALIGNMENT_KEY not in kv:
        return ALIGNMENT
    stored = kv[ALIGNMENT_KEY]
    alignment: int = stored.value if stored.type == ValueType.UINT32 else 0
    if alignment & (alignment - 1) or not 0 < alignment <= MAX_ALIGNMENT:
        what = alignment if stored.type == ValueType.UINT32 else stored.type.name
        file.fail(f"{ALIGNMENT_KEY} should be a power of two up to {MAX_ALIGNMENT} as UINT32, and is {what}")
    return alignment


def _info(file: _Reader, what: str) -> tuple[str, str, tuple[int, ...], int]:
    """(name, type, shape, offset from the data's start) of the next tensor."""
    file.drop()
    name = file.string(f"the name of {what}")
    what = f"the tensor {name[:64]!r}"
    dimensions = file.integer("I", what)
    if dimensions > MAX_DIMENSIONS:
        file.fail(f"{what} has {dimensions} dimensions, where GGUF has at most {MAX_DIMENSIONS}")
    shape = tuple(reversed([file.integer("Q", what) for _ in range(dimensions)]))
    number, offset = file.integer("I", what), file.integer("Q", what)
    if number not in NAMES:
        raise AmbiguousFormat(f"{file.path}: {what} is of ggml type {number}, which edgeport does not know")
    dtype = NAMES[number]
    if not all(0 < size < 1 << 63 for size in shape) or prod(shape) >= 1 << 63:
        file.fail(f"{what} has the impossible shape {list(shape)}")
    if (shape[-1] if shape else 1) % TYPES[dtype].size:
        file.fail(
            f"{what} of shape {list(shape)} does not divide into {dtype}'s blocks of {TYPES[dtype].size}"
        )
    return name, dtype, shape, offset


def _check_ranges(file: _Reader, tensors: Mapping[str, StoredTensor]) -> None:
    """Every tensor lies inside the file, and apart from the others."""
    stop, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < stop:
            file.fail(f"the tensors {before[:64]!r} and {tensor.name[:64]!r} overlap at byte {tensor.offset}")
        stop, before = tensor.offset + tensor.nbytes, tensor.name
        if stop > file.size:
            file.fail(
                f"the tensor {before[:64]!r} ends at byte {stop}, the file at {file.size}: it is cut short"
            )


def serialize(
    kv: Mapping[str, Field | tuple[int, Any]],
    tensors: Sequence[tuple[str, Sequence[int], str, int]],
    alignment: int = ALIGNMENT,
) -> tuple[bytes, dict[str, int], int]:
    """The head of a GGUF v3 file, where in the file each tensor's data start, and the size of the whole.

    `tensors`: (name, shape, ggml type, bytes), whose data lie in that order. `general.alignment` follows
    `alignment`, whatever `kv` says. Raises ConvertError for what GGUF cannot hold, PlanViolation for a tensor
    whose bytes are not those of its shape.
    """
    fields = {key: item if isinstance(item, Field) else encode(*item) for key, item in kv.items()}
    if alignment != ALIGNMENT or ALIGNMENT_KEY in fields:
        fields[ALIGNMENT_KEY] = encode(ValueType.UINT32, alignment)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    for key, item in fields.items():
        head += encode_bytes(ValueType.STRING, key), struct.pack("<I", item.type), item.raw
    offsets: dict[str, int] = {}
    end = 0
    for name, shape, dtype, size in tensors:
        _check_tensor(name, shape, dtype, size)
        if name in offsets:
            raise PlanViolation(f"the tensor {name!r} is there twice")
        head += encode_bytes(ValueType.STRING, name), struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)), struct.pack("<IQ", TYPES[dtype].id, end)
        offsets[name] = end
        end += -(-size // alignment) * alignment
    header = b"".join(head)
    header += bytes(-len(header) % alignment)
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end


def _check_tensor(name: str, shape: Sequence[int], dtype: str, size: int) -> None:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ConvertError(
            f"llama.cpp reads tensor names of at most {MAX_NAME_BYTES} bytes: {name!r} is longer"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ConvertError(
            f"GGUF has at most {MAX_DIMENSIONS} dimensions: {name!r} has the shape {list(shape)}"
        )
    if dtype not in TYPES:
        raise ConvertError(f"GGUF has no type {dtype!r}, which {name!r} should have")
    if nbytes(shape, dtype) != size:
        raise PlanViolation(
            f"{name!r} of shape {list(shape)} takes {nbytes(shape, dtype)} bytes in {dtype}, not {size}"
        )
