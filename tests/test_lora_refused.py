"""LoRA adapters at odds with themselves, with each other, or with what their config says: as PEFT takes them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from edgeport.blocks import decode_rows
from edgeport.effect import ported
from edgeport.errors import CorruptCheckpoint, NonFiniteResult, UnsupportedPatch
from edgeport.locate import open_model, open_patch
from edgeport.patches.lora import LoraPatch
from tests.conftest import TinyLlama
from tests.test_adapter import llama_logits
from tests.test_lora_against_peft import ATTENTION, load, logits, merged, save_base, save_grown, save_patch
from tests.test_vocabulary import grown

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
CONFIG = "adapter_config.json"
WHOLE: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
ROWS: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 320, 321, 322, 323, 324]}


def with_config(patch: Path, **changes: Any) -> Path:
    path = patch / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return patch


# ---------------------------------------------------------------- one after another


@pytest.mark.parametrize("second", [WHOLE, ROWS], ids=["whole values", "rows"])
@pytest.mark.parametrize("full", [False, True], ids=["peft", "full"])
def test_only_one_patch_can_bring_new_tokens(second: dict[str, Any], full: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patches = [tmp_path / "one", tmp_path / "other"]
    for patch, options in zip(patches, (WHOLE, second), strict=True):
        save_grown(base, patch, **options)
    if full:
        for at, patch in enumerate(patches):
            tuned = edgeport.port(patch=patch, new_base=base, output=tmp_path / f"tuned{at}").output
            patches[at] = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / f"dense{at}", full=True).output
    with pytest.raises(UnsupportedPatch, match=rf"{patches[1].name} has new tokens in .*, which would take the place"):
        edgeport.plan(patch=patches, new_base=base, old_base=base, output=tmp_path / "out")


def test_tokens_that_are_new_to_the_old_base_alone(tmp_path: Path) -> None:
    old = save_base(tmp_path / "old")
    grown = load(old)
    grown.resize_token_embeddings(330, mean_resizing=False)
    grown.save_pretrained(tmp_path / "new")
    one = save_patch(tmp_path / "new", tmp_path / "one", target_modules=["q_proj", "embed_tokens"])
    other = save_patch(tmp_path / "new", tmp_path / "other", target_modules=["q_proj"], trainable_token_indices=[327])
    edgeport.plan(patch=[other, one], new_base=tmp_path / "new", old_base=old, output=tmp_path / "out")
    with pytest.raises(UnsupportedPatch, match=r"other has new tokens in model.embed_tokens.weight"):
        edgeport.plan(patch=[one, other], new_base=tmp_path / "new", old_base=old, output=tmp_path / "out")


def test_a_tied_head_is_one_with_the_embedding(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=True)
    rows = save_patch(base, tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    head = save_patch(base, tmp_path / "head", target_modules=["v_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedPatch, match=r"head holds whole values for lm_head.weight, which would undo"):
        edgeport.plan(patch=[rows, head], new_base=base, output=tmp_path / "out")
    edgeport.plan(patch=[rows, head], new_base=base, old_base=base, output=tmp_path / "out")


# ---------------------------------------------------------------- as PEFT takes it


def test_other_rows_of_a_tied_head_than_of_its_embedding(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=True)
    rows = {"embed_tokens": [7, 14], "lm_head": [21, 28]}
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"], trainable_token_indices=rows)
    expected = logits(peft.PeftModel.from_pretrained(load(base), patch))
    for old in (None, base):
        edgeport.port(patch=patch, new_base=base, old_base=old, output=tmp_path / "out", overwrite=True)
        out = load(tmp_path / "out")
        assert out.config.tie_word_embeddings is False
        torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_named_twice_has_its_later_values(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"], trainable_token_indices=[7, 9])
    with_config(patch, trainable_token_indices=[7, 7])
    expected = merged(base, patch)["model.embed_tokens.weight"]
    for old in (None, base):
        edgeport.port(patch=patch, new_base=base, old_base=old, output=tmp_path / "out", overwrite=True)
        found = load(tmp_path / "out").get_input_embeddings().weight
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_square_matrices_of_a_model_that_turns_none(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patch = with_config(save_patch(base, tmp_path / "patch", target_modules=ATTENTION), fan_in_fan_out=True)
    expected = merged(base, patch)
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    for key, value in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", ["lm_head.", "language_model.lm_head."])
def test_a_head_of_the_patch_s_own_under_either_name(head: str, tmp_path: Path) -> None:
    """An image model's adapter has the inner name, from transformers before 4.52."""
    base = save_base(tmp_path / "base")
    path = save_patch(base, tmp_path / "patch", **WHOLE) / "adapter_model.safetensors"
    stored = load_file(path)
    save_file({name.replace(".lm_head.", f".{head}"): value for name, value in stored.items()}, path)
    patch = open_patch(tmp_path / "patch")
    assert isinstance(patch, LoraPatch) and patch.names_head and any(head in name for name in patch.stored)
    save_file({name: value for name, value in stored.items() if "lm_head" not in name}, path)
    alone = open_patch(tmp_path / "patch")
    assert isinstance(alone, LoraPatch) and not alone.names_head


# ---------------------------------------------------------------- what the config says


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 8}, "gives model.layers.0.self_attn.q_proj the rank 8, and its tensors have 4"),
        ({"r": "4"}, "has the r '4' where a number was expected"),
        ({"lora_alpha": 10**400}, "has the lora_alpha 1000"),
        ({"alpha_pattern": {"v_proj": 10**400}}, "has a alpha_pattern that is no table of module names to numbers"),
        ({"alpha_pattern": {"(?i)q_proj": 8}}, "'(?i)q_proj' in alpha_pattern is no regular expression"),
    ],
    ids=["stale rank", "rank of letters", "too large", "too large of one", "flags"],
)
def test_numbers_that_are_none(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patch = with_config(save_patch(base, tmp_path / "patch", target_modules=["q_proj", "v_proj"]), **changes)
    with pytest.raises(CorruptCheckpoint) as caught:
        edgeport.plan(patch=patch, new_base=base, output=tmp_path / "out")
    assert told in str(caught.value)


def test_a_bias_of_a_factor_is_called_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"])
    path = patch / "adapter_model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("lora_B.weight")).replace("weight", "bias")
    save_file({**stored, name: torch.zeros(64)}, path)
    with pytest.raises(UnsupportedPatch, match="a bias on a LoRA factor"):
        edgeport.plan(patch=patch, new_base=base, output=tmp_path / "out")


# ---------------------------------------------------------------- beside a grown or a damaged base


def test_a_residual_beside_a_head_that_has_grown(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = grown(base, tmp_path / "patch")
    common: dict[str, Any] = {"patch": patch, "new_base": base, "old_base": base, "to": "gguf", "quant": "Q4_0", "probe": False}
    receipt = edgeport.port(**common, output=tmp_path / "out.gguf", residual=8, force=True)
    assert "lm_head.weight" in [fact.weight for fact in receipt.facts if fact.beside]
    exact = edgeport.port(**common | {"quant": "f32"}, output=tmp_path / "exact.gguf").output
    stored = open_model(tmp_path / "out.gguf")
    together = ported(stored, [open_patch(tmp_path / "out.lora.gguf")], None)
    rows = range(322)
    wanted, without = (decode_rows(one, one.weights["lm_head.weight"], rows) for one in (open_model(exact), stored))
    assert (wanted - together.rows("lm_head.weight", rows)).norm() < 0.95 * (wanted - without).norm()
    llama_logits(tmp_path / "out.gguf", tmp_path / "out.lora.gguf")


def test_a_sidecar_of_a_base_that_holds_no_number(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"])
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].self_attn.q_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(NonFiniteResult, match=r"q_proj.weight: the base holds NaN or infinity in rows"):
        edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", sidecar=True, probe=False)
    assert not (tmp_path / "out").exists()
