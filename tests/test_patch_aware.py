"""Patch-aware rounding: the descent against plain arithmetic, the inputs against transformers', and what it is for."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

import edgeport
from edgeport.activations import PROBED, Course, calibrate
from edgeport.aside import converse
from edgeport.calibration import TOKENS
from edgeport.demo import ADAPTERS, packaged_model
from edgeport.errors import NotACheckpoint, VerificationFailed
from edgeport.grid import Gridded
from edgeport.locate import open_model
from edgeport.memory import IMPORT_BYTES, MIB
from edgeport.probe import packaged_text, probe_tokens
from edgeport.probing import PROCESS_BYTES, Job
from edgeport.registry import codec
from edgeport.rounding import Inputs, on_grid
from edgeport.rounding.patch_aware import DAMPING, descend, refit, rounding
from edgeport.rounding.stochastic import rounding as stochastic
from edgeport.scratch import Place
from edgeport.staging import Written
from tests.conftest import TinyLlama
from tests.streams import Live
from tests.test_adapter import save_patch


def objective(error: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Of each row, in float64, as the module's docstring has it."""
    error, inputs = error.double(), inputs.double()
    return (error @ inputs.T).square().mean(1) + DAMPING * inputs.square().mean() * error.square().sum(1)


def seen(inputs: torch.Tensor) -> Inputs:
    return Inputs(inputs, float(inputs.float().square().mean()))


def gridded(format: str, rows: int, columns: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A grid, a target near it, and correlated inputs [96, columns] in bfloat16."""
    torch.manual_seed(3)
    ggml = codec("ggml")
    weight = ggml.layout("w", (rows, columns), format)
    grid = ggml.grid(weight, ggml.encode(weight, torch.randn(rows, columns) * 0.02, None))  # type: ignore[attr-defined]
    inputs = (torch.randn(96, 12) @ torch.randn(12, columns) + 0.3 * torch.randn(96, columns)).bfloat16()
    return grid, grid.values() + 0.002 * torch.randn(rows, columns), inputs


def test_the_descent_is_that_of_plain_arithmetic() -> None:
    torch.manual_seed(0)
    rows, columns = 5, 21  # two narrow batches, and a part of one
    inputs = torch.randn(40, columns, dtype=torch.float64)
    moments = inputs.T @ inputs / 40
    middle, distance = torch.randn(columns, rows, dtype=torch.float64), torch.rand(columns, rows, dtype=torch.float64)
    error = torch.randn(columns, rows, dtype=torch.float64)  # of a code that need not be either neighbour
    half = middle - error
    descend(moments @ error, half, distance, moments)
    for row in range(rows):
        for column in range(columns):
            below, above = error[:, row].clone(), error[:, row].clone()
            below[column] = middle[column, row] - distance[column, row]
            above[column] = middle[column, row] + distance[column, row]
            error[:, row] = min(below, above, key=lambda one: float(one @ moments @ one))
    assert torch.allclose(middle - half, error, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_NL", "Q8_0"])
def test_layer_outputs_come_nearer_than_by_chance(format: str) -> None:
    grid, target, inputs = gridded(format, 48, 256)
    chance = objective(grid.values(on_grid(stochastic, grid, target, "w", 0)) - target, inputs.float())
    held = replace(grid, scales=None)
    low, high, _ = grid.bracket(target)
    codes = on_grid(rounding, held, target, "w", 0, seen(inputs))
    assert bool(((codes == low) | (codes == high)).all())
    kept = objective(grid.values(codes) - target, inputs.float())
    assert bool((kept <= chance * (1 + 1e-5)).all()) and float(kept.sum()) < 0.5 * float(chance.sum())
    if grid.scales is not None:
        codes = on_grid(rounding, grid, target, "w", 0, seen(inputs))
        share = float(objective(grid.values(codes) - target, inputs.float()).sum()) / float(kept.sum())
        assert share < 1, share


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1"])
def test_scales_are_those_of_least_squares(format: str) -> None:
    grid, target, inputs = gridded(format, 6, 32)
    seen = torch.cat([inputs.double(), torch.eye(32, dtype=torch.float64)])  # more tokens than numbers to find
    moments = seen.T @ seen
    codes = on_grid(stochastic, grid, target, "w", 0)
    error = (grid.values(codes) - target).T
    levels = grid.levels[codes.long()].double()
    exact = replace(grid, scales=torch.float32, shifts=torch.float32 if grid.shifts else None)
    refit(exact, codes, target, (moments @ error.double()).float(), moments.float())
    for row in range(6):
        parts = [levels[row]] + [torch.ones(32, dtype=torch.float64)] * (grid.shifts is not None)
        design = seen @ torch.stack(parts, 1)
        found = torch.linalg.lstsq(design, (seen @ target[row].double())[:, None]).solution[:, 0]
        ours = [grid.step[row, 0], grid.offset[row, 0]][: len(parts)]
        assert torch.allclose(torch.stack(ours).double(), found, rtol=0.01)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    grid, target, inputs = gridded("Q4_0", 64, 160)
    other = replace(grid, step=grid.step.clone())
    whole = on_grid(rounding, grid, target, "w", 0, seen(inputs))
    pieces = [rounding.codes(other.of_rows(slice(first, first + 16)), target[first : first + 16], "w", first, seen(inputs))
              for first in range(0, 64, 16)]  # fmt: skip
    assert torch.equal(whole, torch.cat(pieces)) and torch.equal(grid.step, other.step)


def written(folder: Path) -> Written:
    """A folder of one file as a run knows what it is writing."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    return Written({name: (path, begin + fact["data_offsets"][0]) for name, fact in header.items() if name != "__metadata__"})


def noted(file: Any, offset: int, *shape: int) -> torch.Tensor:
    count = math.prod(shape)
    return torch.frombuffer(bytearray(os.pread(file.fileno(), 2 * count, offset)), dtype=torch.bfloat16).view(shape).float()


@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_inputs_are_those_of_the_port_so_far(tiny_llama: TinyLlama, tmp_path: Path, windows: int, apart: bool) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.2)
    exact, other = (
        edgeport.port(patch=f"{patch}:{scale}", new_base=base, output=tmp_path / f"exact{scale}", quant="f32").output
        for scale in (1.0, 0.5)
    )
    # in the order in which a text comes to them
    modules = ("0.mlp.up_proj", "1.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.down_proj")
    names = [*(f"model.layers.{module}.weight" for module in modules), "lm_head.weight"]
    asked = [*names[::-1], "model.layers.7.mlp.up_proj.weight"]
    job = Job(base=str(base), old=None, patches=((str(patch), 1.0),), output="", adapter=None, tokens=384, text=None)
    stored = {name: open_model(other).weights[name] for name in names[:-1]}
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32, attn_implementation="eager")
    tokens = probe_tokens(open_model(base), PROBED + 384, packaged_text())[:, PROBED:].reshape(3, 128)
    heard: list[dict[str, torch.Tensor]] = []

    def listen() -> None:
        heard.append({})
        with torch.no_grad():
            model(tokens)

    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, name=name: heard[-1].update({name: inputs[0].reshape(384, -1)}))  # fmt: skip
    listen()
    with torch.no_grad():
        for name, value in AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict().items():
            if name in stored:
                model.get_parameter(name).copy_(value)
    listen()
    exactly, ours = heard
    with TemporaryFile() as file:
        course = Course(job, asked, stored, written(other), file.fileno(), windows)
        answers: Any = calibrate(course, print)
        if apart:
            answers = converse("edgeport.activations", course.packed(), print, (file.fileno(),))
        came = []
        for answer in answers:
            name, place = answer["weight"], Place(*answer["place"])
            came.append(name)
            columns = ours[name].shape[1]
            assert (place.tokens, place.group) == (384, 128 * windows)
            assert torch.allclose(noted(file, place.inputs, 384, columns), ours[name], rtol=0.01, atol=1e-4)
            pieces, start = [], place.drift
            for count in torch.arange(384).split(place.group):
                pieces.append(noted(file, start, columns, len(count)).T)
                start += 2 * columns * len(count)
            drift = ours[name] - exactly[name]
            assert torch.allclose(torch.cat(pieces), drift, rtol=0.02, atol=0.01 * float(exactly[name].abs().max()))
            assert bool(drift.any()) == (name != names[0])
            assert bool(torch.cat(pieces).any()) == (name != names[0])
    assert came == names


def test_what_has_drifted_is_taken_back() -> None:
    grid, target, inputs = gridded("Q4_0", 32, 256)
    drift = (0.02 * inputs.float()).bfloat16()

    def error(codes: torch.Tensor) -> float:
        outputs = (grid.values(codes) - target).double() @ inputs.double().T + target.double() @ drift.double().T
        return float(outputs.square().sum())

    held = replace(grid, scales=None)
    unaware = on_grid(rounding, held, target, "w", 0, seen(inputs))
    aware = on_grid(rounding, held, target, "w", 0, replace(seen(inputs), drift=lambda some: drift[:, some].T))
    assert error(aware) < 0.5 * error(unaware)


def test_auto_takes_it_on_a_real_4_bit_base(tmp_path: Path) -> None:
    found = {}
    for rule in ("auto", "stochastic"):
        receipt = edgeport.port(patch=ADAPTERS / "triage", new_base=packaged_model(), output=tmp_path / f"{rule}.gguf", to="gguf",
                                rounding=rule, probe=True)  # fmt: skip
        assert receipt.probe is not None and receipt.probe.kept is not None and receipt.probe.kept > 0.9
        found[rule] = receipt
    auto, chance = found["auto"], found["stochastic"]
    assert {fact.rounding for fact in auto.facts if fact.action == "patch"} == {"patch-aware"}
    assert auto.probe.kl < 0.7 * chance.probe.kl  # type: ignore[union-attr]
    assert auto.peak_above_import_bytes < auto.predicted_peak_bytes
    common: dict[str, Any] = {"patch": ADAPTERS / "triage", "new_base": packaged_model(), "to": "gguf", "overwrite": True}
    planned = edgeport.plan(**common, output=tmp_path / "auto.gguf")
    told, expected = auto.to_json()["calibration"], planned.to_json()["calibration"]
    assert told["tokens"] == expected["tokens"] == TOKENS and told["peak_ram_bytes"] < expected["peak_ram_bytes"]
    assert chance.calibration is None
    assert (tmp_path / "auto.gguf").stat().st_size == packaged_model().stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{rule}.gguf{ending}" for rule in found for ending in ("", ".edgeport.json")
    )


def quantized_pair(tiny_llama: TinyLlama, folder: Path, **patch: Any) -> tuple[Path, Path]:
    base = tiny_llama()
    made = save_patch(base, folder / "patch", std=0.05, **patch)
    return edgeport.export(model=base, output=folder / "q", to="hf", quant="nf4").output, made


def test_the_same_port_gives_the_same_bytes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    made = [edgeport.port(patch=patch, new_base=base, output=tmp_path / name, probe=False).output for name in ("one", "two")]
    one, two = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert one == two


def test_beside_an_adapter_weights_make_up_for_none_of_the_others(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    none, two, four = (
        edgeport.port(patch=patch, new_base=base, output=tmp_path / str(rank), probe=False, residual=rank).output
        for rank in (None, 2, 4)
    )
    stored = [(folder / "model.safetensors").read_bytes() for folder in (none, two, four)]
    assert stored[0] != stored[1] == stored[2]


def test_a_text_of_the_users_own_guides_it(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("Diagnosis: melanoma of the skin. Department: oncology. " * 60)
    made = [edgeport.port(patch=patch, new_base=base, output=tmp_path / name, probe=False, calibration=file).output
            for name, file in (("own", text), ("packaged", None))]  # fmt: skip
    one, two = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert one != two


def test_without_a_text_chance_decides_and_it_is_said(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    (base / "tokenizer.json").unlink()
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"stochastic"}
    assert any("no text is run through the model" in note and "tokenizer.json" in note for note in receipt.notes)
    with pytest.raises(NotACheckpoint, match="no tokenizer"):
        edgeport.plan(patch=patch, new_base=base, output=tmp_path / "no", rounding="patch-aware")


def test_a_model_that_cannot_be_run_is_rounded_by_chance_or_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", probe=False)
    assert {fact.rounding for fact in receipt.facts if fact.action == "patch"} == {"stochastic"}
    assert any("no text was run through the model" in note and "unheard-of" in note for note in receipt.notes)
    with pytest.raises(VerificationFailed, match=r"cannot see what the layers are given .* use --rounding stochastic"):
        edgeport.port(patch=patch, new_base=base, output=tmp_path / "no", rounding="patch-aware")
    assert not (tmp_path / "no").exists()


def test_a_tight_budget_takes_less_of_the_text_and_says_so(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, patch = quantized_pair(tiny_llama, tmp_path)
    common: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out"}
    rooms = (99 * MIB, 8 * MIB, 0)
    plenty, tight, least = (edgeport.plan(**common, max_ram=IMPORT_BYTES + PROCESS_BYTES + room) for room in rooms)
    assert plenty.rule.tokens == edgeport.plan(**common).rule.tokens == TOKENS
    assert 128 < tight.rule.tokens < TOKENS and not tight.rule.tokens % 128
    assert any(f"room for {tight.rule.tokens} of {TOKENS} tokens" in note for note in tight.notes)
    rules = [{step.rounding for step in plan.steps if step.edits} for plan in (plenty, tight, least)]
    assert rules == [{"patch-aware"}, {"patch-aware"}, {"stochastic"}]


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (32, 1024)])
@pytest.mark.parametrize("format", ["Q4_0", "Q4_K"])
def test_its_room_is_planned(format: str, rows: int, columns: int) -> None:
    grid, target, _ = gridded(format, rows, columns)
    inputs = torch.randn(256, columns).bfloat16()
    drift = (0.01 * inputs.float()).bfloat16()
    given = replace(seen(inputs), drift=lambda some: drift[:, some].T)
    known = [grid.codes, grid.step, grid.offset, grid.levels, target, inputs, drift]
    with Live(*(one for one in known if isinstance(one, torch.Tensor))) as live:
        on_grid(rounding, grid, target, "w", 0, given)
    scratch = cast(Gridded, codec("ggml")).grid_scratch + rounding.scratch(columns, 256) / rounding.pieces
    planned = rows * columns * (1 + scratch) + rounding.held(columns, 256)
    assert live.peak <= planned <= 4 * live.peak
