"""Folders as they were published: what a config.json leaves out, and what old checkpoints store beside their weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

import edgeport
from edgeport.errors import AmbiguousFormat, DecodeOnly, NotACheckpoint
from edgeport.locate import open_model
from edgeport.ties import TIED_BY_DEFAULT
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


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_and_whose_config_leaves_out_that_it_is_tied(tmp_path: Path) -> None:
    """As transformers 4 wrote it, where that is the class's default."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = tmp_path / "base"
    GemmaForCausalLM(GemmaConfig(**sizes, num_key_value_heads=2, head_dim=16)).save_pretrained(base)
    settings = json.loads((base / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(settings))
    before = load_file(base / "model.safetensors")[EMBEDDING]
    with_tensors(base, {HEAD: before.clone()})
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    patch = save_patch(base, tmp_path / "patch", **options)
    out = load_file(edgeport.port(patch=patch, new_base=base, output=tmp_path / "out").output / "model.safetensors")
    assert torch.equal(out[HEAD], out[EMBEDDING]) and not torch.equal(out[HEAD], before)


def test_the_types_that_are_tied_by_default_are_transformers() -> None:
    others = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt_neox", "gptj", "codegen", "phi", "phi3", "olmo2", "stablelm"}
    for kind in TIED_BY_DEFAULT | others:
        assert AutoConfig.for_model(kind).get_text_config().tie_word_embeddings == (kind in TIED_BY_DEFAULT), kind


# ---------------------------------------------------------------- quantized folders


def quantized(tiny_llama: TinyLlama, tmp_path: Path, quant: str) -> Path:
    base = tiny_llama(dtype="float16", hidden=128)
    return edgeport.export(model=base, output=tmp_path / quant, to="hf", quant=quant).output


def configured(folder: Path, **changes: Any) -> Path:
    """With other entries in config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(("quant", "place"), [
    ("gptq-4", "quantize_config.json"), ("awq-4", "quant_config.json"), ("w4a16", "compression_config"),
    ("fp8-dynamic", "compression_config"), ("fp8-dynamic", None),
])  # fmt: skip
def test_quantized_weights_of_which_config_says_nothing_are_no_numbers(
    quant: str, place: str | None, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    base = quantized(tiny_llama, tmp_path, quant)
    if place == "compression_config":
        configured(base, compression_config=told(base))
    elif place:
        (base / place).write_text(json.dumps(told(base)))
    configured(base, quantization_config=None)
    with pytest.raises(AmbiguousFormat, match=f"has no quantization_config .*{place or 'give the unquantized folder'}"):
        edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="bf16")
    assert not list(tmp_path.glob("*out*"))


def test_a_quantization_config_that_leaves_out_a_weight_s_kind(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "fp8-dynamic")
    with_tensors(base, {"model.layers.0.self_attn.q_proj.weight": torch.ones(128, 128)})
    with pytest.raises(AmbiguousFormat, match=r"q_proj\.weight_scale belongs .* does not say that it is quantized"):
        open_model(base)


def test_weights_under_the_name_that_autogptq_gave_them(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "gptq-4")
    (base / "model.safetensors").rename(base / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(NotACheckpoint, match=r"if gptq_model-4bit-128g\.safetensors is the model, rename it"):
        open_model(base)


def test_bitsandbytes_need_not_call_itself_by_name(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "nf4")
    configured(base, quantization_config={**told(base), "quant_method": None})
    assert {weight.format for weight in open_model(base).weights.values()} == {"NF4", "F16"}


@pytest.mark.parametrize(("quant", "changes", "message"), [
    ("gptq-4", {"checkpoint_format": "marlin"}, "marlin"),
    ("gptq-4", {"checkpoint_format": None, "is_marlin_format": True}, "marlin"),
    ("fp8-dynamic", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ("w4a16", {"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}}, r"rotated \(R1\)"),
])  # fmt: skip
def test_layouts_that_are_not_read_are_called_by_name(
    quant: str, changes: dict[str, Any], message: str, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    base = quantized(tiny_llama, tmp_path, quant)
    configured(base, quantization_config=told(base) | changes)
    # such tensors have names of their own
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "proj" not in name}, base / "model.safetensors")
    with pytest.raises(AmbiguousFormat, match=message):
        open_model(base)


def test_biases_that_autogptq_made_up_are_no_weights(
    tiny_llama: TinyLlama, tmp_path: Path, read_tensors: Callable[[Path], dict[str, bytes]]
) -> None:
    base = quantized(tiny_llama, tmp_path, "gptq-4")
    plain = edgeport.export(model=base, output=tmp_path / "plain.gguf", to="gguf").output
    scales = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name.endswith(".scales")}
    made_up = {name.replace("scales", "bias"): torch.zeros_like(scale[0]) for name, scale in scales.items()}
    with_tensors(base, made_up)
    assert edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf").output.read_bytes() == plain.read_bytes()
    patch = save_patch(tiny_llama(hidden=128), tmp_path / "patch", std=0.02)
    for rounding in ("stochastic", "nearest"):
        ported = edgeport.port(patch=patch, new_base=base, output=tmp_path / rounding, rounding=rounding, force=True).output
        before, after = read_tensors(base), read_tensors(ported)
        assert before.keys() == after.keys() and all(before[name] == after[name] for name in made_up)
    with_tensors(base, {name: tensor + 1 for name, tensor in made_up.items()})
    assert made_up.keys() <= open_model(base).weights.keys()


def test_a_patch_hears_of_the_scales_that_awq_folds_away(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "awq-4")
    patch = save_patch(tiny_llama(hidden=128), tmp_path / "patch")
    notes = edgeport.plan(new_base=base, patch=patch, output=tmp_path / "out").notes
    assert any("AWQ as a rule scales a model's columns" in note for note in notes)
    assert not edgeport.plan(new_base=base, output=tmp_path / "out").notes


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_mlx_is_called_by_name(key: str, tiny_llama: TinyLlama) -> None:
    base = configured(tiny_llama(), **{key: {"group_size": 64, "bits": 4}})
    with_tensors(base, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 8, dtype=torch.uint32)})
    with pytest.raises(AmbiguousFormat, match="as MLX writes it"):
        open_model(base)


def test_the_scales_of_an_8_bit_cache_are_no_weights(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "fp8-dynamic")
    plain = edgeport.export(model=base, output=tmp_path / "plain.gguf", to="gguf").output
    scales = {f"model.layers.{layer}.self_attn.{one}_scale": torch.ones(1) for layer in range(2) for one in "kv"}
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    configured(with_tensors(base, scales), quantization_config=told(base) | {"kv_cache_scheme": scheme})
    found = edgeport.export(model=base, output=tmp_path / "found.gguf", to="gguf").output
    assert found.read_bytes() == plain.read_bytes()
    kept = edgeport.export(model=base, output=tmp_path / "kept", to="hf").output
    assert load_file(kept / "model.safetensors").keys() >= scales.keys()


@pytest.mark.parametrize("quant", ["bf16", "nf4"])
def test_float8_without_a_scale_is_refused_and_not_passed_by(quant: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    name = "model.layers.0.self_attn.q_proj.weight"
    with_tensors(base, {name: load_file(base / "model.safetensors")[name].to(torch.float8_e4m3fn)})
    with pytest.raises(DecodeOnly, match="F8_E4M3 can be copied and not computed with"):
        edgeport.plan(new_base=base, output=tmp_path / "out", to="hf", quant=quant)
    kept = edgeport.export(model=base, output=tmp_path / "kept", to="hf").output
    assert (kept / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_no_companion_is_lost(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized(tiny_llama, tmp_path, "gptq-4")
    code, template = "modeling_own.py", "additional_chat_templates/rag.jinja"
    (base / "additional_chat_templates").mkdir()
    configured(base, auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    for name in (code, template, "quantize_config.json"):
        (base / name).write_text(f"{{# {name} #}}")
    kept = edgeport.export(model=base, output=tmp_path / "kept", to="hf").output
    assert {(kept / name).read_text() for name in (code, template, "quantize_config.json")} == {
        f"{{# {name} #}}" for name in (code, template, "quantize_config.json")
    }
    changed = edgeport.export(model=base, output=tmp_path / "changed", to="hf", quant="bf16").output
    assert (changed / code).is_file() and (changed / template).is_file()
    configured(base, auto_map=None)
    assert not (edgeport.export(model=base, output=tmp_path / "other", to="hf").output / code).exists()
    # GPTQModel believes this file more than config.json
    assert not (changed / "quantize_config.json").exists()
