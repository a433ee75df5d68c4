"""A text that guides the rounding and ends before its time: its failures, and runs that are interrupted and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgeport
from bench import spoiling
from edgeport import run
from edgeport.activations import Course, calibrate
from edgeport.errors import BrokenOff, VerificationFailed
from tests.conftest import TinyLlama
from tests.test_patch_aware import quantized_pair
from tests.test_resume import stopping


def test_a_text_that_breaks_off_on_its_way_does_not_mix_rules(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first weight another rule serves all of them; after it none would serve the rest as it did the first."""
    base, patch = quantized_pair(tiny_llama, tmp_path)
    heard = calibrate

    def broken(after: int) -> Any:
        def some(course: Course, watch: Any) -> Any:
            for number, answer in enumerate(heard(course, watch)):
                if number == after:
                    raise VerificationFailed("the text is gone")
                yield answer

        return some

    monkeypatch.setattr("edgeport.activations.calibrate", broken(3))
    job: dict[str, Any] = {"patch": patch, "new_base": base, "probe": False}
    with pytest.raises(BrokenOff, match=r"broke off on its way \(the text is gone\).*give --rounding stochastic"):
        edgeport.port(**job, output=tmp_path / "out")
    # nor does a run that goes on, whose own text breaks off before its first weight
    with pytest.raises(BrokenOff, match="with --resume goes on"):
        edgeport.port(**job, output=tmp_path / "resumed", resume=True)
    monkeypatch.setattr("edgeport.activations.calibrate", broken(0))
    with pytest.raises(BrokenOff, match="broke off on its way"):
        edgeport.port(**job, output=tmp_path / "resumed", resume=True)
    monkeypatch.setattr("edgeport.activations.calibrate", heard)
    receipt = edgeport.port(**job, output=tmp_path / "resumed", resume=True)
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"patch-aware"}
    assert any("weights were written before an interruption" in note for note in receipt.notes)
    monkeypatch.setattr("edgeport.activations.calibrate", broken(0))
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", probe=False)
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"stochastic"}
    assert "no text was run through the model to guide the rounding: the text is gone" in receipt.notes
    # and a run that has begun so goes on so, though the text would run by now
    job |= {"output": tmp_path / "without", "resume": True}
    stop_at(6, job, monkeypatch)
    monkeypatch.setattr("edgeport.activations.calibrate", heard)
    resumed = edgeport.port(**job)
    assert resumed.facts == receipt.facts and resumed.calibration is None
    assert "no text was run through the model to guide the rounding: the text is gone" in resumed.notes


def stop_at(weight: int, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as that patched weight is begun, or, after the last one, as the manifest is written."""
    with monkeypatch.context() as context:

        def sealing(*_: Any) -> None:
            raise KeyboardInterrupt

        context.setattr(run, "edit", stopping(weight))
        context.setattr(run, "write_manifest", sealing)
        with pytest.raises(KeyboardInterrupt):
            edgeport.port(**job)


@pytest.mark.parametrize("words", [0, 3])
def test_a_run_that_goes_on_tells_of_the_text_before(
    words: int, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when all weights were written, and only the manifest was not."""
    base, patch = quantized_pair(tiny_llama, tmp_path)
    job: dict[str, Any] = {"patch": patch, "new_base": base, "probe": False}
    if words:  # fewer than are left to the probe
        job["calibration"] = tmp_path / "text"
        job["calibration"].write_text("diagnosis " * words)
    whole = edgeport.port(**job, output=tmp_path / "whole")
    job |= {"output": tmp_path / "out", "resume": True}
    stop_at(0, job, monkeypatch)
    resumed = edgeport.port(**job)
    assert whole.calibration and resumed.calibration
    assert resumed.calibration["tokens"] == whole.calibration["tokens"] and resumed.calibration["peak_ram_bytes"] > 0
    assert [note for note in resumed.notes if "before an interruption" not in note] == list(whole.notes)
    assert any("guides no rounding" in note for note in resumed.notes) == bool(words)


def test_a_model_that_fails_in_this_process_does_not_end_the_port(tmp_path: Path) -> None:
    """transformers' own errors are as many as its models; the weights are rounded without the text, as where another process
    fails."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    tensors = spoiling.weights()
    for name in "kv":  # three heads of keys, which do not divide four of queries
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = spoiling.noise((24, 32), 7)
    base = spoiling.model(tmp_path, tensors=tensors, num_key_value_heads=3)
    spoiling.tokenizer(base, 320)
    quantized = edgeport.export(model=base, output=tmp_path / "nf4", to="hf", quant="nf4").output
    receipt = edgeport.port(patch=spoiling.patch(tmp_path), new_base=quantized, output=tmp_path / "out", probe=False)
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"stochastic"}
    assert any(note.startswith("no text was run through the model to guide the rounding: RuntimeError") for note in receipt.notes)
