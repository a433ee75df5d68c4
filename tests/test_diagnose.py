"""Will a patch carry over: the figures are the tensors' own, and the gate refuses what is demonstrably wrong, and only that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from bench import bad_input
from bench.shapes import Shape, write_model, write_patch
from edgeport.errors import NonFiniteResult, UnknownName
from edgeport.memory import MIB
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch
from tests.test_extract import Tensors, noise, tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tiny_llama: TinyLlama) -> Path:
    return tiny_llama()


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    return save_patch(base, tmp_path / "patch", std=0.02)


def copied(base: Path, folder: Path, change: Tensors) -> Path:
    """The base with something added to some tensors."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    after = {name: value + change.get(name, 0) for name, value in tensors(base).items()}
    save_file(after, folder / "model.safetensors", {"format": "pt"})
    return folder


def drifted(base: Path, folder: Path, std: float = 1e-4) -> Path:
    return copied(base, folder, {name: noise(value.shape, 7, std=std) for name, value in tensors(base).items()})


def deltas(base: Path, patch: Path, folder: Path) -> Tensors:
    after = tensors(edgeport.port(patch=patch, new_base=base, output=folder).output)
    return {name: value - before for name, before in tensors(base).items() if not torch.equal(value := after[name], before)}


def test_figures_are_those_of_the_tensors(base: Path, patch: Path, tmp_path: Path) -> None:
    new = drifted(base, tmp_path / "new")
    found = edgeport.diagnose(patch=patch, new_base=new, old_base=base)
    before, after = tensors(base), tensors(new)
    changes = deltas(new, patch, tmp_path / "exact")
    assert found.weights.keys() == changes.keys() and len(changes) == 14
    factors = load_file(patch / "adapter_model.safetensors")
    for name, change in changes.items():
        drift, figures = after[name] - before[name], found.weights[name].figures()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        reads = torch.linalg.qr(factors[f"{module}.lora_A.weight"].T).Q
        writes = torch.linalg.qr(factors[f"{module}.lora_B.weight"]).Q
        expected = {
            "change": change.norm() / after[name].norm(), "drift": drift.norm() / before[name].norm(),
            "cosine": torch.cosine_similarity(before[name].flatten(), after[name].flatten(), 0),
            "read": (drift @ reads).norm() / change.norm(), "written": (writes.T @ drift).norm() / change.norm(),
            "along": (drift * change).sum() / change.norm() ** 2,
        }  # fmt: skip
        assert figures == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-3, abs=1e-4)
    facts = found.to_json()
    assert list(facts["layers"]) == ["model.layers.0", "model.layers.1"]
    total = sum((after[name] - before[name]).square().sum() for name in changes) / sum(before[n].square().sum() for n in changes)
    assert facts["all"]["drift"] == pytest.approx(float(total.sqrt()), rel=1e-3)
    assert facts["verdict"] == "pass"


def test_what_passes(base: Path, patch: Path, tmp_path: Path) -> None:
    for name, new in {"same": base, "evolved": drifted(base, tmp_path / "new")}.items():
        receipt = edgeport.port(patch=patch, new_base=new, old_base=base, output=tmp_path / name)
        assert receipt.gate["verdict"] == "pass", receipt.gate
        assert json.loads((receipt.output / "edgeport.json").read_text())["gate"] == receipt.gate


def test_without_the_old_base_nothing_is_claimed(base: Path, patch: Path, tmp_path: Path) -> None:
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    found = edgeport.diagnose(patch=patch, new_base=base)
    for verdict, reason in (receipt.gate.values(), (found.verdict.verdict, found.verdict.reason)):
        assert verdict == "not assessed" and "without --old-base" in reason
    figures = found.to_json()["all"]
    assert figures["change"] > 0 and all(figures[key] is None for key in figures if key != "change")
    assert edgeport.export(model=base, output=tmp_path / "plain", to="hf").gate["reason"] == "there is no patch"


@pytest.mark.parametrize("sidecar", [False, True])
def test_an_unrelated_base_is_refused(sidecar: bool, base: Path, patch: Path, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """The same shapes, initialised anew: drift near the square root of 2, cosine near 0."""
    other = tiny_llama("other", seed=1)
    argv = ["port", "--patch", str(patch), "--new-base", str(other), "--old-base", str(base), "-o", str(tmp_path / "out")]
    argv += ["--no-progress"] + ["--sidecar"] * sidecar
    before = bad_input.listing(tmp_path)
    answer = bad_input.run(argv)
    assert (answer.code, answer.output) == (3, "") and bad_input.listing(tmp_path) == before
    assert "drifted by 14" in answer.error and "does not come from the old base" in answer.error and "--force" in answer.error
    told = bad_input.run(["diagnose", "--patch", str(patch), "--new-base", str(other), "--old-base", str(base), "--json"])
    assert told.code == 3 and json.loads(told.output)["verdict"] == "refused"
    facts = json.loads(bad_input.run([*argv, "--force", "--json"]).output)
    assert facts["gate"]["verdict"] == "forced" and "which says refused" in facts["gate"]["reason"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_verdict_is_of_the_new_base_alone(base: Path, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """A patch at odds with itself, or an old base that it is not of, is a mistake to a diagnosis as to a port."""
    patch = save_patch(base, tmp_path / "patch")
    wider = tiny_llama("wider", hidden=160)
    odd = save_patch(base, tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"q_proj": 9}}))
    whole = save_patch(base, tmp_path / "whole", target_modules=["v_proj"], modules_to_save=["q_proj"])
    for given, old in (([odd], None), ([patch], wider), ([patch, whole], None)):
        job = ["--new-base", str(base), *(["--old-base", str(old)] if old else [])]
        job += [word for one in given for word in ("--patch", str(one))]
        answers = [bad_input.run(["diagnose", *job]), bad_input.run(["port", *job, "-o", str(tmp_path / "out")])]
        assert [answer.code for answer in answers] == [1, 1], answers
        assert answers[0].error == answers[1].error
    job = ["--new-base", str(wider), "--patch", str(patch)]
    assert bad_input.run(["diagnose", *job]).code == 3


def test_a_sample_and_all_rows_say_the_same(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(hidden=160)
    patch = save_patch(base, tmp_path / "patch", std=0.02)
    new = drifted(base, tmp_path / "new", std=3e-4)
    receipt = edgeport.port(patch=patch, new_base=new, old_base=base, output=tmp_path / "out")
    whole = edgeport.diagnose(patch=patch, new_base=new, old_base=base).verdict
    assert receipt.gate["verdict"] == whole.verdict == "pass"
    assert receipt.gate["reason"].split(" of the old")[0] == whole.reason.split(" of the old")[0]


def test_what_is_only_warned_of(base: Path, patch: Path, tmp_path: Path) -> None:
    changes = deltas(base, patch, tmp_path / "exact")
    had = copied(base, tmp_path / "had", changes)
    undone = copied(base, tmp_path / "undone", {name: -change for name, change in changes.items()})
    anew = copied(base, tmp_path / "anew", {Q_PROJ: -tensors(base)[Q_PROJ] + noise(torch.Size([64, 64]), 3)})
    wild = drifted(base, tmp_path / "wild", std=7e-3)
    words = copied(base, tmp_path / "words", {})
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text().replace('"<unk>"', '"<none>"'))
    says = {had: "had it already", undone: "undid it", anew: f"1 of 14 matrices have been trained nearly anew .*{Q_PROJ}",
            wild: "more than the patch itself", words: "tokenizer.json of both bases differ"}  # fmt: skip
    for new, text in says.items():
        found = edgeport.diagnose(patch=patch, new_base=new, old_base=base)
        assert found.verdict.verdict == "warn"
        assert re.search(text, found.verdict.reason), found.verdict.reason


def test_another_architecture_is_a_verdict(base: Path, patch: Path, tiny_llama: TinyLlama) -> None:
    wider, shallow = tiny_llama("wider", hidden=96), tiny_llama("shallow", layers=1)
    for new, says in {wider: "the base has", shallow: "does not have"}.items():
        found = edgeport.diagnose(patch=patch, new_base=new, old_base=base)
        assert found.verdict.verdict == "refused" and says in found.verdict.reason
        with pytest.raises(edgeport.EdgeportError, match=says):
            edgeport.plan(patch=patch, new_base=new, output=new.parent / "out")


def test_without_a_patch_there_is_no_verdict(base: Path) -> None:
    """As where a pattern for file names has matched nothing."""
    with pytest.raises(UnknownName, match="none is given"):
        edgeport.diagnose(patch=[], new_base=base, old_base=base)


def test_a_grown_vocabulary_is_named(base: Path, patch: Path, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    larger = tiny_llama("larger", vocab=330)
    grown = {name: torch.cat([value, value[:10]]) if len(value) == 320 else value for name, value in tensors(base).items()}
    save_file(grown, larger / "model.safetensors", {"format": "pt"})
    receipt = edgeport.port(patch=patch, new_base=larger, old_base=base, output=tmp_path / "out")
    assert receipt.gate["verdict"] == "warn" and "the vocabulary has 330 rows, and had 320" in receipt.gate["reason"]
    whole = save_patch(base, tmp_path / "whole", target_modules=["q_proj", "embed_tokens"], std=0.02)
    found = edgeport.diagnose(patch=whole, new_base=base, old_base=larger)
    assert found.weights["model.embed_tokens.weight"].figures()["cosine"] == 1


def test_what_a_quantized_base_keeps(base: Path, patch: Path, tmp_path: Path) -> None:
    quantized = edgeport.export(model=base, output=tmp_path / "nf4", to="hf", quant="nf4").output
    facts = edgeport.diagnose(patch=patch, new_base=quantized, old_base=base).to_json()
    assert facts["verdict"] == "pass" and 0.7 < facts["survival"]["mean"] < 1.3
    options: dict[str, Any] = {"rounding": "stochastic", "probe": False}
    receipt = edgeport.port(patch=patch, new_base=quantized, old_base=base, output=tmp_path / "out", **options)
    assert receipt.survival is not None and facts["survival"]["mean"] == pytest.approx(receipt.survival["mean"], abs=0.15)
    assert receipt.gate["verdict"] == "pass"


def test_a_base_that_holds_nan_is_not_compared(base: Path, patch: Path, tmp_path: Path) -> None:
    new = copied(base, tmp_path / "new", {Q_PROJ: torch.full((1,), float("nan"))})
    for old in (None, base):
        with pytest.raises(NonFiniteResult, match="holds NaN or infinity"):
            edgeport.diagnose(patch=patch, new_base=new, old_base=old)


def test_directions_that_a_patch_does_not_have_are_not_counted(base: Path, tmp_path: Path) -> None:
    """Of rank 4, but its first two columns are the same and its third is nothing: it reads and writes two directions."""
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"], std=0.02)
    factors = load_file(patch / "adapter_model.safetensors")
    for name, value in factors.items():
        if "lora_B" in name:
            value[:, 1], value[:, 2] = value[:, 0], 0
        else:
            value[1], value[2] = value[0], 0
    save_file(factors, patch / "adapter_model.safetensors")
    new = drifted(base, tmp_path / "new")
    found = edgeport.diagnose(patch=patch, new_base=new, old_base=base).weights[Q_PROJ].figures()
    drift = tensors(new)[Q_PROJ] - tensors(base)[Q_PROJ]
    change = deltas(new, patch, tmp_path / "exact")[Q_PROJ]
    left, _, right = torch.linalg.svd(change)
    for name, met in {"read": drift @ right[:2].T, "written": left[:, :2].T @ drift}.items():
        assert found[name] == pytest.approx(float(met.norm() / change.norm()), rel=1e-3), name


GATED = """
import json, sys
import edgeport, edgeport.memory
from edgeport.memory import peak_bytes
edgeport.memory.reset_peak = lambda: False  # from here on all is seen
patch, base, output, room = sys.argv[1:]
receipt = edgeport.port(patch=patch, new_base=base, old_base=base, output=output, max_ram=int(room))
print(json.dumps({"highest": peak_bytes(), "said": receipt.peak_ram_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs VmHWM")
def test_the_gate_keeps_to_the_plan(tmp_path: Path) -> None:
    """In a process of its own: factors of 200,000 rows, 98 MiB as float32, of which nothing as large may be made."""
    shape = Shape(64, 1, 200_000, 256, 4, 1)
    base, patch = write_model(shape, tmp_path / "base"), write_patch(shape, tmp_path / "patch", 128)
    room = edgeport.plan(patch=patch, new_base=base, output=tmp_path / "out", max_ram="2GB").peak_ram_bytes + 8 * MIB
    done = subprocess.run(
        [sys.executable, "-c", GATED, str(patch), str(base), str(tmp_path / "out"), str(room)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["said"] == found["highest"] <= room


def test_vectors_alone_say_nothing_of_where_a_base_comes_from(base: Path, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Norms of models that have nothing in common are alike."""
    tuned, stranger = tmp_path / "tuned", tiny_llama("stranger", seed=9)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data += 0.1
    model.save_pretrained(tuned)
    patch = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "norms", full=True).output
    receipt = edgeport.port(patch=patch, new_base=stranger, old_base=base, output=tmp_path / "out")
    assert receipt.gate["verdict"] == "not assessed" and "the patch changes no matrix" in receipt.gate["reason"]
