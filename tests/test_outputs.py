"""Where an output may go, and what it takes the place of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.spoiling import model, port, run, tokenizer
from tests.commands import content


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_overwrite_replaces_an_output_of_edgeport(to: str, tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    output = tmp_path / ("out" if to == "hf" else "out.gguf")
    argv = port(tmp_path, base, None, "--to", to, to=output.name)
    assert run(argv).code == 0
    first = content(tmp_path)
    assert run(argv).code == 1
    assert content(tmp_path) == first
    assert run([*argv, "--overwrite", "--quant", "f16"]).code == 0
    assert content(tmp_path).keys() == first.keys() and content(tmp_path) != first
    assert run([*argv, "--overwrite"]).code == 0
    assert content(tmp_path) == first


def test_overwrite_keeps_what_others_have_put_into_the_folder(tmp_path: Path) -> None:
    argv = [*port(tmp_path), "--overwrite"]
    assert run(argv).code == 0
    (tmp_path / "out" / "eval").mkdir()
    (tmp_path / "out" / "eval" / "scores.txt").write_text("90.8\n")
    before = content(tmp_path)
    refused = run(argv)
    assert refused.code == 1 and content(tmp_path) == before
    assert "eval is nothing that edgeport wrote; move it away, or give another -o" in refused.error


def test_no_output_takes_the_place_of_a_mount_point(tmp_path: Path) -> None:
    """It could not be renamed there, after all the work."""
    refused = run([*port(tmp_path, to="/proc"), "--overwrite"])
    assert refused.code == 1 and ("mount point" if os.access("/", os.W_OK) else "not writable") in refused.error


@pytest.mark.parametrize("there", [True, False])
def test_an_output_through_a_link(there: bool, tmp_path: Path) -> None:
    """A link to a larger disk stays one, and the output goes where it leads."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/large")
    if there:
        (tmp_path / "disk" / "large").mkdir()
    assert run([*port(tmp_path), "--overwrite"]).code == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "large" / "edgeport.json").is_file()
    assert run(["verify", str(tmp_path / "out")]).code == 0


def test_an_output_into_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = port(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run([*argv[:-3], "-o", ".", "--overwrite", "--no-progress"]).code == 0
    assert run(["verify", str(tmp_path / "here")]).code == 0


def test_a_model_in_the_folder_at_hand_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = port(tmp_path)
    monkeypatch.chdir(tmp_path / "base")
    assert run([*argv[:3], "--new-base", ".", *argv[5:]]).code == 0
    assert json.loads((tmp_path / "out" / "edgeport.json").read_text())["inputs"]["new_base"]["name"] == "base"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run([*port(tmp_path), "--overwrite"]).code == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
