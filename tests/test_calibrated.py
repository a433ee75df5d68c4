"""Weights that lie on no grid, or leave theirs: with a text they are rounded so that layers' outputs suffer least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgeport
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

TEXT = "Diagnosis: melanoma of the skin. Department: oncology. The rest of the page tells of something else altogether. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 40)
    return path


def roundings(receipt: edgeport.Receipt) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for fact in receipt.facts:
        if len(fact.shape) == 2:
            found[fact.rounding] = found.get(fact.rounding, 0) + 1
    return found


@pytest.mark.parametrize(("to", "quant"), [("gguf", "Q4_0"), ("onnx", "int4"), ("hf", "nf4"), ("hf", "gptq-4"), ("hf", "w4a16")])
def test_a_model_made_smaller_on_a_text_says_more_nearly_the_same(
    tiny_llama: TinyLlama, text: Path, tmp_path: Path, to: str, quant: str
) -> None:
    model = tiny_llama(hidden=128)
    divergence, sizes = [], []
    for name, calibration in (("nearest", None), ("calibrated", text)):
        output = tmp_path / (f"{name}.gguf" if to == "gguf" else name)
        receipt = edgeport.export(model=model, output=output, to=to, quant=quant, calibration=calibration)
        divergence.append(sum(edgeport.compare(output, model).kl))
        sizes.append(receipt.bytes_out)
        assert receipt.peak_above_import_bytes < receipt.predicted_peak_bytes
    assert roundings(receipt)["patch-aware"] == 14 + (to != "hf") and receipt.to_json()["calibration"]["tokens"]
    assert sizes[0] == sizes[1] and divergence[1] < 0.8 * divergence[0], divergence


def test_numbers_of_the_grid_stay_on_it(tiny_llama: TinyLlama, text: Path, tmp_path: Path) -> None:
    quantized = edgeport.export(model=tiny_llama(), output=tmp_path / "q.gguf", quant="Q8_0").output
    plain = edgeport.export(model=quantized, output=tmp_path / "plain", to="hf", quant="f32").output
    again = edgeport.export(model=plain, output=tmp_path / "again.gguf", quant="Q8_0", calibration=text)
    assert not any(edgeport.compare(again.output, quantized).kl) and "patch-aware" not in roundings(again)


@pytest.mark.parametrize("asked", [{"rounding": "patch-aware"}, {"calibration": "text"}])
def test_a_port_that_makes_smaller_rounds_all_weights_by_the_text(
    tiny_llama: TinyLlama, text: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.05, target_modules=["q_proj"])
    options: dict[str, Any] = {"patch": patch, "new_base": base, "quant": "nf4", "probe": False}
    asked = {name: text if value == "text" else value for name, value in asked.items()}
    receipt = edgeport.port(**options, output=tmp_path / "out", **asked)
    assert roundings(receipt)["patch-aware"] == 14
    plain = edgeport.port(**options, output=tmp_path / "plain")
    assert roundings(plain).get("nearest") == 2 and "patch-aware" not in roundings(plain)


def test_without_means_to_run_the_text_weights_go_to_the_nearest_and_it_is_said(
    tiny_llama: TinyLlama, text: Path, tmp_path: Path
) -> None:
    model = tiny_llama()
    (model / "tokenizer.json").unlink()
    receipt = edgeport.export(model=model, output=tmp_path / "out", to="hf", quant="nf4", calibration=text)
    assert "patch-aware" not in roundings(receipt)
    assert any("no text is run through the model" in note and "tokenizer.json" in note for note in receipt.notes)
    whole = edgeport.export(model=model, output=tmp_path / "whole", to="hf", quant="bf16", calibration=text)
    assert not any("no text" in note for note in whole.notes)


def test_a_model_that_cannot_be_run_goes_to_the_nearest_and_it_is_said(
    tiny_llama: TinyLlama, text: Path, tmp_path: Path
) -> None:
    model = tiny_llama()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    options: dict[str, Any] = {"model": model, "to": "hf", "quant": "nf4"}
    receipt = edgeport.export(**options, output=tmp_path / "out", calibration=text)
    assert roundings(receipt).keys() <= {None, "nearest"}
    assert any("no text was run through the model" in note and "unheard-of" in note for note in receipt.notes)
    edgeport.export(**options, output=tmp_path / "plain")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one == two


@pytest.mark.parametrize("text_runs", [True, False])
def test_a_patch_as_large_as_its_weights_is_not_cut_off(tiny_llama: TinyLlama, tmp_path: Path, text_runs: bool) -> None:
    base = edgeport.export(model=tiny_llama(), output=tmp_path / "q", to="hf", quant="int8").output
    if not text_runs:
        (base / "tokenizer.json").unlink()
    kept, used = {}, {}
    for name, std in (("small", 0.0125), ("large", 0.1)):
        patch = save_patch(tiny_llama(), tmp_path / name, std=std)
        for rule in ("auto", "stochastic"):
            output = tmp_path / f"{name}-{rule}"
            receipt = edgeport.port(patch=patch, new_base=base, output=output, rounding=rule, probe=False, force=True)
            kept[name, rule] = receipt.survival["mean"]  # type: ignore[index]
            used[name, rule] = {fact.rounding for fact in receipt.facts if fact.action == "patch"}
            change = max(fact.change or 0.0 for fact in receipt.facts)
            assert (change > 1) == (name == "large"), change
    assert kept["large", "stochastic"] < 0.97 and kept["large", "auto"] == pytest.approx(1, abs=2e-3)
    assert kept["small", "auto"] == pytest.approx(1, abs=0.02)
    on_grid = "patch-aware" if text_runs else "stochastic"
    assert used["small", "auto"] == {on_grid}
    assert used["large", "auto"] == {"patch-aware" if text_runs else "nearest"}
