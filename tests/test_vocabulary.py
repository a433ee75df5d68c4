"""Whose tokenizer an output has: tokens that a patch brings are there, and no patch takes away others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgeport
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
