"""Weights that go up in precision: within the size, the worst first, and the result loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import edgeport
from edgeport.blocks import SAMPLED_ROWS, sampled
from edgeport.errors import BudgetTooSmall, ConvertError, UnknownName
from edgeport.promotion import Choice, affordable
from tests.conftest import TinyLlama
from tests.test_adapter import WORDS, apart, llama_logits, save_patch


@pytest.fixture
def base(tiny_llama: TinyLlama) -> Path:
    return tiny_llama(hidden=256)


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    return save_patch(base, tmp_path / "patch", std=0.02)


def test_the_worst_go_up_and_the_size_holds(base: Path, patch: Path, tmp_path: Path) -> None:
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="Q4_K_S").output
    common: dict[str, Any] = {"patch": patch, "new_base": quantized, "to": "gguf", "probe": False, "rounding": "stochastic"}
    plain = edgeport.port(**common, output=tmp_path / "plain.gguf")
    limit = plain.bytes_out + 60_000
    receipt = edgeport.port(**common, output=tmp_path / "out.gguf", promote=True, max_size=limit)
    assert plain.bytes_out + 40_000 < receipt.bytes_out <= limit
    assert (tmp_path / "out.gguf").stat().st_size == receipt.bytes_out
    told = json.loads((tmp_path / "out.gguf.edgeport.json").read_text())["method"]["promoted"]
    stored, before = ({fact.weight: fact for fact in one.facts} for one in (receipt, plain))
    assert told and {fact.weight for fact in receipt.facts if fact.stored != before[fact.weight].stored} == told.keys()
    for name, why in told.items():
        assert (why["origin"], why["format"]) == (before[name].stored, stored[name].stored)
        assert why["format"] in ("Q6_K", "Q8_0", "F16") and why["after"] < why["before"]
        # what the sample said is what the whole weight shows
        fact, old = stored[name], before[name]
        assert fact.error is not None and old.error is not None and fact.change and old.change
        assert (fact.error / fact.change) ** 2 == pytest.approx(why["after"], rel=0.5, abs=1e-4)
        assert (old.error / old.change) ** 2 == pytest.approx(why["before"], rel=0.5)
    merged = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "exact", quant="f32").output
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(merged)(WORDS).logits[0]
    assert apart(llama_logits(tmp_path / "out.gguf"), exact) < apart(llama_logits(tmp_path / "plain.gguf"), exact)


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8"])
def test_promoted_layers_of_a_bitsandbytes_folder_load_as_they_are(quant: str, base: Path, patch: Path, tmp_path: Path) -> None:
    quantized = edgeport.export(model=base, output=tmp_path / "quantized", to="hf", quant=quant).output
    common: dict[str, Any] = {"patch": patch, "new_base": quantized, "probe": False, "rounding": "stochastic"}
    plan = edgeport.plan(**common, output=tmp_path / "out")
    receipt = edgeport.port(**common, output=tmp_path / "out", promote=True, max_size=plan.bytes_out + 400_000)
    promoted = list(receipt.method["promoted"])
    assert 0 < len(promoted) < 14 and plan.bytes_out < receipt.bytes_out <= plan.bytes_out + 400_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", *(name.removesuffix(".weight") for name in promoted)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", *(name.removesuffix(".weight") for name in promoted)}
    state = load_file(tmp_path / "out" / "model.safetensors")
    exact = load_file(edgeport.port(**common, output=tmp_path / "exact", quant="f32").output / "model.safetensors")
    for name in promoted:
        assert torch.equal(state[name], exact[name].to(state[name].dtype))
        assert torch.equal(dict(model.named_parameters())[name].float(), state[name].float())
    with torch.no_grad():
        assert bool(model(WORDS).logits.isfinite().all())


def test_greed_takes_the_most_for_each_byte() -> None:
    stored: Any = None
    ladders = {"a": [Choice(stored, 10.0, 100), Choice(stored, 1.0, 200), Choice(stored, 0.5, 220)],
               "b": [Choice(stored, 8.0, 100), Choice(stored, 9.0, 110), Choice(stored, 0.0, 400)]}  # fmt: skip
    moves = sorted(affordable(ladders, {"a": 0, "b": 0}, 150))
    assert [(name, index) for _, name, index in moves] == [("a", 2), ("a", 1)]
    assert [name for _, name, _ in affordable(ladders, {"a": 2, "b": 0}, 1000)] == ["b"]


def test_the_sample_lies_in_whole_granules_all_over(base: Path, patch: Path, tmp_path: Path) -> None:
    plan = edgeport.plan(patch=patch, new_base=base, output=tmp_path / "out.gguf", to="gguf", quant="Q4_0")
    for step in plan.steps:
        if step.edits:
            blocks = list(sampled(step.origin.rows, step.granule))
            rows = np.concatenate(blocks)
            assert len(set(rows.tolist())) == len(rows) <= max(SAMPLED_ROWS, 4 * step.granule)
            assert len(rows) >= min(SAMPLED_ROWS, step.origin.rows)
            assert all(some.start % step.granule == 0 for some in blocks) and rows.max() < step.origin.rows
            assert rows.min() == 0 and rows.max() >= step.origin.rows - step.granule


def test_promotions_that_cannot_be(base: Path, patch: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out.gguf", "to": "gguf", "quant": "Q4_0"}
    with pytest.raises(UnknownName, match="needs a --max-size"):
        edgeport.plan(**common, promote=True)
    with pytest.raises(UnknownName, match="give both, or neither"):
        edgeport.plan(**common, max_size="1GB")
    with pytest.raises(BudgetTooSmall, match="is less than the"):
        edgeport.plan(**common, promote=True, max_size=1000)
    least = edgeport.plan(**common).bytes_out
    with pytest.raises(BudgetTooSmall, match=r"has no room for a promotion: the least takes .* beside the"):
        edgeport.plan(**common, promote=True, max_size=least + 64)
    with pytest.raises(ConvertError, match="no patched weight is stored in a format"):
        edgeport.plan(**common | {"quant": "f32"}, promote=True, max_size="1GB")
    assert not (tmp_path / "out.gguf").exists()


def test_a_patch_of_single_rows_is_seen(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Of a vocabulary's rows the sample rarely has the two that a patch changes."""
    base = edgeport.export(model=tiny_llama(vocab=2048), output=tmp_path / "base.gguf", to="gguf", quant="Q4_0").output
    model = tiny_llama("again", vocab=2048)
    patch = save_patch(model, tmp_path / "tokens", target_modules=["q_proj"], trainable_token_indices=[301, 1177])
    common: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out.gguf", "to": "gguf"}
    plan = edgeport.plan(**common, promote=True, max_size="10MB")
    assert "model.embed_tokens.weight" in {one.weight for one in plan.method.promoted}


def test_where_no_finer_format_helps(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeport.promotion.error", lambda step, plan: 0.0)
    with pytest.raises(ConvertError, match="no finer format brings any patched weight nearer"):
        edgeport.plan(
            patch=patch, new_base=base, output=tmp_path / "out.gguf", to="gguf", quant="Q4_0", promote=True, max_size="1GB"
        )
