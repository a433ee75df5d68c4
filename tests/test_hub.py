"""Names on the hub, its local cache, and runs without a network."""

from __future__ import annotations

import json
from pathlib import Path

from bench.spoiling import factors, patch, port, run
from edgeport.hub import called
from edgeport.locate import MODEL_FILES, NOT_READ
from tests.commands import child, content, ran

NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_local_folders_port_without_a_network(tmp_path: Path) -> None:
    ran(child(port(tmp_path), before=NO_NETWORK, HF_HUB_OFFLINE="0"))
    assert run(["verify", str(tmp_path / "out")]).code == 0


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, folder: Path, name: str, branch: str) -> None:
    """Move a folder into the hub's cache, as a download would have left it there."""
    folder.mkdir(exist_ok=True)
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / branch).write_text(COMMIT)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / COMMIT)


def test_hub_names_are_found_in_the_local_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(port(tmp_path, to="local")).code == 0
    cached(cache, tmp_path / "base", "org/tiny-base", "main")
    cached(cache, tmp_path / "patch", "org/tiny-patch", "v1.0")
    argv = port(tmp_path, "org/tiny-base", "org/tiny-patch@v1.0:1.0", "--offline")
    ran(child(argv, before=NO_NETWORK, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="0"))
    assert content(tmp_path / "out") == content(tmp_path / "local")
    inputs = json.loads((tmp_path / "out" / "edgeport.json").read_text())["inputs"]
    assert {"name": "org/tiny-base", "revision": COMMIT}.items() <= inputs["new_base"].items()
    assert {"name": "org/tiny-patch@v1.0", "revision": COMMIT}.items() <= inputs["patches"][0].items()
    argv = ["diagnose", "--patch", "org/tiny-patch@v1.0", "--new-base", "org/tiny-base", "--offline", "--json"]
    told = json.loads(ran(child(argv, HF_HUB_CACHE=str(cache))).stdout)
    assert (told["new_base"], told["patches"]) == ("org/tiny-base", ["org/tiny-patch@v1.0"])
    (tmp_path / "other").mkdir()
    other = str(patch(tmp_path / "other", tensors=factors(module="self_attn.none_such")))
    answer = child([*port(tmp_path, "org/tiny-base", other), "--overwrite", "--offline"], HF_HUB_CACHE=str(cache))
    assert "which org/tiny-base does not have" in answer.stderr


def test_a_folder_of_the_hub_s_cache_is_called_as_on_the_hub(tmp_path: Path) -> None:
    cached(tmp_path, tmp_path / "base", "gpt2", "main")
    folder = tmp_path / "models--gpt2" / "snapshots" / COMMIT
    assert (called(folder), called(folder / "model.gguf"), called(tmp_path)) == ("gpt2", "model.gguf", tmp_path.name)
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("another commit")
    assert called(folder) == f"gpt2@{COMMIT}"


def test_nothing_is_downloaded_that_is_not_read() -> None:
    """By huggingface_hub's own rule, of what repositories have beside a model."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "own.py"]
    beside = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "README.md"]
    assert list(filter_repo_objects([*wanted, *beside], allow_patterns=MODEL_FILES, ignore_patterns=NOT_READ)) == wanted
