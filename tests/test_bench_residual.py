"""PortLLM's residual: figures of factors against dense matrices, and the published table against its own figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import edgeport
from bench import residual
from bench.gate import RESULTS
from bench.residual import NONE, changes, compared, measured, norm_of, shown, told
from edgeport.benchmark.results import Results
from edgeport.locate import open_model
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch


def dense(base: Path, patch: Path, output: Path) -> dict[str, torch.Tensor]:
    """What a port adds to each weight that it changes."""
    out = edgeport.port(patch=patch, new_base=base, output=output, quant="f32").output
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    return {name: (after[name] - value).double() for name, value in before.items() if not torch.equal(after[name], value)}


def norm(found: dict[str, torch.Tensor]) -> float:
    return float(sum(value.square().sum() for value in found.values()) ** 0.5)


def test_figures_are_those_of_the_dense_changes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    one, other = save_patch(base, tmp_path / "one"), save_patch(base, tmp_path / "other", seed=5, r=6)
    source = open_model(base)
    ours = changes(source, one)
    found = compared(ours, changes(source, other), norm_of(source, ours))
    first, second = dense(base, one, tmp_path / "first"), dense(base, other, tmp_path / "second")
    left = {name: second[name] - value for name, value in first.items()}
    weights = load_file(base / "model.safetensors")
    tops = [torch.linalg.matrix_norm(left[name], 2) / torch.linalg.matrix_norm(value, 2) for name, value in first.items()]
    product = sum(float((first[name] * second[name]).sum()) for name in first)
    expected = {
        "again": norm(second) / norm(first), "R": norm(left) / norm(first), "top": float(torch.stack(tops).quantile(0.5)),
        "cosine": product / norm(first) / norm(second), "W": norm({name: weights[name] for name in first}) / norm(left),
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    same = compared(ours, ours, 1.0)
    assert same["R"] == pytest.approx(0, abs=1e-6) and same["cosine"] == pytest.approx(1)


def test_pairs_of_no_evolution_and_of_a_stage(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.suite.PATCHES", tmp_path / "none")
    base = tiny_llama()
    for seed, name in enumerate(("ours/sums", "again/seed1/sums", "again/refits/chain2-sums", "again/refits/lora-sums")):
        save_patch(base, tmp_path / name, seed=seed)
    source = open_model(base)
    pairs = list(measured(source, ["chain2"], tmp_path / "again", tmp_path / "ours"))
    assert [pair["evolution"] for pair in pairs] == [NONE[1], "chain 2"]
    assert list(measured(source, [], tmp_path / "ours", tmp_path / "ours")) == [], "a patch is not its own refit"
    later = {**pairs[1], "R": 0.5}
    assert told([pairs[1], pairs[0]], [later], []) == [{**pairs[0], "kept": None}, {**later, "kept": None}]
    assert "another seed" in shown(told(pairs, [], []))


def test_what_has_no_residual(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    source = open_model(base)
    ours = changes(source, save_patch(base, tmp_path / "one", target_modules=["q_proj"]))
    with pytest.raises(SystemExit, match="change different weights"):
        compared(ours, changes(source, save_patch(base, tmp_path / "other", target_modules=["v_proj"])), 1.0)
    with pytest.raises(SystemExit, match="whole has values that are no product of factors"):
        changes(source, save_patch(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm"]))


def test_stages_take_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["residual", "lora"])
    with pytest.raises(SystemExit):
        residual.main()
    assert "STAGE without --refits" in capsys.readouterr().err


def test_the_published_table_is_of_its_figures_and_of_the_suites_rows() -> None:
    pairs = json.loads((RESULTS / "residual.json").read_text())
    assert (RESULTS / "residual.txt").read_text() == shown(pairs) + "\n"
    assert told(pairs, [], Results.read(RESULTS / "suite" / "results.json").rows) == pairs
