"""Weights that lie on no grid, or leave theirs: with a text they are rounded so that layers' outputs suffer least."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import edgeport
from edgeport.errors import CorruptCheckpoint, NonFiniteResult
from edgeport.probing import read_text
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


@pytest.mark.parametrize(
    ("to", "quant"), [("gguf", "Q4_0"), ("onnx", "int4"), *(("hf", quant) for quant in ("nf4", "nf4-dq", "gptq-4", "w4a16"))]
)
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


@pytest.mark.parametrize("way", [{"residual": 4}, {"sidecar": True}, {"calibration": "text"}, {"rounding": "auto", "std": 0.3}])
def test_scales_of_scales_that_are_made_anew_are_read_as_they_are_stored(
    tiny_llama: TinyLlama, text: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    base, std = tiny_llama(hidden=128), way.get("std", 0.03)
    patch = save_patch(base, tmp_path / "patch", std=std)
    if std > 0.1:  # it leaves the grid of a base that has one
        base = edgeport.export(model=base, output=tmp_path / "quantized", to="hf", quant="nf4-dq").output
    asked = {name: text if value == "text" else value for name, value in way.items() if name != "std"}
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", quant="nf4-dq", probe=False, **asked)
    patched = [fact for fact in receipt.facts if fact.change]
    assert len(patched) == 14 and all(fact.error is not None and fact.error < 0.2 for fact in patched), patched
    assert receipt.survival is not None and receipt.survival["mean"] == pytest.approx(1, abs=0.05)


def test_a_damaged_base_is_named_as_such(tiny_llama: TinyLlama, text: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    for to, quant in (("hf", "gptq-4"), ("gguf", "Q4_0"), ("onnx", "int4")):
        output = tmp_path / f"out-{to}{'.gguf' * (to == 'gguf')}"
        with pytest.raises(NonFiniteResult, match=r"up_proj.weight: the base holds NaN or infinity in rows 0 to 31"):
            edgeport.export(model=model, output=output, to=to, quant=quant, calibration=text)


def test_what_became_of_the_text_is_said(tiny_llama: TinyLlama, text: Path, tmp_path: Path) -> None:
    model = tiny_llama(max_position_embeddings=100)
    options: dict[str, Any] = {"model": model, "to": "hf", "quant": "nf4", "overwrite": True, "output": tmp_path / "out"}
    receipt = edgeport.export(**options, calibration=text)
    assert not receipt.notes and receipt.to_json()["calibration"]["tokens"] == 3000  # whole windows
    text.write_text(TEXT)
    [note] = edgeport.export(**options, calibration=text).notes
    assert "--calibration guides no rounding: its first 512 tokens" in note
    patch = save_patch(model, tmp_path / "patch", std=0.03)
    common: dict[str, Any] = {"patch": patch, "new_base": model, "output": tmp_path / "b", "quant": "nf4", "calibration": text}
    assert edgeport.plan(**common, rounding="stochastic", probe=False).notes == (
        "nothing reads --calibration: no weight is rounded by a text, and there is no probe",
    )
    assert not edgeport.plan(**common, rounding="stochastic").notes


def test_only_the_cut_may_go_through_a_character(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than what is read of it has to be a text all the same, and Windows' mark at its begin is no part of it."""
    monkeypatch.setattr("edgeport.probing.TEXT_BYTES", 8)
    text.write_bytes(b"\xef\xbb\xbfabcd" + "é and so on".encode())
    assert read_text(text) == "abcd"
    text.write_bytes(b"ab\xffcdefgh")
    with pytest.raises(CorruptCheckpoint, match=r"not a text in UTF-8 \(invalid start byte at byte 2\)"):
        read_text(text)


def test_a_program_that_has_barely_imported_transformers_keeps_to_the_plan(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = edgeport.export(model=tiny_llama(), output=tmp_path / "q", to="hf", quant="nf4").output
    patch = save_patch(tiny_llama(), tmp_path / "patch", std=0.03)
    program = (
        "import sys, transformers, edgeport\n"
        "patch, base, output = sys.argv[1:]\n"
        "r = edgeport.port(patch=patch, new_base=base, output=output, force=True, probe=False)\n"
        "print(r.peak_above_import_bytes, r.predicted_peak_bytes, r.to_json()['calibration']['tokens'])"
    )
    done = subprocess.run([sys.executable, "-c", program, patch, base, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, predicted, tokens = map(int, done.stdout.split())
    assert peak < predicted and tokens == 3072


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
