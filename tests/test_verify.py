"""What `verify` and `inspect` say of models, patches and outputs, spoilt manifests included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.bad_input import listing
from bench.spoiling import NORM, export, model, patch, port, run, tokenizer
from edgeport.places import manifest_path
from tests.commands import content, said, with_tokenizer


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_verify(to: str, tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    output = tmp_path / ("out" if to == "hf" else "out.gguf")
    assert run(export(base, output, "--to", to)).code == 0
    found = said(["verify", str(output)])
    assert found["verified"] is True and found["output"] == str(output)
    assert found["files"] == (content(output) if to == "hf" else {output.name: listing(tmp_path)[output.name]})
    data = bytearray((file := output if to == "gguf" else output / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    answer = run(["verify", str(output), "--json"])
    assert (answer.code, answer.output) == (1, "") and f"{file.name} has changed" in answer.error


def test_nothing_to_compare_with_is_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a script's variable is not set, in the folder of the output itself."""
    assert run(port(tmp_path)).code == 0
    monkeypatch.chdir(tmp_path / "out")
    answer = run(["verify", ".", "--against", ""])
    assert answer.code == 1 and "an empty name was given" in answer.error and not answer.output


def test_verify_is_of_the_file_that_is_named(tmp_path: Path) -> None:
    """Copied with its manifest, and spoilt: what the manifest is of lies beside it as it was."""
    first, copy = tmp_path / "first.gguf", tmp_path / "copy.gguf"
    first.write_bytes(b"whole")
    entry = {"bytes": 5, "sha256": listing(tmp_path)["first.gguf"]}
    for path in (first, copy):
        manifest_path(path, False).write_text(json.dumps({"edgeport": 1, "files": {"first.gguf": entry}}))
    copy.write_bytes(b"spoilt")
    assert said(["verify", str(first)])["files"] == {"first.gguf": entry["sha256"]}
    answer = run(["verify", str(copy)])
    assert answer.code == 1 and "manifest beside copy.gguf is of first.gguf" in answer.error


@pytest.mark.parametrize("files", [{}, None, 5, "out-1.gguf"])
def test_a_manifest_of_no_files(files: Any, tmp_path: Path) -> None:
    (tmp_path / "out-1.gguf").write_bytes(b"spoilt")
    for name in ("out", "out-1.gguf"):
        manifest_path(tmp_path / name, False).write_text(json.dumps({"edgeport": 1, "files": files}))
        answer = run(["verify", str(tmp_path / "out-1.gguf")])
        assert answer.code == 1 and ("has no manifest" if name == "out" else "is not a manifest of edgeport") in answer.error


@pytest.mark.parametrize("facts", [5, [5], [{"retention": "all"}], [{"retention": 1.0}]])
def test_a_manifest_that_tells_nonsense_of_its_weights(facts: Any, tmp_path: Path) -> None:
    base, manifest = model(tmp_path), {"edgeport": 1, "files": {"config.json": {"bytes": 0, "sha256": ""}}}
    (base / "edgeport.json").write_text(json.dumps(manifest | {"survival": {"mean": 1.0}, "per_weight": facts}))
    answer = run(["inspect", str(base)])
    assert answer.code == 1 and "tells of its weights" in answer.error


def test_inspect_model(tmp_path: Path) -> None:
    base = model(tmp_path)
    facts = said(["inspect", str(base)])
    assert (facts["kind"], facts["container"], facts["model_type"], facts["tied_head"]) == ("model", "hf", "llama", False)
    assert facts["formats"] == {"F32": facts["weights"]} and facts["codecs"] == ["plain"]
    assert facts["tensors"][NORM] == {"shape": [32], "format": "F32"}
    assert facts["fingerprint"] == said(["inspect", str(model(tmp_path, "copy"))])["fingerprint"]
    assert run(port(tmp_path, base)).code == 0
    assert said(["inspect", str(tmp_path / "out")])["fingerprint"] != facts["fingerprint"]
    assert "model_type" in run(["inspect", str(base)]).output


def test_inspect_patch(tmp_path: Path) -> None:
    given = patch(tmp_path)
    facts = said(["inspect", str(given)])
    assert (facts["kind"], facts["patch_kind"]) == ("patch", "lora")
    assert (facts["rank"], facts["alpha"], facts["scaling"], facts["rslora"]) == ([4], 8, [2.0], False)
    assert facts["target_modules"] == ["q_proj"] and len(facts["tensors"]) == 2
    assert facts["base_fingerprint"] is None


def test_a_failed_comparison_is_not_said_to_be_verified(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path)
    assert run(port(tmp_path, base)).code == 0
    answer = run(["verify", str(tmp_path / "out"), "--against", str(base), "--max-kl", "0", "--json"])
    assert answer.code == 1 and json.loads(answer.output)["verified"] is False
    assert said(["verify", str(tmp_path / "out"), "--against", str(base), "--max-kl", "1"])["verified"] is True


def test_inspect_gguf(tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    assert run(export(base, tmp_path / "out.gguf", "--quant", "Q8_0")).code == 0
    facts = said(["inspect", str(tmp_path / "out.gguf")])
    assert (facts["kind"], facts["container"], facts["model_type"]) == ("model", "gguf", "llama")
    assert facts["tensors"]["lm_head.weight"] == {"shape": [320, 32], "format": "Q8_0"}
    assert facts["tensors"].keys() == said(["inspect", str(base)])["tensors"].keys()
