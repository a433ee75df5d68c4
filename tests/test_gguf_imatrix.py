"""Importance matrices, in both formats, from files written here to the byte."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters.gguf.imatrix import read_imatrix
from edgeport.errors import CorruptCheckpoint, EdgeportError, NotACheckpoint

NAME = "blk.0.ffn_down.weight"


def legacy(path: Path, entries: list[tuple[str, int, list[float]]], tail: bytes = b"", count: int | None = None) -> Path:
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(data + tail)
    return path


def modern(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 3, 5) + b"a.txt"])
def test_legacy(tmp_path: Path, tail: bytes) -> None:
    found = read_imatrix(legacy(tmp_path / "a.dat", [(NAME, 3, [3.0, 1.0, 0.0]), ("output.weight", 0, [2.0])], tail))
    assert list(found) == [NAME, "output.weight"]
    assert found[NAME].dtype == np.float32
    np.testing.assert_array_equal(found[NAME], f32(3, 1, 0) / np.float32(3))
    np.testing.assert_array_equal(found["output.weight"], f32(2))


def test_modern(tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.in_sum2": f32(10, 20, 0).reshape(1, 3),
        f"{NAME}.counts": f32(4).reshape(1, 1),
        "experts.in_sum2": f32(1, 2, 3, 4, 5, 6).reshape(3, 2),
        "experts.counts": f32(2, 0, 3).reshape(3, 1),
    }
    found = read_imatrix(modern(tmp_path / "a.gguf", tensors))
    assert found[NAME].dtype == np.float32
    np.testing.assert_array_equal(found[NAME], f32(2.5, 5, 0))
    # an expert that saw nothing is as important in all its channels
    np.testing.assert_array_equal(found["experts"], f32(0.5, 1, 1, 1, 5, 6) / f32(1, 1, 1, 1, 3, 3))


def test_both_formats_agree(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    sums, tokens, calls = chance.random(64, dtype=np.float32) * 1e4, 2048, 4
    new = read_imatrix(modern(tmp_path / "a.gguf", {"w.in_sum2": sums[None], "w.counts": f32(tokens).reshape(1, 1)}))
    old = read_imatrix(legacy(tmp_path / "a.dat", [("w", calls, (sums / tokens * calls).tolist())]))
    np.testing.assert_allclose(new["w"], old["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.in_sum2": f32(1, 2)}, "only one of .in_sum2 and .counts"),
        ({"w.counts": f32(1)}, "only one of"),
        ({"w.in_sum2": f32(1, 2), "w.counts": np.array([1], np.float16)}, "should be F32 and is F16"),
        ({"w.in_sum2": f32(1, 2, 3), "w.counts": f32(1, 1)}, "3 sums, which do not divide among 2 counts"),
        ({"w.in_sum2": f32(1, float("nan")), "w.counts": f32(1)}, "negative or not finite"),
        ({"w.in_sum2": f32(1, -1), "w.counts": f32(1)}, "negative or not finite"),
        ({"w.in_sum2": f32(1, float("inf")), "w.counts": f32(1)}, "negative or not finite"),
        ({"w.in_sum2": f32(1, 2), "w.counts": f32(float("nan"))}, "counts that are negative or not finite"),
        ({"w.in_sum2": f32(1, 2), "w.counts": f32(-1)}, "counts that are negative or not finite"),
    ],
)
def test_modern_that_contradicts_itself(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=message):
        read_imatrix(modern(tmp_path / "a.gguf", tensors))


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="no importance matrix"):
        read_imatrix(modern(tmp_path / "a.gguf", {"blk.0.attn_q.weight": f32(1)}))


@pytest.mark.parametrize(
    ("entries", "count", "message"),
    [
        ([("w", 1, [1.0])], 1 << 30, "1073741824 entries"),
        ([("w", 1, [1.0])], 0, "0 entries"),
        ([("w", 1, [1.0])], -1, "-1 entries"),
        ([("w", 1, [1.0]), ("w", 1, [1.0])], None, "'w' is there twice"),
        ([("", 1, [1.0] * 9)], None, "a name of 0 bytes"),
        ([("w", 1, []), ("v" * 40, 1, [1.0])], None, "'w' has 0 values"),
        ([("w", 1, [float("nan")])], None, "negative or not finite"),
        ([("w", 1, [-1.0])], None, "negative or not finite"),
    ],
)
def test_legacy_that_contradicts_itself(
    tmp_path: Path, entries: list[tuple[str, int, list[float]]], count: int | None, message: str
) -> None:
    with pytest.raises(CorruptCheckpoint, match=message):
        read_imatrix(legacy(tmp_path / "a.dat", entries, count=count))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="No such file"):
        read_imatrix(tmp_path / "absent.dat")
    with pytest.raises(NotACheckpoint, match="directory"):
        read_imatrix(tmp_path)


def test_cut_and_changed_files_raise_only_our_errors(tmp_path: Path) -> None:
    old = legacy(tmp_path / "a.dat", [(NAME, 3, [3.0, 1.0]), ("output.weight", 2, [2.0])]).read_bytes()
    new = modern(tmp_path / "a.gguf", {"w.in_sum2": f32(1, 2), "w.counts": f32(1)}).read_bytes()
    path, chance = tmp_path / "broken", random.Random(0)
    for size in range(len(old)):
        path.write_bytes(old[:size])
        with pytest.raises(CorruptCheckpoint):
            read_imatrix(path)
    for whole in (old, new):
        for _ in range(400):
            broken = bytearray(whole)
            broken[chance.randrange(len(whole))] = chance.choice((0, 1, 127, 128, 255))
            path.write_bytes(broken)
            try:
                read_imatrix(path)
            except EdgeportError as error:
                assert len(str(error)) < 600
