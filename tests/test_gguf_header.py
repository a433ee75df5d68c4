"""GGUF heads: gguf-py reads what we write and we read what it writes, and no broken file passes."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.gguf.header import TYPES, Field, ValueType, encode, nbytes, read_header, serialize
from converters.gguf.values import encode_array
from edgeport.errors import (
    AmbiguousFormat,
    ConvertError,
    CorruptCheckpoint,
    EdgeportError,
    NotACheckpoint,
    PlanViolation,
)

KV: dict[str, tuple[ValueType, Any]] = {
    "general.architecture": (ValueType.STRING, "llama"),
    "u8": (ValueType.UINT8, 255),
    "i8": (ValueType.INT8, -128),
    "u16": (ValueType.UINT16, 65535),
    "i16": (ValueType.INT16, -5),
    "u32": (ValueType.UINT32, 4000000000),
    "i32": (ValueType.INT32, -7),
    "u64": (ValueType.UINT64, 1 << 63),
    "i64": (ValueType.INT64, -(1 << 62)),
    "f32": (ValueType.FLOAT32, 0.5),
    "f64": (ValueType.FLOAT64, 0.1),
    "bool": (ValueType.BOOL, True),
    "strings": (ValueType.ARRAY, ["a", "", "größe", "\U0001f600"]),
    "ints": (ValueType.ARRAY, [1, -2, 3]),
    "floats": (ValueType.ARRAY, [1.0, -2.5]),
    "bools": (ValueType.ARRAY, [True, False]),
    "nested": (ValueType.ARRAY, [[1, 2], [3]]),
    "bytes": (ValueType.ARRAY, b"\x00\xff"),
}
TENSORS = {
    "vector": ("F32", (5,)),
    "matrix": ("F16", (3, 4)),
    "quantized": ("Q4_K", (2, 512)),
    "experts": ("Q8_0", (2, 3, 32)),
    "four": ("I8", (1, 2, 3, 4)),
}


def specs() -> list[tuple[str, tuple[int, ...], str, int]]:
    return [(name, shape, dtype, nbytes(shape, dtype)) for name, (dtype, shape) in TENSORS.items()]


def written_by_gguf_py(path: Path, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in list(KV.items())[1:]:
        writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    for seed, (name, shape, dtype, size) in enumerate(specs()):
        data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        kind = gguf.GGMLQuantizationType[dtype]
        raw = data.reshape(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ours(kv: Mapping[str, Any] = KV, **options: Any) -> bytes:
    header, _, total = serialize(kv, specs(), **options)
    return header + bytes(total - len(header))


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_bytes_equal_gguf_py(tmp_path: Path, alignment: int | None) -> None:
    reference = written_by_gguf_py(tmp_path / "r.gguf", alignment).read_bytes()
    kv: dict[str, Any] = dict(KV)
    if alignment:  # gguf-py puts it second
        kv = {
            "general.architecture": KV["general.architecture"],
            "general.alignment": (ValueType.UINT32, 0),
        } | kv
    header, offsets, total = serialize(kv, specs(), alignment or 32)
    assert header == reference[: len(header)]
    assert total == len(reference)
    for seed, (name, _, _, size) in enumerate(specs()):
        data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()
        assert reference[offsets[name] : offsets[name] + size] == data


def test_gguf_py_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours())
    reader = gguf.GGUFReader(path)
    for key, (_, value) in KV.items():
        if key != "nested":  # gguf-py flattens it
            read = reader.fields[key].contents()
            assert read == (list(value) if isinstance(value, bytes) else pytest.approx(value))
    assert [(t.name, t.tensor_type.name, tuple(reversed(t.shape.tolist()))) for t in reader.tensors] == [
        (name, dtype, shape) for name, (dtype, shape) in TENSORS.items()
    ]


def test_reading(tmp_path: Path) -> None:
    header = read_header(written_by_gguf_py(tmp_path / "r.gguf"))
    reader = gguf.GGUFReader(tmp_path / "r.gguf")
    assert (header.version, header.alignment, header.data_offset) == (3, 32, reader.data_offset)
    assert list(header.kv) == list(KV)
    for key, (kind, value) in KV.items():
        assert header.kv[key].type == kind
        assert header.value(key) == (list(value) if isinstance(value, bytes) else value)
    assert header.value("strings") is header.value("strings")
    assert header.value("absent") is None and header.value("absent", 3) == 3
    for tensor in reader.tensors:
        mine = header.tensors[tensor.name]
        assert (mine.nbytes, mine.offset, mine.dtype) == (
            tensor.n_bytes,
            tensor.data_offset,
            tensor.tensor_type.name,
        )
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))


def test_untouched_metadata_is_copied_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours())
    header = read_header(path)
    assert ours(header.kv) == path.read_bytes()
    path.write_bytes(path.read_bytes().replace("größe".encode(), b"gr\xff\xff\xff\xffe"))
    broken = read_header(path)
    assert ours(broken.kv) == path.read_bytes()
    with pytest.raises(CorruptCheckpoint, match=r"o\.gguf: 'strings': a string should be UTF-8"):
        broken.value("strings")


def test_version_2_reads_alike(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours())
    third = read_header(path)
    path.write_bytes(b"GGUF\2" + path.read_bytes()[5:])
    second = read_header(path)
    assert second.version == 2 and second.kv == third.kv and second.tensors == third.tensors


def test_the_alignment_of_the_layout_is_the_one_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours({"general.alignment": (ValueType.UINT32, 4096)}))
    assert read_header(path).alignment == 32
    path.write_bytes(ours({}, alignment=4096))
    assert read_header(path).alignment == 4096
    assert all(tensor.offset % 4096 == 0 for tensor in read_header(path).tensors.values())


def test_split(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours())
    assert read_header(path).split is None
    numbers = {"split.no": (2, 1), "split.count": (2, 3), "split.tensors.count": (5, 20)}
    path.write_bytes(ours(numbers))
    split = read_header(path).split
    assert split and (split.no, split.count, split.tensors) == (1, 3, 20)
    for broken in ({"split.no": (2, 3)}, {"split.tensors.count": (5, -1)}, {"split.no": (8, "x")}):
        path.write_bytes(ours(numbers | broken))
        with pytest.raises(CorruptCheckpoint, match="split"):
            _ = read_header(path).split


def test_types_agree_with_gguf_py() -> None:
    for kind in gguf.GGMLQuantizationType:
        if kind.name != "Q8_1":
            assert (TYPES[kind.name].size, TYPES[kind.name].nbytes) == gguf.GGML_QUANT_SIZES[kind]
        assert TYPES[kind.name].id == kind
    assert {kind.name: int(kind) for kind in ValueType} == {
        kind.name: int(kind) for kind in gguf.GGUFValueType
    }


def pair(key: bytes, kind: int, raw: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + raw


def info(name: bytes, dims: list[int], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims) if count is None else count)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def raw(pairs: list[bytes], infos: list[bytes], data: int = 4096, keys: int | None = None) -> bytes:
    counts = struct.pack("<QQ", len(infos), len(pairs) if keys is None else keys)
    head = b"GGUF\3\0\0\0" + counts + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


NUMBER = struct.pack("<I", 1)
NEST = b"".join(struct.pack("<IQ", 9, 1) for _ in range(6))
BROKEN = {
    "empty file": (b"", NotACheckpoint, "at least 24 bytes, and this one has 0"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}" + bytes(30), NotACheckpoint, "starts with b'GGUF'"),
    "version 1": (b"GGUF\1\0\0\0" + bytes(30), NotACheckpoint, "version 1 came"),
    "version 0": (b"GGUF\0\0\0\0" + bytes(30), NotACheckpoint, "version 0 came"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(30), NotACheckpoint, "big-endian"),
    "absurd key count": (raw([], [], keys=1 << 62), CorruptCheckpoint, "are promised"),
    "key beyond the file": (
        raw([struct.pack("<Q", 1 << 40)], []),
        CorruptCheckpoint,
        "needs 1099511627776 bytes",
    ),
    "key not UTF-8": (raw([pair(b"\xff\xfe", 4, NUMBER)], []), CorruptCheckpoint, "should be UTF-8"),
    "key twice": (raw([pair(b"a", 4, NUMBER)] * 2, []), CorruptCheckpoint, "key 'a' is there twice"),
    "unknown value type": (raw([pair(b"a", 13, NUMBER)], []), CorruptCheckpoint, "value type 13"),
    "unknown element type": (
        raw([pair(b"a", 9, struct.pack("<IQ", 77, 1))], []),
        CorruptCheckpoint,
        "type 77",
    ),
    "long string": (raw([pair(b"a", 8, struct.pack("<Q", 1 << 63))], []), CorruptCheckpoint, "ends inside"),
    "long array": (raw([pair(b"a", 9, struct.pack("<IQ", 4, 1 << 61))], []), CorruptCheckpoint, "promises"),
    "long string array": (
        raw([pair(b"a", 9, struct.pack("<IQ", 8, 1 << 61))], []),
        CorruptCheckpoint,
        "promises",
    ),
    "deep array": (
        raw([pair(b"a", 9, NEST + struct.pack("<IQ", 4, 0))], []),
        CorruptCheckpoint,
        "deeper than 4",
    ),
    "alignment 3": (
        raw([pair(b"general.alignment", 4, struct.pack("<I", 3))], []),
        CorruptCheckpoint,
        "and is 3",
    ),
    "alignment 0": (raw([pair(b"general.alignment", 4, bytes(4))], []), CorruptCheckpoint, "and is 0"),
    "alignment 2**31": (
        raw([pair(b"general.alignment", 4, struct.pack("<I", 1 << 31))], []),
        CorruptCheckpoint,
        "and is 2147483648",
    ),
    "alignment a string": (
        raw([pair(b"general.alignment", 8, bytes(8))], []),
        CorruptCheckpoint,
        "is STRING",
    ),
    "tensor twice": (
        raw([], [info(b"a", [4]), info(b"a", [4], 0, 32)]),
        CorruptCheckpoint,
        "'a' is there twice",
    ),
    "tensor not UTF-8": (raw([], [info(b"\xc3", [4])]), CorruptCheckpoint, "should be UTF-8"),
    "five dimensions": (raw([], [info(b"a", [1] * 5)]), CorruptCheckpoint, "has 5 dimensions"),
    "2**32 - 1 dimensions": (raw([], [info(b"a", [], count=0xFFFFFFFF)]), CorruptCheckpoint, "dimensions"),
    "zero dimension": (raw([], [info(b"a", [4, 0])]), CorruptCheckpoint, r"impossible shape \[0, 4\]"),
    "negative dimension": (raw([], [info(b"a", [(1 << 64) - 4])]), CorruptCheckpoint, "impossible shape"),
    "overflowing dimensions": (
        raw([], [info(b"a", [1 << 40, 1 << 40])]),
        CorruptCheckpoint,
        "impossible shape",
    ),
    "removed type": (raw([], [info(b"a", [32], 4)]), AmbiguousFormat, "ggml type 4,"),
    "unknown type": (raw([], [info(b"a", [32], 4711)]), AmbiguousFormat, "'a' is of ggml type 4711"),
    "half a block": (raw([], [info(b"a", [100, 3], 12)]), CorruptCheckpoint, "Q4_K's blocks of 256"),
    "scalar block": (raw([], [info(b"a", [], 8)]), CorruptCheckpoint, "Q8_0's blocks of 32"),
    "misaligned": (raw([], [info(b"a", [4], 0, 16)]), CorruptCheckpoint, "no multiple of the alignment 32"),
    "overlapping": (
        raw([], [info(b"a", [64], 0, 0), info(b"b", [4], 0, 224)]),
        CorruptCheckpoint,
        "'a' and 'b' overlap",
    ),
    "outside the file": (raw([], [info(b"a", [2000])]), CorruptCheckpoint, "cut short"),
    "offset beyond everything": (
        raw([], [info(b"a", [4], 0, (1 << 64) - 32)]),
        CorruptCheckpoint,
        "cut short",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    data, kind, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(kind, match=message) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(caught.value) is kind and "broken.gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert peak < 1 << 20


def test_what_the_broken_files_are_made_of_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(raw([pair(b"a", 4, NUMBER)], [info(b"a", [4]), info(b"s", [], 0, 32)]))
    assert read_header(path).value("a") == 1
    assert read_header(path).tensors["s"].shape == ()


def test_no_path(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(NotACheckpoint, match="directory"):
        read_header(tmp_path)


def test_a_file_cut_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    whole = ours()
    last = max(tensor.offset + tensor.nbytes for tensor in read_back(path, whole).values())
    for size in [*range(read_header(path).data_offset), *range(last - 40, last)]:
        path.write_bytes(whole[:size])
        with pytest.raises((NotACheckpoint, CorruptCheckpoint)):
            read_header(path)


def read_back(path: Path, data: bytes) -> Mapping[str, Any]:
    path.write_bytes(data)
    return read_header(path).tensors


def test_flipped_bytes_raise_only_our_errors(tmp_path: Path) -> None:
    path, whole, chance = tmp_path / "o.gguf", ours(), random.Random(0)
    head = read_header_of(path, whole)
    for _ in range(2000):
        broken = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            broken[chance.randrange(head)] = chance.choice((0, 1, 8, 9, 127, 255, chance.randrange(256)))
        path.write_bytes(broken)
        try:
            header = read_header(path)
            for key in header.kv:
                header.value(key)
        except EdgeportError as error:
            assert len(str(error)) < 600


def read_header_of(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return read_header(path).data_offset


def test_a_sparse_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw([pair(b"a", 8, struct.pack("<Q", 1 << 40))], []))
    os.truncate(path, 1 << 41)
    tracemalloc.start()
    with pytest.raises(CorruptCheckpoint, match="passes 1 GiB"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_large_vocabulary(tmp_path: Path) -> None:
    tokens = [f"tok{index}" for index in range(262144)]
    kv = {
        "tokens": encode_array(ValueType.STRING, tokens),
        "scores": encode_array(ValueType.FLOAT32, [0.0] * len(tokens)),
    }
    path = tmp_path / "vocabulary.gguf"
    header, _, _ = serialize(kv, [])
    path.write_bytes(header)
    del kv
    tracemalloc.start()
    start = time.perf_counter()
    read = read_header(path)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 10  # a tenth of it without tracemalloc
    assert peak < 3 * len(header)
    assert read.value("tokens") == tokens


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: encode(ValueType.ARRAY, []), ConvertError, "empty array"),
        (lambda: encode(ValueType.UINT8, 256), ConvertError, "256 is no UINT8"),
        (lambda: encode(ValueType.FLOAT32, 1e300), ConvertError, "no FLOAT32"),
        (lambda: encode(ValueType.ARRAY, [1 << 40]), ConvertError, "INT32 cannot hold"),
        (lambda: encode(ValueType.ARRAY, [None]), ConvertError, "NoneType"),
        (lambda: serialize({}, [("n" * 64, (1,), "F32", 4)]), ConvertError, "at most 63 bytes"),
        (lambda: serialize({}, [("n", (1,) * 5, "F32", 4)]), ConvertError, "at most 4 dimensions"),
        (lambda: serialize({}, [("n", (1,), "F31", 4)]), ConvertError, "no type 'F31'"),
        (lambda: serialize({}, [("n", (2,), "F32", 4)]), PlanViolation, "takes 8 bytes in F32, not 4"),
        (lambda: serialize({}, [("n", (1,), "F32", 4)] * 2), PlanViolation, "twice"),
    ],
)
def test_what_cannot_be_written(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_an_empty_array_of_a_known_type() -> None:
    assert encode_array(ValueType.STRING, []) == Field(ValueType.ARRAY, struct.pack("<IQ", 8, 0))
    assert encode_array(ValueType.STRING, []).value == []


def test_reading_a_header_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "o.gguf"
    path.write_bytes(ours())
    code = f"""
import sys
from converters.gguf.header import read_header
read_header({str(path)!r}).value("strings")
assert not {{"torch", "gguf", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
