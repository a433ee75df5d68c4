"""The probe: its share of the patch's effect against logits computed whole by transformers, its verdict, and its process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from edgeport import probing
from edgeport.effect import measure, models, probe, share
from edgeport.errors import BudgetTooSmall, CorruptCheckpoint, NonFiniteResult, NotACheckpoint, PatchLost, VerificationFailed
from edgeport.locate import open_model
from edgeport.manifest import hashes
from edgeport.memory import MIB
from edgeport.probe import probe_tokens
from edgeport.probing import Job
from tests.commands import child, ran
from tests.conftest import TinyLlama, save_tokenizer
from tests.test_adapter import save_patch
from tests.test_lora_against_peft import save_base, save_grown

TEXT = "the patch is added to the base, one block of one weight at a time, and what rounding takes away is measured " * 8


@pytest.fixture
def base(tiny_llama: TinyLlama) -> Path:
    return tiny_llama()


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    return save_patch(base, tmp_path / "patch", std=0.2)


def job(base: Path, patch: Path, output: Path, **more: Any) -> Job:
    return Job(**{"base": str(base), "old": None, "patches": ((str(patch), 1.0),), "output": str(output), "adapter": None,
                  "tokens": 64, "text": None} | more)  # fmt: skip


def mixed(base: Path, exact: Path, amount: float, folder: Path, noise: float = 0.0) -> Path:
    """The base with `amount` of the change of every weight, and random changes of relative size `noise`."""
    edgeport.export(model=base, output=folder, to="hf")
    old, new = (load_file(path / "model.safetensors") for path in (base, exact))
    torch.manual_seed(7)
    state = {name: old[name] + amount * (new[name] - old[name]) for name in old}
    for name, value in state.items():
        state[name] = value + noise * value.std() * torch.randn_like(value) if value.ndim > 1 else value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def log_probabilities(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0]
    return logits.double().log_softmax(-1)


def test_the_figures_are_those_of_whole_logits(base: Path, patch: Path, tmp_path: Path) -> None:
    exact = edgeport.port(patch=patch, new_base=base, output=tmp_path / "exact").output
    output = mixed(base, exact, 0.7, tmp_path / "output", noise=0.05)
    found = probe(job(base, patch, output), lambda text: None)
    tokens = probe_tokens(open_model(base), 64)
    b, e, o = (log_probabilities(folder, tokens) for folder in (base, exact, output))
    kl = {pair: (p.exp() * (p - q)).sum(-1).mean().item() for pair, (p, q) in {"eo": (e, o), "eb": (e, b), "bo": (b, o)}.items()}
    assert (found.kl, found.patch_kl, found.base_kl) == pytest.approx((kl["eo"], kl["eb"], kl["bo"]), rel=1e-4)
    change = e.exp() - b.exp()
    kept = (change * (o - b)).sum() / (change * (e - b)).sum()
    assert found.kept == pytest.approx(kept.item(), rel=1e-4) and 0.4 < found.kept < 1
    assert found.top1 == pytest.approx((e.argmax(-1) == o.argmax(-1)).double().mean().item())
    for name, logp in {"base": b, "exact": e, "output": o}.items():
        surprise = -logp[:-1].gather(1, tokens[0, 1:, None]).mean().item()
        assert found.perplexity[name] == pytest.approx(math.exp(surprise), rel=1e-4)
    assert found.tokens == 64 and found.text == "packaged" and found.seconds > 0


@pytest.mark.parametrize(("amount", "lost"), [(0.0, True), (0.2, True), (0.8, False), (1.0, False)])
def test_the_share_follows_the_patch_not_the_noise(amount: float, lost: bool, base: Path, patch: Path, tmp_path: Path) -> None:
    exact = edgeport.port(patch=patch, new_base=base, output=tmp_path / "exact").output
    for noise in (0.0, 0.1):
        output = mixed(base, exact, amount, tmp_path / f"output{noise}", noise)
        found = probe(job(base, patch, output, tokens=128), lambda text: None)
        assert found.kept is not None and found.kept == pytest.approx(amount, abs=0.1 if not noise else 0.3)
        assert found.lost == lost
    assert found.kl > found.patch_kl * 0.05  # the noise is there


def test_a_ratio_and_its_error() -> None:
    whole = torch.rand(4000, dtype=torch.float64) + 0.5
    parts = 0.7 * whole + torch.randn(4000, dtype=torch.float64) * 0.1
    ratio, error = share(parts, whole)
    assert ratio == pytest.approx(0.7, abs=4 * (error or 0)) and error == pytest.approx(0.1 / math.sqrt(4000), rel=0.1)
    assert share(parts, whole * 0) == (None, None)


def test_base_and_exact_port_have_one_shape(base: Path, tmp_path: Path, tiny_llama: TinyLlama) -> None:
    """A patch that grows the vocabulary or replaces values: the base stands beside it as it is."""
    tied = tiny_llama("tied", tied=True)
    patch = save_patch(tied, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm"])
    unpatched, exact = models(job(tied, patch, tied))
    assert unpatched.weights.keys() == exact.weights.keys()
    merged = edgeport.port(patch=patch, new_base=tied, output=tmp_path / "merged").output
    tokens = probe_tokens(exact, 32)
    assert measure(unpatched, exact, open_model(merged), tokens, lambda text: None)["kept"] == pytest.approx(1, abs=1e-4)
    assert measure(unpatched, exact, open_model(tied), tokens, lambda text: None)["kept"] == pytest.approx(0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_patch_that_brings_tokens_is_probed_in_the_base_s_own(tmp_path: Path) -> None:
    base, patch = save_base(tmp_path / "base"), tmp_path / "patch"
    save_grown(base, patch, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"])
    for folder, count in {base: 320, patch: 325}.items():
        save_tokenizer(folder, count)
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", quant="Q8_0").output
    receipt = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "out.gguf", to="gguf", probe=True)
    assert receipt.probe is not None and receipt.probe.kept == pytest.approx(1, abs=0.1)


def test_a_port_onto_a_quantized_base_is_probed(base: Path, tmp_path: Path) -> None:
    patch = save_patch(base, tmp_path / "patch", std=0.05)
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="Q8_0").output
    receipt = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "out.gguf", to="gguf")
    assert receipt.probe is not None and receipt.probe.kept == pytest.approx(1, abs=0.1)
    told = json.loads((tmp_path / "out.gguf.edgeport.json").read_text())["probe"]
    assert told["kept"] == receipt.probe.kept and told["perplexity"].keys() == {"base", "exact", "output"}
    assert receipt.to_json()["probe"] == told
    plain = edgeport.port(patch=patch, new_base=base, output=tmp_path / "plain")
    assert plain.to_json()["probe"] == {"skipped": "no patched weight is stored in a quantized format"}
    aside = edgeport.plan(patch=patch, new_base=quantized, output=tmp_path / "aside.gguf", to="gguf", sidecar=True)
    assert aside.probing.skipped == "the patch stays beside the model, where nothing rounds it"
    asked = edgeport.port(patch=patch, new_base=base, output=tmp_path / "asked", probe=True)
    assert asked.probe is not None and asked.probe.kept == pytest.approx(1, abs=1e-3) and asked.probe.kl < 1e-6
    beside = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "s.gguf", to="gguf", sidecar=True, probe=True)
    assert beside.probe is not None and beside.probe.kept == pytest.approx(1, abs=1e-3) and beside.probe.kl < 1e-6


def test_the_verdict_rests_on_the_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may keep the patch in all while the one that matters has lost it."""
    from edgeport.rounding import stochastic

    heard = save_patch(base, tmp_path / "heard", target_modules=["down_proj"], std=0.05)
    idle = save_patch(base, tmp_path / "idle", target_modules=["q_proj", "k_proj"], std=0.08)
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="Q4_0").output
    codes = stochastic.Stochastic.codes

    def stubborn(self: Any, grid: Any, target: torch.Tensor, weight: str, first: int, inputs: Any) -> torch.Tensor:
        return grid.codes if "down_proj" in weight else codes(self, grid, target, weight, first)

    monkeypatch.setattr(stochastic.Stochastic, "codes", stubborn)
    job = {"patch": [heard, idle], "new_base": quantized, "output": tmp_path / "out.gguf", "to": "gguf", "rounding": "stochastic"}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PatchLost, match="nearer to the base than to the exact port"):
        edgeport.port(**job)
    assert sorted(tmp_path.rglob("*")) == before
    receipt = edgeport.port(**job, force=True)
    assert receipt.survival is not None and receipt.survival["mean"] > 0.5
    assert receipt.probe is not None and receipt.probe.lost and any("more than the patch" in note for note in receipt.notes) == (
        receipt.probe.kl > receipt.probe.patch_kl
    )
    assert edgeport.port(**job, probe=False, overwrite=True).probe is None


def test_a_text_of_one_s_own(base: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    common: dict[str, Any] = {"patch": patch, "new_base": base, "to": "gguf", "quant": "Q8_0"}
    receipt = edgeport.port(**common, output=tmp_path / "a.gguf", calibration=tmp_path / "text.txt")
    inputs = json.loads((tmp_path / "a.gguf.edgeport.json").read_text())["inputs"]
    assert inputs["calibration"] == {"name": "text.txt", "sha256": hashes([tmp_path / "text.txt"])}
    assert receipt.probe is not None and receipt.probe.text == "text.txt"
    packaged = edgeport.port(**common, output=tmp_path / "b.gguf")
    assert packaged.probe is not None and packaged.probe.perplexity["base"] != receipt.probe.perplexity["base"]
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    unfit = {"latin.txt": "not a text in UTF-8", "empty.txt": "no text", "absent.txt": "is no file"}
    for name, message in unfit.items():
        with pytest.raises((CorruptCheckpoint, NotACheckpoint), match=message):
            edgeport.plan(**common, output=tmp_path / "c.gguf", calibration=tmp_path / name)


def test_why_there_is_none(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out.gguf", "to": "gguf", "quant": "Q8_0"}
    plan = edgeport.plan(**common)
    assert plan.to_json()["probe"] == {"tokens": 128, "text": "packaged", "peak_ram_bytes": plan.probing.peak_bytes}
    assert edgeport.plan(**common, probe=False).probing.skipped == "--no-probe"
    small = edgeport.plan(**common, max_ram="600MB").probing.skipped
    assert small is not None and "--max-ram is 572.2 MiB" in small
    with pytest.raises(BudgetTooSmall, match="in a process beside the port"):
        edgeport.plan(**common, max_ram="600MB", probe=True)
    assert edgeport.plan(**common, max_ram="2GB").probing.skipped is None
    (base / "tokenizer.json").rename(base / "tokenizer.bak")
    common |= {"to": "hf", "quant": "nf4", "output": tmp_path / "out"}
    assert edgeport.plan(**common).probing.skipped == "base has no tokenizer.json to read a text with"
    monkeypatch.setattr(probing, "find_spec", lambda name: None)
    assert "transformers is not installed" in str(edgeport.plan(**common).probing.skipped)


def test_the_command_probes_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    """Here transformers is loaded, and no port needs one."""
    patch = save_patch(base, tmp_path / "patch", std=0.05)
    quantized = edgeport.export(model=base, output=tmp_path / "quantized", to="hf", quant="nf4").output
    argv = ["port", "--patch", str(patch), "--new-base", str(quantized), "-o", str(tmp_path / "out"), "--json", "--no-progress"]
    told = json.loads(ran(child(argv)).stdout)["probe"]
    assert "skipped" not in told and told["kept"] == pytest.approx(1, abs=0.2) and told["peak_ram_bytes"] > 200 * MIB


def test_what_goes_wrong_in_a_probe_here_does_not_end_the_port(
    base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process of its own."""
    monkeypatch.setattr("edgeport.effect.measure", lambda *_: {}[0])
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", quant="nf4")
    assert receipt.probe_skipped == "KeyError: 0"


@pytest.mark.parametrize("adapter", ["text", 7, {}, {"path": None}])
def test_a_manifest_that_tells_nonsense_of_its_adapter(adapter: Any, base: Path, patch: Path, tmp_path: Path) -> None:
    output = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", sidecar=True).output
    told = json.loads((output / "edgeport.json").read_text())
    (output / "edgeport.json").write_text(json.dumps(told | {"adapter": adapter}))
    if adapter == {}:
        edgeport.compare(output, base, tokens=8)  # as of an output without one
        return
    with pytest.raises(CorruptCheckpoint, match="manifest of out does not say which adapter"):
        edgeport.compare(output, base, tokens=8)


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same_and_keeps_to_its_bound(base: Path, patch: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"patch": patch, "new_base": base, "to": "gguf", "quant": "Q4_0"}
    here = edgeport.port(**common, output=tmp_path / "here.gguf").probe
    plan = edgeport.plan(**common, output=tmp_path / "a.gguf")
    told: list[str] = []
    edgeport.port(**common, output=tmp_path / "there.gguf", probe=False)
    there = probing.beside(job(base, patch, tmp_path / "there.gguf", tokens=plan.probing.tokens), told.append)
    assert here is not None and not isinstance(there, str)
    assert there.kept == pytest.approx(here.kept, rel=1e-4) and there.kl == pytest.approx(here.kl, rel=1e-3, abs=1e-7)
    assert told == [f"probe: layer {n} of 6" for n in range(1, 7)]
    assert there.peak_ram_bytes < plan.probing.peak_bytes
    state = load_file(base / "model.safetensors")
    damaged = mixed(base, base, 0.0, tmp_path / "damaged")
    state["model.norm.weight"] *= torch.nan
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteResult, match="computes NaN"):
        probing.beside(job(base, patch, damaged), told.append)
    (base / "tokenizer.json").unlink()
    assert probing.beside(job(base, patch, base), told.append).startswith("base has no tokenizer.json")  # type: ignore[union-attr]


def test_a_probe_that_was_asked_for_and_cannot_be_run_stops_the_port(base: Path, patch: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard of"}))
    common: dict[str, Any] = {"patch": patch, "new_base": base, "quant": "nf4"}
    with pytest.raises(VerificationFailed, match=r"could not be run .*unheard of.* leave off --probe"):
        edgeport.port(**common, output=tmp_path / "out", probe=True)
    assert not (tmp_path / "out").exists()
    skipped = edgeport.port(**common, output=tmp_path / "out").probe_skipped
    assert skipped is not None and "unheard of" in skipped


def test_inspect_shows_what_survived(base: Path, tmp_path: Path) -> None:
    patch = save_patch(base, tmp_path / "patch", std=0.05)
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="Q8_0").output
    receipt = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "out.gguf", to="gguf", seed=7)
    facts = edgeport.inspect(tmp_path / "out.gguf")
    kept = {fact.weight: fact.retention for fact in receipt.facts if fact.retention is not None}
    survival = facts["survival"]
    squares = {fact.weight: fact.norm**2 for fact in receipt.facts if fact.norm}
    mean = sum(kept[name] * square for name, square in squares.items()) / sum(squares.values())
    assert survival["mean"] == pytest.approx(mean) and survival["weights"] == 14
    assert survival["min"] == min(kept.values()) == survival["least"][survival["worst"]] and len(survival["least"]) == 5
    assert survival["rounding"] == {"patch-aware": 14} and survival["formats"] == {"Q8_0": 14}
    assert facts["probe"]["kept"] == receipt.probe.kept if receipt.probe else False
    assert facts["made_by"]["method"] == {"rounding": "auto", "seed": 7, "semantics": None}
    assert edgeport.inspect(quantized)["survival"] is None
