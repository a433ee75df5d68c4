"""The examples of CONTRIBUTING.md, taken from the page, installed as a plugin by entry points, and run."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import edgeport
from edgeport import registry
from edgeport.errors import ConvertError, ShapeMismatch, TargetMissing
from edgeport.locate import open_model

if TYPE_CHECKING:
    from tests.conftest import TinyLlama

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
MODULES = {found[1]: found[0] for found in re.finditer(r"(?ms)(?<=```python\n)# (\w+)\.py\n.*?(?=^```$)", PAGE)}
GROUPS = tomllib.loads(re.findall(r"(?ms)^```toml\n(.*?)^```$", PAGE)[0])["project"]["entry-points"]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's modules as an installed distribution, which is what importlib.metadata takes a *.dist-info folder for."""
    site = tmp_path_factory.mktemp("site")
    for name, source in MODULES.items():
        (site / f"{name}.py").write_text(source)
    info = site / "edgeport_examples-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeport-examples\nVersion: 1.0\n")
    for group, points in GROUPS.items():
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items()))
    monkeypatch.syspath_prepend(site)
    registry.members.cache_clear()
    yield
    registry.members.cache_clear()
    for name in MODULES:
        sys.modules.pop(name, None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_page_has_one_example_of_each_kind() -> None:
    assert set(MODULES) == {"int8_rows", "row_shift", "npy_folder"}
    assert set(GROUPS) == {"edgeport.codecs", "edgeport.patches", "edgeport.converters"}
    known = edgeport.formats()
    assert known["codecs"]["int8-rows"] == {"INT8_ROWS": "rw"}
    assert "row-shift" in known["patches"]
    assert known["containers"]["npy"] == "read+write"


def test_codec_reads_a_folder_in_its_format(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    stored = {}
    for name, tensor in tensors(folder).items():
        if tensor.ndim == 2:
            scale = tensor.abs().amax(1) / 127
            stored |= {name: (tensor / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    assert edgeport.inspect(folder)["formats"]["INT8_ROWS"] == 16
    edgeport.export(model=folder, output=tmp_path / "out", to="hf", quant="f32")

    written = tensors(tmp_path / "out")
    assert set(written) == {name for name in stored if not name.endswith("_scale")}
    for name, tensor in written.items():
        scale = stored.get(f"{name}_scale")
        assert torch.equal(tensor, stored[name] if scale is None else stored[name].float() * scale[:, None])


def test_codec_encodes_what_it_decodes() -> None:
    codec = registry.codec_of("INT8_ROWS")
    weight = codec.layout("w", (2, 4), "INT8_ROWS")
    # by hand: the largest of a row is 127 steps, so 1.27 has a step of 0.01 and 254 a step of 2
    matrix = torch.tensor([[1.27, -0.5, 0.0, 0.01], [254.0, 2.0, -2.0, -254.0]])
    stored = codec.encode(weight, matrix, None)
    assert stored["codes"].view(torch.int8).tolist() == [127, -50, 0, 1, 127, 1, -1, -127]
    assert {role: data.numel() for role, data in stored.items()} == {"codes": 8, "scale": 8}
    torch.testing.assert_close(codec.decode(weight, stored), matrix)


def test_patch_kind_changes_its_target_alone(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama()
    before = tensors(folder)
    vector = torch.linspace(-1, 1, before[Q_PROJ].shape[0])
    save_file({Q_PROJ: vector}, tmp_path / "my.shift.safetensors")

    receipt = edgeport.port(patch=f"{tmp_path}/my.shift.safetensors:0.5", new_base=folder, output=tmp_path / "out", to="hf")

    assert receipt.to_json()["patched"] == 1
    after = tensors(tmp_path / "out")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor + 0.5 * vector[:, None] if name == Q_PROJ else tensor), name


@pytest.mark.parametrize(
    ("name", "length", "error"), [(Q_PROJ, 3, ShapeMismatch), ("model.layers.9.mlp.up_proj.weight", 64, TargetMissing)]
)
def test_patch_kind_refuses_before_a_byte_is_written(
    tiny_llama: TinyLlama, tmp_path: Path, name: str, length: int, error: type[Exception]
) -> None:
    save_file({name: torch.zeros(length)}, tmp_path / "my.shift.safetensors")
    with pytest.raises(error, match=re.escape(name)):
        edgeport.port(patch=tmp_path / "my.shift.safetensors", new_base=tiny_llama(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converter_writes_what_numpy_reads_and_reads_it_back(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    folder = tiny_llama(dtype="bfloat16")
    edgeport.export(model=folder, output=tmp_path / "npy", to="npy")
    for name, tensor in tensors(folder).items():
        np.testing.assert_array_equal(np.load(tmp_path / "npy" / f"{name}.npy"), tensor.float().numpy())
    edgeport.verify(tmp_path / "npy")

    assert open_model(tmp_path / "npy").container == "npy"
    edgeport.export(model=tmp_path / "npy", output=tmp_path / "back", to="hf", quant="bf16")
    assert {name: tensor.tolist() for name, tensor in tensors(tmp_path / "back").items()} == {
        name: tensor.tolist() for name, tensor in tensors(folder).items()
    }
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_converter_refuses_what_it_cannot_hold(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="f32 alone"):
        edgeport.export(model=tiny_llama(), output=tmp_path / "npy", to="npy", quant="Q8_0")
