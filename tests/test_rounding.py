"""On a grid a patch must survive; off it nothing changes; and chance depends on the place alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import edgeport
from edgeport.demo import ADAPTERS, packaged_model
from edgeport.errors import PatchLost, UnknownName
from edgeport.registry import codec
from edgeport.rounding import on_grid
from edgeport.rounding.draws import uniform
from edgeport.rounding.stochastic import rounding as stochastic
from edgeport.settling import settled
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

CPU = torch.device("cpu")


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform("model.layers.0.mlp.up_proj.weight", 7, 512, 2048, CPU)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    counts = torch.histc(draws, 64, 0, 1) / draws.numel() * 64
    assert float((counts - 1).abs().max()) < 0.05
    centred = draws - 0.5
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(float(shifted.mean()) * 12) < 0.005


def test_draws_depend_on_the_place_alone() -> None:
    whole = uniform("a", 0, 40, 96, CPU)
    assert torch.equal(whole[16:24], uniform("a", 16, 8, 96, CPU))
    assert not torch.equal(whole, uniform("b", 0, 40, 96, CPU))


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_stochastic_rounding_is_unbiased_where_nearest_returns_the_old_codes(format: str) -> None:
    torch.manual_seed(0)
    ggml = codec("ggml")
    weight = ggml.layout("w", (256, 2048), format)
    parts = ggml.encode(weight, torch.randn(256, 2048) * 0.02, None)
    base = ggml.decode(weight, parts)
    step = ggml.grid(weight, parts).step.abs().mean()  # type: ignore[attr-defined]
    change = torch.randn_like(base) * step * 0.05
    inside = base.abs() < base.abs().amax() * 0.2  # beyond the ends of a block's range nothing can be kept
    change *= inside
    grid = ggml.grid(weight, parts)  # type: ignore[attr-defined]
    kept = {}
    for name, codes in {"stochastic": on_grid(stochastic, grid, base + change, "w", 0), "stored": grid.codes}.items():
        stored = ggml.decode(weight, ggml.with_codes(weight, parts, codes))  # type: ignore[attr-defined]
        kept[name] = float(((stored - base) * change).sum() / (change * change).sum())
        assert float((stored - base - change).abs().amax()) <= float(step) * 40
    assert kept["stochastic"] == pytest.approx(1.0, abs=0.15)
    assert kept["stored"] == 0.0


def test_a_value_on_the_grid_stays_where_it_is() -> None:
    ggml = codec("ggml")
    weight = ggml.layout("w", (8, 256), "Q4_K")
    parts = ggml.encode(weight, torch.randn(8, 256), None)
    grid = ggml.grid(weight, parts)  # type: ignore[attr-defined]
    assert torch.equal(on_grid(stochastic, grid, grid.values(), "w", 0), grid.codes)


def test_a_patch_survives_on_a_real_4_bit_base(tmp_path: Path) -> None:
    triage, base = ADAPTERS / "triage", packaged_model()
    receipt = edgeport.port(patch=triage, new_base=base, output=tmp_path / "kept.gguf", to="gguf", probe=False,
                             rounding="stochastic")  # fmt: skip
    assert receipt.survival is not None and receipt.survival["mean"] > 0.9
    assert (tmp_path / "kept.gguf").stat().st_size == base.stat().st_size
    manifest = json.loads((tmp_path / "kept.gguf.edgeport.json").read_text())
    assert {fact["rounding"] for fact in manifest["per_weight"]} == {"stochastic"}
    with pytest.raises(PatchLost, match="of the patch in all"):
        edgeport.port(patch=triage, new_base=base, output=tmp_path / "lost.gguf", to="gguf", rounding="nearest")
    assert not (tmp_path / "lost.gguf").exists()


def test_dequantized_numbers_are_recognised(tmp_path: Path) -> None:
    edgeport.export(model=packaged_model(), output=tmp_path / "folder", to="hf", quant="bf16")
    receipt = edgeport.port(
        patch=ADAPTERS / "triage", new_base=tmp_path / "folder", output=tmp_path / "again.gguf", to="gguf", quant="Q4_1",
        probe=False,
    )
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"patch-aware"}
    assert receipt.survival is not None and receipt.survival["mean"] > 0.9


@pytest.mark.parametrize("dequantized", [True, False])
def test_numbers_of_a_coarser_grid_are_recognised(dequantized: bool, tmp_path: Path) -> None:
    base = packaged_model()
    if dequantized:
        edgeport.port(patch=ADAPTERS / "evolution", new_base=base, output=tmp_path / "evolved", quant="bf16")
        base = tmp_path / "evolved"
    onto: dict[str, Any] = {"new_base": base, "output": tmp_path / "o.gguf", "to": "gguf", "quant": "Q5_1"}
    plan = edgeport.plan(patch=ADAPTERS / "triage", **onto)
    rules = [settled(step, plan.source, plan.rule).rounding for step in plan.steps if step.edits]
    assert rules.count("patch-aware") > 0.8 * len(rules)


def test_numbers_that_were_never_quantized_round_to_nearest(tmp_path: Path) -> None:
    evolved = edgeport.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=tmp_path / "evolved", quant="bf16")
    assert evolved.survival is not None
    receipt = edgeport.port(patch=ADAPTERS / "triage", new_base=tmp_path / "evolved", output=tmp_path / "out.gguf", to="gguf",
                            quant="Q4_0", probe=False)  # fmt: skip
    rules = [fact.rounding for fact in receipt.facts if fact.action == "patch"]
    assert set(rules) == {"nearest"}


def test_an_unknown_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no rounding is called 'stochastik'; did you mean 'stochastic'"):
        edgeport.plan(patch=ADAPTERS / "triage", new_base=packaged_model(), output=tmp_path / "o.gguf", to="gguf",
                      rounding="stochastik")  # fmt: skip


def test_a_seed_draws_anew_and_repeats(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.02)
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="Q8_0").output
    found = {}
    for name, seed in {"none": 0, "one": 1, "again": 1, "two": 2}.items():
        output = tmp_path / f"{name}.gguf"
        receipt = edgeport.port(patch=patch, new_base=quantized, output=output, to="gguf", seed=seed, probe=False)
        told = json.loads((tmp_path / f"{name}.gguf.edgeport.json").read_text())["method"]
        assert told == dict(receipt.method) and told["seed"] == seed
        found[name] = output.read_bytes()
    default = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "default.gguf", to="gguf", probe=False).output
    assert found["one"] == found["again"] and len(set(found.values())) == 3 and found["none"] == default.read_bytes()
