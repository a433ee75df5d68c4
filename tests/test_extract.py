"""Patches taken out of fine-tunes: PEFT reads them, and what they hold is what a singular value decomposition says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from bench import bad_input, spoiling
from converters.hf import Folder
from edgeport.checkpoint import open_checkpoint
from edgeport.errors import CorruptCheckpoint, MissingTensor, PlanViolation, UnsupportedPatch
from edgeport.lowrank import truncated
from edgeport.memory import IMPORT_BYTES, MIB
from edgeport.patches.edits import stored_rows
from edgeport.places import staging_path
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.post_attention_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def tensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def changed(base: Path, folder: Path, change: dict[str, torch.Tensor]) -> Path:
    """A copy of a model with something added to some of its weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    parameters = dict(model.named_parameters())
    for name, delta in change.items():
        parameters[name].data += delta
    model.save_pretrained(folder)
    return folder


def noise(shape: torch.Size, seed: int, rank: int | None = None, std: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(shape, generator=generator) * std
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator) * std


def peft_merged(base: Path, adapter: Path) -> Tensors:
    """Every weight after PEFT has loaded the adapter and merged it."""
    model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return {name: value.detach() for name, value in model.merge_and_unload().named_parameters()}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


def test_a_merged_lora_comes_back(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(hidden=96)
    patch = save_patch(base, tmp_path / "patch", rank_pattern={"q_proj": 7})
    tuned = edgeport.port(patch=patch, new_base=base, output=tmp_path / "tuned").output
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", rank=8)
    assert done.to_json()["changed"] == 14 and done.energy["min"] > 1 - 1e-6
    before, after, found = tensors(base), tensors(tuned), peft_merged(base, tmp_path / "out")
    for name, value in after.items():
        assert (found[name] - value).norm() <= 1e-5 * max((value - before[name]).norm(), 1e-9)
    # nothing is said of what has not changed
    assert {fact.weight for fact in done.changed} == {name for name in before if not torch.equal(before[name], after[name])}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 14 and config["modules_to_save"] is None


@pytest.mark.parametrize("width", [64, 160])
def test_what_peft_merges_is_the_truncated_difference(width: int, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """At 64 columns the range finder sees all directions; at 160 it is a sketch."""
    base = tiny_llama(hidden=width, layers=1)
    before = tensors(base)
    names = [name for name in before if "proj" in name]
    change = {name: noise(before[name].shape, seed, 5, 0.01) + noise(before[name].shape, -seed, std=1e-3)
              for seed, name in enumerate(names, 1)}  # fmt: skip
    tuned = changed(base, tmp_path / "tuned", change)
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", rank=5)
    after, found = tensors(tuned), peft_merged(base, tmp_path / "out")
    energy = {fact.weight: fact.energy for fact in done.changed}
    assert energy.keys() == set(names)
    for name in names:
        exact = after[name] - before[name]
        ideal = best(exact, 5)
        share = float(ideal.norm() ** 2 / exact.norm() ** 2)
        assert energy[name] == pytest.approx(share, abs=1e-5) and 0.9 < share < 1
        assert (found[name] - before[name] - ideal).norm() <= (1e-5 if width == 64 else 2e-3) * exact.norm()


def test_the_fewest_directions_that_hold_the_energy(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(hidden=160, layers=1)
    before = tensors(base)
    names = [name for name in before if "proj" in name]
    change = {}
    for seed, name in enumerate(names):
        strength = 0.02 * 0.9 ** torch.arange(len(before[name]))
        change[name] = torch.diag(strength) @ noise(before[name].shape, seed, std=1.0)
    tuned = changed(base, tmp_path / "tuned", change)
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", energy=0.99)
    after = tensors(tuned)
    for fact in done.changed:
        values = torch.linalg.svdvals((after[fact.weight] - before[fact.weight]).double()).square()
        share = values.cumsum(0) / values.sum()
        fewest = int((share < 0.99).sum()) + 1
        assert fact.energy >= 0.99 and fewest <= (fact.rank or 0) <= fewest + 1
    assert len({fact.rank for fact in done.changed}) > 1
    found = peft_merged(base, tmp_path / "out")
    for name in names:
        assert (found[name] - after[name]).norm() ** 2 <= 0.0101 * (after[name] - before[name]).norm() ** 2


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_no_linear_layer_is_kept_whole(tied: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied, attention_bias=True, dtype="bfloat16")
    shapes = {name: value.shape for name, value in tensors(base).items()}
    bias, alone = "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.k_proj.bias"
    change = {name: noise(shapes[name], 1, std=0.3) for name in (NORM, bias, alone, EMBEDDING)}
    change["model.layers.0.self_attn.q_proj.weight"] = noise(shapes["model.layers.0.self_attn.q_proj.weight"], 2, 3)
    tuned = changed(base, tmp_path / "tuned", change)
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", rank=64)
    assert any("4 weights that are no linear layers" in note for note in done.notes)
    after, found = tensors(tuned), peft_merged(base, tmp_path / "out")
    for name, value in after.items():
        assert torch.allclose(found[name], value.float(), atol=1e-5 if "proj.weight" in name else 0, rtol=0), name
    ported = edgeport.port(patch=tmp_path / "out", new_base=base, old_base=base, output=tmp_path / "again", quant="f32").output
    again = tensors(ported)
    assert again.keys() == after.keys()
    assert all(torch.allclose(again[name], value.float(), atol=1e-5, rtol=0) for name, value in after.items())


def test_a_grown_vocabulary_comes_with_its_tokenizer(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in, assets = [], Folder.assets
    monkeypatch.setattr(Folder, "assets", lambda self, staging: made_in.append(staging) or assets(self, staging))
    base, larger = tiny_llama(tied=True), tiny_llama("larger", tied=True, vocab=330)
    grown = tensors(larger)
    for name, value in tensors(base).items():
        grown[name] = torch.cat([value, grown[name][320:]]) if name == EMBEDDING else value
    save_file(grown, larger / "model.safetensors", {"format": "pt"})
    for full in (False, True):
        output = tmp_path / f"full-{full}"
        done = edgeport.extract(old_base=base, tuned=larger, output=output, full=full)
        assert (output / "tokenizer.json").read_bytes() == (larger / "tokenizer.json").read_bytes()
        # where the next run would find it, had this one been killed
        assert staging_path(output) in made_in[-1].parents
        assert any("grown" in note for note in done.notes)
        again = edgeport.port(patch=output, new_base=base, output=tmp_path / f"again-{full}").output
        assert torch.equal(tensors(again)[EMBEDDING], grown[EMBEDDING])
        assert json.loads((again / "config.json").read_text())["vocab_size"] == 330


@pytest.mark.parametrize("full", [False, True])
def test_new_tokens_of_zeros_are_new_tokens(full: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """A padded vocabulary, whose other rows nobody has trained."""
    base, larger = tiny_llama(), tiny_llama("larger", vocab=330)
    zeros = torch.zeros(10, 64)
    rows = {name: torch.cat([value, zeros]) if len(value) == 320 else value for name, value in tensors(base).items()}
    save_file(rows, larger / "model.safetensors", {"format": "pt"})
    done = edgeport.extract(old_base=base, tuned=larger, output=tmp_path / "patch", full=full)
    assert sorted(fact.weight for fact in done.changed) == ["lm_head.weight", EMBEDDING] and done.energy["all"] == 1
    again = tensors(edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "again").output)
    assert all(torch.equal(again[name], value) for name, value in rows.items())


def test_differences_of_which_one_grows_the_vocabulary(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, larger, other = tiny_llama(), tiny_llama("larger", vocab=330, seed=1), tiny_llama("other", seed=2)
    for tuned in (larger, other):
        edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / f"from-{tuned.name}", full=True)
    patches = [tmp_path / "from-larger", tmp_path / "from-other"]
    again = tensors(edgeport.port(patch=patches, new_base=base, output=tmp_path / "again").output)
    before, grown, second = tensors(base), tensors(larger), tensors(other)
    for name, value in again.items():
        expected = grown[name].clone()
        expected[: len(before[name])] += second[name] - before[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    with pytest.raises(PlanViolation, match=r"rows up to 321 of model.embed_tokens.weight"):
        stored_rows(open_checkpoint(tmp_path / "from-other" / "difference.safetensors")[EMBEDDING], range(319, 321), 64)


def test_the_container_of_the_base_does_not_matter(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(hidden=96)
    patch = save_patch(base, tmp_path / "patch")
    tuned = edgeport.port(patch=patch, new_base=base, output=tmp_path / "tuned").output
    gguf = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="f32").output
    edgeport.extract(old_base=gguf, tuned=tuned, output=tmp_path / "out", rank=4)
    after, found = tensors(tuned), peft_merged(base, tmp_path / "out")
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in after.items())


def test_a_weight_of_a_single_number(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """As CLIP's scale of its logits."""
    folders = {}
    for name, value in {"base": 2.0, "tuned": 2.5}.items():
        folders[name] = tiny_llama(name)
        state = {**tensors(folders[name]), "logit_scale": torch.tensor(value)}
        save_file(state, folders[name] / "model.safetensors", {"format": "pt"})
    patch = edgeport.extract(old_base=folders["base"], tuned=folders["tuned"], output=tmp_path / "patch", full=True).output
    for old in (None, folders["base"]):
        out = edgeport.port(patch=patch, new_base=folders["base"], old_base=old, output=tmp_path / f"out{old is None}").output
        assert tensors(out)["logit_scale"] == torch.tensor(2.5)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.parametrize("full", [False, True])
def test_a_head_that_was_untied(full: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, tuned = tiny_llama(tied=True), tiny_llama("tuned", tied=False)
    before = tensors(base)
    head = before[EMBEDDING] + noise(before[EMBEDDING].shape, 1, 3)
    save_file({**before, "lm_head.weight": head}, tuned / "model.safetensors", {"format": "pt"})
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", full=full)
    assert [fact.weight for fact in done.changed] == ["lm_head.weight"]
    again = tensors(edgeport.port(patch=tmp_path / "out", new_base=base, output=tmp_path / "again").output)
    assert torch.equal(again[EMBEDDING], before[EMBEDDING]) and torch.allclose(again["lm_head.weight"], head, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_gives_the_tuned_model_back(dtype: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, tuned = tiny_llama(dtype=dtype, tied=True), tiny_llama("tuned", dtype=dtype, tied=True, seed=1)
    same = tensors(tuned) | {NORM: tensors(base)[NORM]}
    save_file(same, tuned / "model.safetensors", {"format": "pt"})
    done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out", full=True)
    assert done.kind == "dense" and done.energy["min"] == 1
    assert load_file(tmp_path / "out" / "difference.safetensors").keys() == same.keys() - {NORM}
    assert edgeport.inspect(tmp_path / "out")["patch_kind"] == "dense"
    again = tensors(edgeport.port(patch=tmp_path / "out", new_base=base, output=tmp_path / "again").output)
    assert again.keys() == same.keys()
    # tuned - old, rounded to float32, and added again
    close = 0 if dtype == "bfloat16" else 1e-6
    assert all(torch.allclose(again[name], value, atol=1e-7, rtol=close) for name, value in same.items())
    half = tensors(edgeport.port(patch=f"{tmp_path / 'out'}:0.5", new_base=base, output=tmp_path / "half", quant="f32").output)
    before = tensors(base)
    assert all(torch.allclose(half[name], (before[name].float() + value.float()) / 2, atol=1e-6) for name, value in same.items())


def test_the_patch_knows_its_base(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, tuned, other = tiny_llama(), tiny_llama("tuned", seed=1), tiny_llama("other", seed=2)
    for full in (False, True):
        output = tmp_path / f"full-{full}"
        edgeport.extract(old_base=base, tuned=tuned, output=output, full=full)
        assert edgeport.verify(output).keys() >= {"difference.safetensors" if full else "adapter_model.safetensors"}
        edgeport.plan(patch=output, new_base=other, old_base=base, output=tmp_path / "out")
        with pytest.raises(edgeport.EdgeportError, match="was made on a base with fingerprint"):
            edgeport.plan(patch=output, new_base=base, old_base=other, output=tmp_path / "out")


def test_what_cannot_be_extracted(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, tuned, deeper = (
        tiny_llama(name, layers=layers, seed=layers, hidden=160) for name, layers in (("base", 1), ("tuned", 1), ("deeper", 2))
    )
    save_file({name: value + noise(value.shape, 3) for name, value in tensors(base).items()}, tuned / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "out"
    with pytest.raises(UnsupportedPatch, match=r"not of low rank: .* hold .* and --energy 0.99 was asked; use --full"):
        edgeport.extract(old_base=base, tuned=tuned, output=output, energy=0.99)
    with pytest.raises(MissingTensor, match="not of one architecture"):
        edgeport.extract(old_base=deeper, tuned=base, output=output)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line(tmp_path: Path) -> None:
    argv = spoiling.extract(tuned=spoiling.tuned)(tmp_path)
    before = bad_input.listing(tmp_path)
    answer = spoiling.run([*argv, "--dry-run", "--json"])
    plan = json.loads(answer.output)
    assert answer.code == 0 and bad_input.listing(tmp_path) == before
    assert plan.keys() >= {"peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "steps"}
    assert "peak RAM" in spoiling.run([*argv, "--dry-run"]).output
    facts = json.loads(spoiling.run([*argv, "--rank", "4", "--json"]).output)
    out = tmp_path / "out"
    assert facts["files"] == {"adapter_model.safetensors": (out / "adapter_model.safetensors").stat().st_size}
    assert facts["bytes_out"] <= plan["bytes_out_at_most"] and facts["rank"] == [4] and facts["changed"] == facts["weights"]
    manifest = json.loads((out / "edgeport.json").read_text())
    assert manifest["inputs"].keys() == {"old_base", "tuned"} and manifest["keep"]["rank"] == 4
    assert [fact["weight"] for fact in manifest["per_weight"] if fact["energy"] < 0.999]
    first = bad_input.listing(out)
    again = spoiling.run([*argv, "--rank", "4", "--overwrite", "-v"])
    assert "change kept" in again.output and "self_attn.q_proj" in again.error
    assert {name: held for name, held in bad_input.listing(out).items() if name != "edgeport.json"} == {
        name: held for name, held in first.items() if name != "edgeport.json"
    }
    assert spoiling.run(["verify", str(out)]).code == 0


def test_a_model_that_changes_meanwhile(tmp_path: Path) -> None:
    base, tuned = spoiling.model(tmp_path), spoiling.model(tmp_path, "tuned", spoiling.tuned())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors has changed while it was read"):
        edgeport.extract(
            old_base=base, tuned=tuned, output=tmp_path / "out",
            progress=lambda weight, nbytes: os.utime(tuned / "model.safetensors", (1, 1)),
        )  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_that_only_count_may_not_change(tmp_path: Path) -> None:
    positions = {"model.positions": np.arange(8, dtype=np.int32)}
    argv = spoiling.extract(
        old=lambda: spoiling.weights() | positions, tuned=lambda: spoiling.tuned() | positions
    )(tmp_path)  # fmt: skip
    assert spoiling.run(argv).code == 0
    assert "model.positions" not in load_file(tmp_path / "out" / "adapter_model.safetensors")
    header, data = spoiling.parted((tmp_path / "tuned" / "model.safetensors").read_bytes())
    start, stop = header["model.positions"]["data_offsets"]
    changed = data[:start] + bytes(stop - start) + data[stop:]
    (tmp_path / "tuned" / "model.safetensors").write_bytes(spoiling.spelled(header, changed))
    answer = spoiling.run([*argv, "--overwrite"])
    assert answer.code == 1 and "model.positions: it has changed, and I32 numbers can be copied" in answer.error


def test_directions_of_a_matrix_in_blocks() -> None:
    matrix = noise(torch.Size([300, 200]), 1, 12) + noise(torch.Size([300, 200]), 2, std=1e-3)

    def blocks() -> Any:
        for start in range(0, 300, 64):
            yield range(start, min(start + 64, 300)), matrix[start : start + 64].clone()

    found = truncated(blocks, 200, 40, "key")
    up, down = found.factors(12)
    assert (up @ down - best(matrix, 12)).norm() < 1e-4 * matrix.norm()
    assert torch.allclose(found.right @ found.right.T, torch.eye(40), atol=1e-5)


def test_memory_is_planned_and_kept(tmp_path: Path) -> None:
    import subprocess
    import sys

    from bench.shapes import Shape, write_model

    shape = Shape(768, 1, 3072, 16000, 8, 8, tied=False)
    base = write_model(shape, tmp_path / "base")
    tuned = write_model(shape, tmp_path / "tuned")
    values = load_file(tuned / "model.safetensors")
    save_file({name: value * 1.01 for name, value in values.items()}, tuned / "model.safetensors")
    ran = subprocess.run(
        [sys.executable, "-m", "edgeport", "extract", "--old-base", base, "--tuned", tuned, "-o", tmp_path / "out", "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    facts = json.loads(ran.stdout)
    assert facts["peak_above_import_bytes"] <= facts["predicted_peak_bytes"]
    plan = edgeport.api.plan_extraction(old_base=base, tuned=tuned, output=tmp_path / "next", max_ram=IMPORT_BYTES + 96 * MIB)
    assert plan.peak_ram_bytes <= IMPORT_BYTES + 96 * MIB


def test_tables_that_one_side_does_not_store(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """BERT's positions are in old checkpoints, and GPT-2's mask; what is trained is missed on either side."""
    base, name = tiny_llama(), "model.layers.0.mlp.up_proj.weight"
    tuned = changed(base, tmp_path / "tuned", {name: noise(tensors(base)[name].shape, 1, rank=2)})
    tables = {"embeddings.position_ids": torch.arange(128)[None], "h.0.attn.bias": torch.ones(1, 1, 8, 8),
              "h.0.attn.masked_bias": torch.tensor(-1e4)}  # fmt: skip
    for side in (base, tuned):
        kept = tensors(side)
        save_file(kept | tables, side / "model.safetensors", {"format": "pt"})
        done = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / f"from-{side.name}", rank=2)
        assert [fact.weight for fact in done.changed] == [name]
        save_file(kept, side / "model.safetensors", {"format": "pt"})
    save_file(tensors(base) | {"h.0.attn.bias": torch.ones(8)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTensor, match=r"h\.0\.attn\.bias, which tuned does not"):
        edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "out")


def test_settings_that_no_patch_holds_are_told(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, name = tiny_llama(), "model.layers.0.mlp.up_proj.weight"
    tuned = changed(base, tmp_path / "tuned", {name: noise(tensors(base)[name].shape, 1, rank=2)})
    assert not edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "alike", rank=2).notes
    config = json.loads((tuned / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "eos_token_id": 7}
    (tuned / "config.json").write_text(json.dumps(config))
    (note,) = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "patch", full=True).notes
    assert note.startswith("config.json has another max_position_embeddings in the tuned model, which no patch holds")


@pytest.mark.parametrize("columns", [300, 1200])
def test_the_room_of_a_wide_sketch_is_planned(columns: int) -> None:
    """Of what LAPACK takes beside its tensors there is no trace in torch, so this is of a process."""
    script = (
        "import torch, edgeport.lowrank as lowrank, edgeport.memory as memory; torch.set_num_threads(1)\n"
        f"matrix = torch.randn(1100, {columns})\n"
        "torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64)); memory.return_freed_blocks(); before = memory.peak_bytes()\n"
        f"lowrank.row_space(lambda: [(range(1100), matrix)], {columns}, {columns} * 5 // 6, 'w')\n"
        f"print(memory.peak_bytes() - before, lowrank.held_bytes(1100, {columns}, {columns} * 5 // 6))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    taken, planned = map(int, done.stdout.split())
    assert taken <= planned + 24 * MIB
