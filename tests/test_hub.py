"""Names on the hub, its local cache, and runs without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

import edgeport
from bench.spoiling import factors, model, patch, port, run
from edgeport.hub import FILES, called, left_out
from tests.commands import child, content, ran
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_local_folders_port_without_a_network(tmp_path: Path) -> None:
    ran(child(port(tmp_path), before=NO_NETWORK, HF_HUB_OFFLINE="0"))
    assert run(["verify", str(tmp_path / "out")]).code == 0


def test_no_process_of_a_port_uses_the_network(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Neither the text that guides the rounding, nor the probe, nor a comparison afterwards."""
    (tmp_path / "ban").mkdir()
    (tmp_path / "ban" / "sitecustomize.py").write_text(NO_NETWORK)
    base = tiny_llama()
    lora = save_patch(base, tmp_path / "lora", std=0.05)
    quantized = edgeport.export(model=base, output=tmp_path / "nf4", to="hf", quant="nf4").output
    ban = {"PYTHONPATH": str(tmp_path / "ban"), "HF_HUB_OFFLINE": "0"}
    argv = ["port", "--patch", str(lora), "--new-base", str(quantized), "-o", str(tmp_path / "out"), "--json", "--no-progress"]
    told = json.loads(ran(child(argv, **ban)).stdout)
    assert told["probe"]["kept"] > 0.5 and told["calibration"]["tokens"] > 0
    ran(child(["verify", str(tmp_path / "out"), "--against", str(quantized), "--max-kl", "9"], **ban))


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


BESIDE = ("pytorch_model.bin", "training_args.bin", "README.md")


class Hub(SimpleHTTPRequestHandler):
    """The hub's own answers for a repository, org/tiny, that is a folder; what was fetched of it."""

    folder: Path
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(path for path in self.folder.iterdir())
        if path.startswith("/api/models/org/tiny/tree/"):
            self.answer([{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": COMMIT} for one in files])
        elif path.startswith("/api/models/org/tiny"):
            self.answer({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": one.name} for one in files]})
        elif path.startswith("/org/tiny/resolve/") and (file := self.folder / path.rpartition("/")[2]).is_file():
            self.fetched.append(file.name)
            self.send_response(200)
            content = file.read_bytes()
            for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"', "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")
        else:
            self.send_error(404)

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with one model, beside which there are its weights in an older form and a program's state."""
    (tmp_path / "repository").mkdir()
    Hub.folder, Hub.fetched = model(tmp_path / "repository"), []
    for name in BESIDE:
        (Hub.folder / name).write_bytes(b"not read")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_name_is_downloaded_once_and_then_found(hub: str, tmp_path: Path) -> None:
    place = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    argv = ["export", "org/tiny", "-o", str(tmp_path / "out"), "--to", "hf", "-q"]
    told = ran(child(argv, **place))
    assert not told.stderr
    assert set(Hub.fetched) == {path.name for path in Hub.folder.iterdir()} - set(BESIDE)
    before = len(Hub.fetched)
    # what nobody reads is not missed there
    argv = ["export", "org/tiny", "-o", str(tmp_path / "again"), "--to", "hf", "--offline"]
    ran(child(argv, before=NO_NETWORK, **place))
    assert len(Hub.fetched) == before and content(tmp_path / "again") == content(tmp_path / "out")


def test_a_hub_that_cannot_be_reached(hub: str, tmp_path: Path) -> None:
    place = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "", "no_proxy": ""}
    for more in ({"HF_ENDPOINT": f"{hub}/nowhere"}, {"HF_ENDPOINT": hub, "http_proxy": "http://127.0.0.1:9"}):
        told = child(["inspect", "org/tiny"], **place, **more)
        assert told.returncode == 1 and told.stderr.count("\n") == 1, told.stderr
        assert "org/tiny is no local path, and was not fetched from the hub: " in told.stderr


def test_a_name_of_other_programs_files(hub: str, tmp_path: Path) -> None:
    for path in Hub.folder.iterdir():
        path.unlink()
    (Hub.folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    place = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    for argv in (["inspect", "org/tiny"], ["export", "org/tiny", "-o", str(tmp_path / "out")]):
        told = child(argv, **place)
        assert told.returncode == 1 and "org/tiny has no folder of transformers or PEFT on the hub" in told.stderr


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
    beside = [
        "consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "README.md",
        "pytorch_model-00001-of-00002.bin", "model.fp32-00001-of-00002.safetensors", "training_args.bin",
    ]  # fmt: skip
    names = [*wanted, *beside]
    assert list(filter_repo_objects(names, allow_patterns=FILES, ignore_patterns=left_out(names))) == wanted
    older = ["pytorch_model.bin", "config.json"]
    assert list(filter_repo_objects([*older, "optimizer.bin"], allow_patterns=FILES, ignore_patterns=left_out(older))) == older
