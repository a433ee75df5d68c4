"""Folders as transformers writes and reads them: one file or shards, safetensors or `.bin`, assets verbatim."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import edgeport
from converters.hf import asset_files
from edgeport.errors import NotACheckpoint
from edgeport.locate import open_model
from tests.conftest import TinyLlama

ReadTensors = Callable[[Path], dict[str, bytes]]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_in_and_out(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    receipt = edgeport.export(model=base, output=tmp_path / "shards", to="hf", max_shard_size="60KB")
    names = [name for name in receipt.files if name.endswith(".safetensors")]
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    shards = {name: load_file(tmp_path / "shards" / name) for name in names}
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 60_000 for tensors in shards.values())
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    stored = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert same(state(tmp_path / "shards"), state(base))
    edgeport.export(model=tmp_path / "shards", output=tmp_path / "whole", to="hf")
    assert same(load_file(tmp_path / "whole" / "model.safetensors"), load_file(base / "model.safetensors"))


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_are_read_without_unpickling_more_than_tensors(shards: int, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{n:05}-of-00002.bin" for n in (1, 2)]
    groups = [dict(list(tensors.items())[n::shards]) for n in range(shards)]
    for name, group in zip(names, groups, strict=True):
        torch.save(group, base / name)
    if shards > 1:
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edgeport.export(model=base, output=tmp_path / "out", to="hf")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_assets_are_copied_verbatim(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    (base / "generation_config.json").write_text('{"temperature":   0.7}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "spiece.model").write_bytes(b"sentencepiece")
    (base / "notes.txt").write_text("stays at home")
    edgeport.export(model=base, output=tmp_path / "out", to="hf")
    before, after = asset_files(base), asset_files(tmp_path / "out")
    expected = {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "spiece.model"}
    assert before.keys() == after.keys() >= expected
    assert all(before[name].read_bytes() == after[name].read_bytes() for name in before)
    assert not (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(("quant", "dtype"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_precision_is_torchs_own_rounding(quant: str, dtype: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant=quant)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert same(after, {name: tensor.to(getattr(torch, dtype)) for name, tensor in before.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


def test_an_integer_tensor_is_copied(tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors) -> None:
    from safetensors.torch import save_file

    base = tiny_llama()
    tensors = {**load_file(base / "model.safetensors"), "model.counts": torch.arange(9)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="bf16")
    assert read_tensors(tmp_path / "out")["model.counts"] == read_tensors(base)["model.counts"]


def test_a_tied_model_stays_tied(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    edgeport.export(model=base, output=tmp_path / "out", to="hf")
    assert "lm_head.weight" not in open_model(tmp_path / "out").weights
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_what_transformers_would_load_is_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Of a sharded model beside an older file in torch's format it takes the shards."""
    base, other = tiny_llama(), tiny_llama("other", seed=1)
    sharded = edgeport.export(model=base, output=tmp_path / "sharded", to="hf", max_shard_size="60KB").output
    torch.save(load_file(other / "model.safetensors"), sharded / "pytorch_model.bin")
    assert same(state(sharded), state(base))
    edgeport.export(model=sharded, output=tmp_path / "out", to="hf")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors"))


def test_tensors_that_are_not_stored_in_rows(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    (base / "model.safetensors").unlink()
    torch.save({"a": torch.eye(4).to_sparse()}, base / "pytorch_model.bin")
    with pytest.raises(NotACheckpoint, match=r"pytorch_model\.bin: a \(torch\.float32\) is not stored as one plain block"):
        open_model(base)


@pytest.mark.parametrize("shape", [[0], [4, 0], [0, 4], [1 << 47, 0]])
def test_a_tensor_of_nothing(shape: list[int], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    data = (base / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin]) | {"model.nothing": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
    for quant in (None, "bf16"):
        out = edgeport.export(model=base, output=tmp_path / f"{quant}", to="hf", quant=quant).output
        assert open_model(out).weights["model.nothing"].shape == tuple(shape)
