"""Folders as they were published: what a config.json leaves out, and what old checkpoints store beside their weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import edgeport
from tests.conftest import TinyLlama, save_tokenizer
from tests.test_adapter import save_patch
from tests.test_lora_against_peft import logits

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_tensors(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("to", ["gguf", "onnx"])
def test_llama_2_stores_tables_that_every_program_computes(to: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="float16")
    suffix = ".gguf" if to == "gguf" else ""
    plain = edgeport.export(model=base, output=tmp_path / f"plain{suffix}", to=to)
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(8).float() for layer in range(2)}
    found = edgeport.export(model=with_tensors(base, old), output=tmp_path / f"old{suffix}", to=to)
    # in the type of the weights, which the tables do not have, and but for names the same files
    assert [size for _, size in sorted(found.files.items())] == [size for _, size in sorted(plain.files.items())]
    for name in plain.files:
        same = (plain.output / name, found.output / name) if to == "onnx" else (plain.output, found.output)
        assert same[0].read_bytes() == same[1].read_bytes()


def test_a_fine_tune_that_today_s_transformers_saved_lacks_them(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    tuned = edgeport.port(patch=save_patch(base, tmp_path / "patch"), new_base=base, output=tmp_path / "tuned").output
    with_tensors(base, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8).float()})
    assert edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "taken", rank=4).energy["min"] > 1 - 1e-6
    with_tensors(base, {"model.layers.0.extra": torch.ones(2)})
    with pytest.raises(edgeport.EdgeportError, match=r"base has model\.layers\.0\.extra, which tuned does not"):
        edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "more")


def test_gemma_2_does_not_say_that_it_is_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        query_pre_attn_scalar=64, vocab_size=320, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = tmp_path / "base"
    Gemma2ForCausalLM(config).save_pretrained(base)
    save_tokenizer(base, 320)
    settings = json.loads((base / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(settings))
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", quant="Q4_K_M")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    # llama-quantize gives an embedding that is also the head the head's type
    assert "output.weight" not in types and types["token_embd.weight"] == "Q6_K"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_base_that_stores_its_head_all_the_same(target: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj", target])
    with_tensors(base, {HEAD: load_file(base / "model.safetensors")[EMBEDDING].clone()})
    expected = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch))
    out = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out").output
    # else a program that believes the word would load the embedding in the head's place
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_and_whose_patch_means_both(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    patch = save_patch(base, tmp_path / "patch", **options)
    once = edgeport.port(patch=patch, new_base=base, output=tmp_path / "once").output
    with_tensors(base, {HEAD: load_file(base / "model.safetensors")[EMBEDDING].clone()})
    twice = edgeport.port(patch=patch, new_base=base, output=tmp_path / "twice").output
    expected, found = load_file(once / "model.safetensors"), load_file(twice / "model.safetensors")
    assert torch.equal(found.pop(HEAD), expected[EMBEDDING]) and found.keys() == expected.keys()
    assert (once / "config.json").read_bytes() == (twice / "config.json").read_bytes()
