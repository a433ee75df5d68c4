"""The evolved base that was never quantized: the noise takes a Q4_1 model off its grid, and the report can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgeport
from edgeport.locate import open_model
from tests.conftest import TinyLlama


def test_noise_leaves_nothing_of_the_grid(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft, of the extra bench, is not installed")
    from transformers import AutoModelForCausalLM

    from bench.train_full import dither, grid_report, save

    edgeport.export(model=tiny_llama("plain"), output=tmp_path / "q.gguf", to="gguf", quant="Q4_1")
    edgeport.export(model=tmp_path / "q.gguf", output=tmp_path / "folder", to="hf", quant="f32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    dither(model, seed=0)
    for name, weight in model.named_parameters():
        moved = (weight - before[name]).abs().max().item()
        widest = (before[name].amax() - before[name].amin()).item() / 15 / 2
        assert (0 < moved <= widest) if weight.ndim == 2 else moved == 0
    save(model, tmp_path / "q.gguf", tmp_path / "dithered")

    def mean(path: Path, format: str) -> Any:
        return grid_report(open_model(path))[format]["mean_steps"]

    # two of a block's 32 values are its ends, which lie on any grid that is made for it
    assert mean(tmp_path / "q.gguf", "Q4_1") == pytest.approx(0, abs=0.02)
    assert mean(tmp_path / "dithered", "Q4_1") == pytest.approx(0.25 * 30 / 32, abs=0.01)
    assert sum(grid_report(open_model(tmp_path / "dithered"))["NF4"]["shares"]) == pytest.approx(1, abs=1e-3)  # type: ignore[call-overload]
