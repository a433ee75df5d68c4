"""Whose tokenizer an output has: tokens that a patch brings are there, and no patch takes away others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgeport
from converters.gguf.header import read_header
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

OWN = ["<tool>", "</tool>"]


def grown(base: Path, folder: Path) -> Path:
    """A patch with tokens of its own, in an embedding and a head that it has made larger."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens(OWN)
    rows = model.config.vocab_size + len(OWN)
    model.resize_token_embeddings(rows, mean_resizing=False)
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_room(tiny_llama: TinyLlama) -> Path:
    """A base whose embedding has more rows than its tokenizer has tokens, as Qwen's has."""
    return tiny_llama(vocab=600)


def pieces(folder: Path, text: str = OWN[0]) -> int:
    return len(AutoTokenizer.from_pretrained(folder).tokenize(text))


@pytest.mark.parametrize("first", ["grown", "plain"])
def test_the_tokenizer_of_the_patch_that_has_grown_is_taken(first: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patches = [grown(base, tmp_path / "grown"), save_patch(base, tmp_path / "plain", target_modules=["v_proj"])]
    # as trainers leave it beside any adapter
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "plain")
    order = patches if first == "grown" else patches[::-1]
    out = edgeport.port(patch=order, new_base=base, old_base=base, output=tmp_path / "out").output
    assert pieces(base) > pieces(out) == 1
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 322


# ---------------------------------------------------------------- tokens in the rows that a base has to spare


def padded(base: Path, folder: Path, **options: Any) -> Path:
    """A patch whose new tokens take rows of the embedding for which the base has no tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = list(range(len(tokenizer), len(tokenizer) + tokenizer.add_tokens(OWN)))
    save_patch(base, folder, **{"target_modules": ["q_proj"]} | (options or {"trainable_token_indices": rows}))
    tokenizer.save_pretrained(folder)
    return folder


def plan_notes(base: Path, patch: Path, output: Path) -> str:
    return "; ".join(edgeport.plan(patch=patch, new_base=base, old_base=base, output=output, probe=False).notes)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["rows", "whole"])
def test_tokens_whose_rows_are_trained_can_be_written(options: dict[str, Any], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = with_room(tiny_llama)
    patch = padded(base, tmp_path / "patch", **options)
    out = edgeport.port(patch=patch, new_base=base, old_base=base, output=tmp_path / "out", to="hf").output
    assert pieces(base) > pieces(out) == 1
    first = edgeport.export(model=base, output=tmp_path / "base.gguf").output
    again = edgeport.port(patch=patch, new_base=first, old_base=first, output=tmp_path / "again").output
    assert pieces(again) == 1
    assert "tokenizer" not in plan_notes(base, patch, tmp_path / "next")


def test_tokens_that_are_not_trained_are_told_of(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = with_room(tiny_llama)
    patch = padded(base, tmp_path / "patch", target_modules=["q_proj"])
    out = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "the tokenizer beside patch has other tokens than the new base's (</tool>, <tool>)" in "; ".join(out.notes)


def test_a_tokenizer_that_is_only_written_otherwise_is_no_news(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = with_room(tiny_llama)
    patch = save_patch(base, tmp_path / "patch", modules_to_save=["embed_tokens"])
    told = json.loads((base / "tokenizer.json").read_text())
    beyond = json.dumps(told).replace('"id": 0', '"id": 1e999', 1)
    assert "1e999" in beyond
    for text in (json.dumps(told), beyond, "{}", "no tokenizer"):
        (patch / "tokenizer.json").write_text(text)
        assert "tokenizer" not in plan_notes(base, patch, tmp_path / "out")


def test_a_token_that_was_given_another_name_in_its_row(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """As Llama 3's reserved ones are: no row is new, and what the row says is."""
    base = tiny_llama()
    told = json.loads((base / "tokenizer.json").read_text())
    row = told["added_tokens"][-1]["id"] + 30
    old = next(text for text, number in told["model"]["vocab"].items() if number == row)
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"], trainable_token_indices=[row])
    told["model"]["vocab"] = {OWN[0] if text == old else text: number for text, number in told["model"]["vocab"].items()}
    told["model"]["merges"] = [pair for pair in told["model"]["merges"] if old not in (*pair, "".join(pair))]
    (patch / "tokenizer.json").write_text(json.dumps(told))
    out = edgeport.port(patch=patch, new_base=base, old_base=base, output=tmp_path / "out")
    assert (out.output / "tokenizer.json").read_bytes() == (patch / "tokenizer.json").read_bytes()
    assert not any("tokenizer" in note for note in out.notes)
    whole = save_patch(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    (whole / "tokenizer.json").write_text(json.dumps(told))
    assert "whose rows it brings, and for which the base has other names" in plan_notes(base, whole, tmp_path / "next")


def test_an_extracted_patch_brings_the_tokens_that_its_rows_are_of(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = with_room(tiny_llama)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    first = len(tokenizer)
    tokenizer.add_tokens(OWN)
    model.model.embed_tokens.weight.data[first : first + 2] += 0.5
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    patch = edgeport.extract(old_base=base, tuned=tmp_path / "tuned", output=tmp_path / "patch", full=True).output
    out = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out").output
    assert pieces(base) > pieces(patch) == pieces(out) == 1


@pytest.mark.parametrize("own", [True, False])
def test_a_chat_template_stays_where_the_grown_tokenizer_has_none(own: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """In a GGUF as in a folder, whatever the base is stored in."""
    base = tiny_llama()
    (base / "chat_template.jinja").write_text("{{ messages }} of the base")
    patch = grown(base, tmp_path / "patch")
    (patch / "chat_template.jinja").unlink()
    if own:
        (patch / "chat_template.jinja").write_text("{{ messages }} of the patch")
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="f32").output
    for name, model in (("folder", base), ("gguf", quantized)):
        out = edgeport.port(patch=patch, new_base=model, output=tmp_path / f"{name}.gguf", to="gguf", quant="f32", probe=False)
        header = read_header(out.output)
        assert header.value("tokenizer.chat_template") == "{{ messages }} of the " + ("patch" if own else "base")
        assert OWN[0] in header.value("tokenizer.ggml.tokens")
