"""LoRA on models that name, nest and store their weights otherwise than Llama. The oracle is PEFT's unmerged forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import edgeport

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


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, dtype=torch.float32)


def trained(base: Path, folder: Path, **options: Any) -> Any:
    """A PEFT model with random values in all that it trains, saved in `folder`."""
    model: Any = peft.get_peft_model(load(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).reshape(1, -1) * 7 % 310).logits  # type: ignore[no-any-return]


def assert_ported(base: Path, folder: Path, **options: Any) -> Path:
    """The output computes what PEFT computes."""
    torch.manual_seed(1)
    expected = logits(trained(base, folder / "patch", **options))
    out = edgeport.port(patch=folder / "patch", new_base=base, output=folder / "out").output
    found, effect = logits(load(out)), (expected - logits(load(base))).abs().max()
    assert effect > 0.1 and (found - expected).abs().max() < 1e-4 * effect
    return out


def test_a_head_inside_the_language_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", llava())
    assert_ported(base, tmp_path, target_modules=r".*language_model.*q_proj|lm_head")
