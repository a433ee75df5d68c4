"""LoRA on models that name, nest and store their weights otherwise than Llama. The oracle is PEFT's unmerged forward."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import edgeport
from edgeport.errors import ConvertError, UnsupportedPatch
from tests.conftest import randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "initializer_range": 0.2, "max_position_embeddings": 128,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def llava() -> Any:
    text, eye = LlamaConfig(**SIZES), CLIPVisionConfig(**EYE, projection_dim=32)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=eye, image_token_index=319))


def gemma3() -> Any:
    config = Gemma3Config(
        text_config={**SIZES, "num_key_value_heads": 2, "head_dim": 16}, vision_config=EYE, mm_tokens_per_image=4,
        image_token_index=319, boi_token_index=317, eoi_token_index=318,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def gpt2(**more: Any) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128, initializer_range=0.2, **more)
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64,
            max_position_embeddings=128, init_std=0.2,
        )
    )  # fmt: skip


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2))


def bert() -> Any:
    return BertForMaskedLM(BertConfig(**SIZES, type_vocab_size=2))


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))


def saved(folder: Path, make: Callable[[], Any]) -> Path:
    torch.manual_seed(1)
    make().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, dtype=torch.float32)


def trained(base: Path, folder: Path, on: Any = None, **options: Any) -> Any:
    """A PEFT model with random values in all that it trains, saved in `folder`."""
    model: Any = peft.get_peft_model(on or load(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    randomize(model, 2)
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).reshape(1, -1) * 7 % 310).logits  # type: ignore[no-any-return]


def assert_ported(base: Path, folder: Path, **options: Any) -> Path:
    """The output computes what PEFT computes."""
    expected = logits(trained(base, folder / "patch", **options))
    out = edgeport.port(patch=folder / "patch", new_base=base, output=folder / "out").output
    found, effect = logits(load(out)), (expected - logits(load(base))).abs().max()
    assert effect > 0.1 and (found - expected).abs().max() < 1e-4 * effect
    return out


def test_a_head_inside_the_language_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", llava)
    assert_ported(base, tmp_path, target_modules=r".*language_model.*q_proj|lm_head")


# ---------------------------------------------------------------- tied heads

TIED: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "gpt2": (gpt2, "transformer.", "wte", "c_attn"),
    "gpt2, as published": (gpt2, "", "wte", "c_attn"),
    "opt": (opt, "model.decoder.", "embed_tokens", "q_proj"),
    "bloom": (bloom, "transformer.", "word_embeddings", "query_key_value"),
    "gemma 3": (gemma3, "language_model.model.", "embed_tokens", r".*language_model.*q_proj"),
    "gemma 3, as of transformers 4": (gemma3, "model.language_model.", "embed_tokens", r".*language_model.*q_proj"),
}
CHANGES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "saved embedding": lambda embedding, layer: {"target_modules": layer, "modules_to_save": [embedding]},
    "saved both": lambda embedding, layer: {"target_modules": layer, "modules_to_save": [embedding, "lm_head"]},
    "head": lambda embedding, layer: {"target_modules": ["lm_head"]},
    "embedding": lambda embedding, layer: {"target_modules": rf"{layer}|.*\.{embedding}"},
    "token rows": lambda embedding, layer: {"target_modules": layer, "trainable_token_indices": {embedding: [5, 7]}},
    "both": lambda embedding, layer: {
        "target_modules": layer, "modules_to_save": [embedding], "ensure_weight_tying": True
    },
}  # fmt: skip


def tied_base(name: str, folder: Path) -> Path:
    make, prefix, embedding, _ = TIED[name]
    base = saved(folder, make)
    found = load_file(base / "model.safetensors")
    if f"{prefix}{embedding}.weight" not in found:
        own = next(key for key in found if key.endswith(f"{embedding}.weight")).removesuffix(f"{embedding}.weight")
        other = {key: value for key, value in found.items() if not key.startswith(own)}
        inner = {prefix + key.removeprefix(own): value for key, value in found.items() if key.startswith(own)}
        save_file(inner | ({f"model.{key}": other[key] for key in other}), base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_stays_where_peft_lets_it_stay(name: str, change: str, tmp_path: Path) -> None:
    base = tied_base(name, tmp_path / "base")
    _, prefix, embedding, layer = TIED[name]
    out = assert_ported(base, tmp_path, **CHANGES[change](embedding, layer if ".*" in layer else rf".*\.{layer}"))
    # whatever it was asked, PEFT ties embeddings of that one name alone
    together = change == "token rows" or (change == "both" and embedding == "embed_tokens")
    assert load(out).config.tie_word_embeddings is together
    config = json.loads((out / "config.json").read_text())
    assert config.get("text_config", config)["tie_word_embeddings"] is together
    assert f"{prefix}{embedding}.weight" in load_file(out / "model.safetensors")


EXTRACTED: dict[str, tuple[str, str]] = {
    "gpt2": ("transformer.wte", "transformer.h.0.mlp.c_fc"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.layers.0.fc1"),
    "bloom": ("transformer.word_embeddings", "transformer.h.0.mlp.dense_h_to_4h"),
    "gemma 3": ("model.language_model.embed_tokens", "model.language_model.layers.0.mlp.up_proj"),
    "t5": ("shared", "encoder.block.0.layer.0.SelfAttention.q"),
}


# of layers that are stored turned no factors are taken
@pytest.mark.parametrize(
    ("name", "full"), [(name, full) for name in EXTRACTED for full in (False, True) if full or name != "gpt2"]
)
def test_what_was_extracted_gives_the_tied_model_back(name: str, full: bool, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", t5 if name == "t5" else TIED[name][0])
    tuned = load(base)
    torch.manual_seed(3)
    for module in EXTRACTED[name]:
        weight = tuned.get_submodule(module).weight
        weight.data += torch.randn_like(weight) * 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    options: dict[str, Any] = {"full": True} if full else {"rank": 64}
    patch = edgeport.extract(old_base=base, tuned=tmp_path / "tuned", output=tmp_path / "patch", **options).output
    out = edgeport.port(patch=patch, new_base=base, old_base=base, output=tmp_path / "out").output
    expected, found = load_file(tmp_path / "tuned" / "model.safetensors"), load_file(out / "model.safetensors")
    assert found.keys() == expected.keys() and json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())
    if name in ("opt", "bloom") and not full:
        loaded = logits(peft.PeftModel.from_pretrained(load(base), patch))
        assert torch.allclose(loaded, logits(load(tmp_path / "tuned")), atol=1e-4)


PUBLISHED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "bloom": (bloom, "transformer.", r"0\.mlp\.dense_h_to_4h\.weight|ln_f\.weight"),
    "opt": (opt, "model.", r"0\.fc1\.weight|decoder\.final_layer_norm\.weight"),
    "gemma 3": (gemma3, "", r"language_model\.layers\.0\.mlp\.up_proj\.weight|language_model\.norm\.weight"),
    "bert": (bert, "", r"0\.attention\.self\.query\.weight|token_type_embeddings\.weight"),
}
"""What transformers calls otherwise when it has loaded it (a prefix that is not stored, language_model before model), and what
has tables that are no embeddings of tokens."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_peft_loads_what_was_extracted(name: str, tmp_path: Path) -> None:
    make, prefix, trained = PUBLISHED[name]
    base = saved(tmp_path / "base", make)
    tuned = load(base)
    torch.manual_seed(3)
    for key, weight in tuned.named_parameters():
        if re.search(f"(?:{trained})$", key):
            weight.data += torch.randn_like(weight) * 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    stored = load_file(base / "model.safetensors")
    save_file({key.removeprefix(prefix): value for key, value in stored.items()}, base / "model.safetensors", {"format": "pt"})
    patch = edgeport.extract(old_base=base, tuned=tmp_path / "tuned", output=tmp_path / "patch", rank=64).output
    found, expected = logits(peft.PeftModel.from_pretrained(load(base), patch)), logits(load(tmp_path / "tuned"))
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(logits(load(base)), expected, atol=1e-2)
    out = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out").output
    assert torch.allclose(logits(load(out)), expected, atol=1e-4)


def test_peft_loads_the_adapter_beside(tmp_path: Path) -> None:
    """Of a model whose layers are stored as language_model.model.layers."""
    base = tied_base("gemma 3", tmp_path / "base")
    expected = logits(trained(base, tmp_path / "patch", target_modules=r".*language_model.*q_proj"))
    out = edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out", sidecar=True).output
    found = logits(peft.PeftModel.from_pretrained(load(out), out / "adapter"))
    assert (expected - logits(load(base))).abs().max() > 0.1 and torch.allclose(found, expected, atol=1e-4)


def test_an_embedding_alone_whose_head_has_no_place_of_its_own(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", t5)
    trained(base, tmp_path / "patch", target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(UnsupportedPatch, match=r"changes shared\.weight and not the head that base ties to it"):
        edgeport.plan(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out")


def test_a_model_without_a_head_gets_none(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", lambda: GPT2ForSequenceClassification(gpt2().config))
    trained(base, tmp_path / "patch", target_modules=["c_attn"], modules_to_save=["wte"])
    out = edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out").output
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma 3"])
def test_a_grown_vocabulary(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", TIED[name][0])
    _, _, embedding, layer = TIED[name]
    model = load(base)
    model.resize_token_embeddings(325, mean_resizing=False)
    expected = logits(trained(base, tmp_path / "patch", model, target_modules=layer if ".*" in layer else rf".*\.{layer}",
                              modules_to_save=[embedding, "lm_head"]))  # fmt: skip
    out = load(edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out").output)
    assert out.get_input_embeddings().weight.shape[0] == out.config.get_text_config().vocab_size == 325
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_beside_the_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", opt)
    model = trained(base, tmp_path / "patch", target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "patch", save_embedding_layers=False)
    expected = logits(model)
    out = edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out", sidecar=True).output
    found = logits(peft.PeftModel.from_pretrained(load(out), out / "adapter"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model = trained(base, tmp_path / "table", target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "table", save_embedding_layers=False)
    with pytest.raises(ConvertError, match="no place in a PEFT adapter of linear layers"):
        edgeport.plan(patch=tmp_path / "table", new_base=base, output=tmp_path / "beside", sidecar=True)


# ---------------------------------------------------------------- layers that are stored turned


@pytest.mark.parametrize("layers", [["attn.c_proj"], ["attn.c_proj", "lm_head"], ["c_attn", "c_fc", "c_proj", "lm_head"]])
def test_which_layers_are_turned_is_told_by_the_layers(layers: list[str], tmp_path: Path) -> None:
    base = saved(tmp_path / "base", partial(gpt2, tie_word_embeddings=False))
    assert_ported(base, tmp_path, target_modules=layers)
    flag = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert flag is ("lm_head" not in layers)


def test_layers_of_no_known_model_are_turned_where_nothing_else_fits(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", partial(gpt2, tie_word_embeddings=False))
    expected = logits(trained(base, tmp_path / "patch", target_modules=["c_attn", "lm_head"]))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "one of its own"}))
    out = edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out").output
    (out / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-4)


def test_no_adapter_is_written_for_turned_layers(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", gpt2)
    trained(base, tmp_path / "patch", target_modules=["attn.c_proj"])
    with pytest.raises(ConvertError, match=r"c_proj\.weight: it is stored turned, .* leave off --sidecar"):
        edgeport.plan(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out", sidecar=True)


def test_all_biases_and_a_head_of_several_modules(tmp_path: Path) -> None:
    """PEFT then saves the head's biases three times: trained, under their own names, and as they were."""
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3))
    randomize(model, 0)
    model.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "all"}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
    randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "patch")
    names = [name for name in load_file(tmp_path / "patch" / "adapter_model.safetensors") if "classifier" in name]
    assert sum(name.endswith(".dense.bias") for name in names) == 3
    edgeport.port(patch=tmp_path / "patch", new_base=tmp_path / "base", output=tmp_path / "out")
    merged = {name: value.detach() for name, value in tuned.merge_and_unload().named_parameters()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == found.keys()
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value)
