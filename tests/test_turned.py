"""Weights whose rows are columns of stored tensors: the spans, the bytes, and the memory that one large matrix takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from bench.memory import CHILD
from bench.shapes import Shape, write_model, write_patch
from edgeport.blocks import read_parts
from edgeport.checkpoint import read_lines
from edgeport.errors import CorruptCheckpoint, PlanViolation
from edgeport.locate import open_model
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES, MIB
from edgeport.seams import FileLayout
from edgeport.staging import Staging
from edgeport.steps import stored_alike
from edgeport.tensor import Part, TensorSpec


def test_spans_of_a_turned_part() -> None:
    part = Part(TensorSpec("t", "I32", (3, 10), 120), 8, lines=3)
    assert part.pitch == 40 and part.span(range(2, 6), 2) == (8, 24) and part.size(range(2, 6), 2) == 48
    assert part.span(range(8, 11), 2) == (32, 40)  # the last granule may be short
    upright = Part(TensorSpec("t", "I32", (10, 3), 120), 24)
    assert upright.pitch == 120 and upright.span(range(2, 6), 2) == (24, 72) and upright.size(range(2, 6), 2) == 48
    assert Part(TensorSpec("t", "I32", (5,), 20), 0).size(range(2, 6), 2) == 20


def test_lines_are_read_and_written_in_place(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(60)))
    assert read_lines(file, 12, 3, 4, 10) == bytes([12, 13, 14, 22, 23, 24, 32, 33, 34, 42, 43, 44])
    with pytest.raises(CorruptCheckpoint, match="ends at byte 60"):
        read_lines(file, 28, 4, 4, 10)
    with file.open("r+b") as opened:
        staging = Staging(tmp_path, {"file": opened.fileno()}, [FileLayout("file", 60, (), {"t": 10})])
        staging.expect("t", 8)
        staging.write("t", 2, bytes([90, 91, 92, 93, 94, 95]), lines=3, pitch=10)
        with pytest.raises(PlanViolation, match="more bytes"):
            staging.write("t", 2, bytes(3), lines=3, pitch=10)
        assert staging.read_lines(TensorSpec("t", "U8", (3, 10), 30), 1, 4, 3) == bytes(
            [11, 90, 91, 21, 92, 93, 31, 94, 95]
        )
    expected = bytearray(range(60))
    for line in range(3):
        expected[12 + 10 * line : 14 + 10 * line] = bytes([90 + 2 * line, 91 + 2 * line])
    assert file.read_bytes() == expected


def test_a_block_of_rows_is_a_block_of_columns(tmp_path: Path) -> None:
    import numpy as np

    rows, columns, groups = 32, 64, 2
    for method, words in (("gptq", (8, rows)), ("awq", (columns, rows // 8))):
        stored = {
            "m.qweight": np.arange(words[0] * words[1], dtype=np.int32).reshape(words),
            "m.qzeros": np.arange(groups * rows // 8, dtype=np.int32).reshape(groups, rows // 8),
            "m.scales": np.ones((groups, rows), np.float16), "m.g_idx": np.arange(columns, dtype=np.int32) // 32,
        }  # fmt: skip
        if method == "awq":
            del stored["m.g_idx"]
        folder = tmp_path / method
        folder.mkdir()
        save_file(stored, folder / "model.safetensors")
        quantization = {"quant_method": method, "bits": 4, "group_size": 32}
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
        source = open_model(folder)
        weight = source.weights["m.weight"]
        assert weight.shape == (rows, columns) and weight.granule == 8
        found = read_parts(source, weight, range(8, 24))
        each = words[1] // 4  # words of eight rows
        assert found["qweight"] == stored["m.qweight"][:, each : 3 * each].tobytes()
        assert found["qzeros"] == stored["m.qzeros"][:, 1:3].tobytes()
        assert found["scales"] == stored["m.scales"][:, 8:24].tobytes()
        assert found.get("g_idx") in (None, stored.get("m.g_idx", np.zeros(0)).tobytes())


def child(base: Path, patch: Path, output: Path, quant: str | None, max_ram: int) -> dict[str, float]:
    script = CHILD.format(patch=str(patch), base=str(base), output=str(output), to="hf", quant=quant, max_ram=max_ram)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("quant", ["gptq-4", pytest.param("awq-4", marks=pytest.mark.slow)])
def test_one_large_matrix_keeps_to_the_plan(quant: str, tmp_path: Path) -> None:
    """In processes of their own: 16 million weights, 64 MiB as float32, whose blocks have 12 MiB to be quantized and patched."""
    shape = Shape(2048, 1, 8192, 256, 16, 1)
    base, patch = write_model(shape, tmp_path / "plain"), write_patch(shape, tmp_path / "patch", 4)
    budget = 12 * MIB
    for output, onto, asked in ((quant, base, quant), (f"{quant}-again", tmp_path / quant, None)):
        found = child(onto, patch, tmp_path / output, asked, IMPORT_BYTES + ALLOWANCE_BYTES + budget)
        assert 0 < found["above"] <= found["predicted"] <= ALLOWANCE_BYTES + budget, (output, found)
    before, after = (open_model(tmp_path / name).weights for name in (quant, f"{quant}-again"))
    assert all(stored_alike(before[name], after[name]) for name in before)
    assert {weight.codec for weight in after.values()} == {"plain", quant.split("-")[0]}
