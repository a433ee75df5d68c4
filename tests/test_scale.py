"""The measure of large models: a plan run on holes, of which all is read and computed, and nothing written."""

from __future__ import annotations

from pathlib import Path

from bench.scale import measure, write_patch, write_sparse
from bench.shapes import Shape


def test_a_plan_runs_on_holes(tmp_path: Path) -> None:
    shape = Shape(256, 2, 512, 2000, 8, 4, tied=False)
    base = write_sparse(shape, tmp_path / "base")
    write_patch(shape, tmp_path / "patch")
    stored = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert stored > 2 * shape.parameters
    found = measure(tmp_path)
    assert 0 < found["above"] < found["peak"] and found["seconds"] > 0
    # every planned byte was given to the writer, or the run would have failed; the file has its size and no content
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    assert weights.stat().st_size - header == 2 * shape.parameters
    assert not any(weights.read_bytes()[header:])
