"""The loop: bytes, facts, budgets and failures of whole ports."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import edgeport
from bench.shapes import Shape, write_model, write_patch
from edgeport import run
from edgeport.blocks import ranges
from edgeport.errors import BudgetTooSmall, CorruptCheckpoint, NonFiniteResult, OutputExists, PatchLost, UnknownName
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES, MIB
from edgeport.patches.edits import LowRank
from edgeport.places import staging_path
from edgeport.registry import codec
from edgeport.staging import claimed
from edgeport.texts import duration
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

SHAPE = Shape(256, 2, 640, 1003, 4, 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(SHAPE, tmp_path / "base", None)


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    return write_patch(SHAPE, tmp_path / "patch")


def test_untouched_weights_are_copied_and_progress_adds_up(
    base: Path, patch: Path, tmp_path: Path, read_tensors: Callable[[Path], dict[str, bytes]]
) -> None:
    seen: list[int] = []
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", progress=lambda name, n: seen.append(n))
    assert sum(seen) == receipt.bytes_in
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    copied = {fact.weight for fact in receipt.facts if fact.action == "copy"}
    assert copied == {name for name in before if "proj" not in name}
    assert {name for name in before if before[name] == after[name]} == copied


def test_manifest_and_receipt(base: Path, patch: Path, tmp_path: Path) -> None:
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "edgeport.json").read_text())
    for name, entry in content["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(content["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"edgeport.json"}
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert content["inputs"]["new_base"]["sha256"] == {"model.safetensors": digest}
    assert len(content["per_weight"]) == receipt.to_json()["patched"] == 14
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    factors = load_file(patch / "adapter_model.safetensors")
    kept = whole = 0.0
    for fact in content["per_weight"]:
        name = "base_model.model." + fact["weight"].removesuffix(".weight")
        exact = factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double()
        before, after = old[fact["weight"]].double(), new[fact["weight"]].double()
        moved = after - before
        assert fact["change"] == pytest.approx((exact.norm() / before.norm()).item(), rel=1e-3)
        assert fact["retention"] == pytest.approx(((moved * exact).sum() / exact.square().sum()).item(), abs=1e-3)
        assert fact["error"] == pytest.approx(((moved - exact).norm() / (before + exact).norm()).item(), rel=1e-2)
        assert fact["norm"] == pytest.approx(exact.norm().item(), rel=1e-3)
        kept, whole = kept + (moved * exact).sum().item(), whole + exact.square().sum().item()
    assert content["survival"]["mean"] == pytest.approx(kept / whole, abs=1e-3)
    assert receipt.seconds > 0 and receipt.peak_ram_bytes > receipt.peak_above_import_bytes > 0
    assert receipt.peak_vram_bytes == 0
    assert receipt.bytes_out == sum(receipt.files.values()) == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_a_patch_that_rounding_erases_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    shape = Shape(576, 30, 1536, 49152, 9, 3)
    patch = write_patch(shape, tmp_path / "patch", 1)
    faint = {name: value for name, value in load_file(patch / "adapter_model.safetensors").items() if ".layers.0." in name}
    save_file({name: value * 1e-3 for name, value in faint.items()}, patch / "adapter_model.safetensors")
    job: dict[str, Any] = {"patch": patch, "new_base": smollm2_gguf, "output": tmp_path / "out.gguf", "to": "gguf"}
    job |= {"rounding": "nearest", "probe": False}
    with pytest.raises(PatchLost, match="keeps"):
        edgeport.port(**job)
    assert {path.name for path in tmp_path.iterdir()} == {"patch"}
    receipt = edgeport.port(**job, force=True)
    assert receipt.gate["verdict"] == "forced"
    assert receipt.survival is not None and receipt.survival["mean"] < 0.5
    content = json.loads((tmp_path / "out.gguf.edgeport.json").read_text())
    assert content["survival"] == receipt.survival
    assert all(fact["retention"] is not None for fact in content["per_weight"])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_is_hardly_changed_decides_nothing(sign: int, base: Path, patch: Path, tmp_path: Path) -> None:
    """Rounding's noise is any number of times its change, for or against it."""
    factors = load_file(patch / "adapter_model.safetensors")
    faint = next(name for name in factors if "layers.1.self_attn.v_proj.lora_B" in name)
    factors = {name: value * (sign * 1e-4 if name == faint else 1) for name, value in factors.items()}
    save_file(factors, patch / "adapter_model.safetensors", {"format": "pt"})
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", quant="nf4", probe=False)
    kept = {fact.weight: fact.retention for fact in receipt.facts if fact.retention is not None}
    noise = kept.pop("model.layers.1.self_attn.v_proj.weight")
    assert abs(noise) > 3, "the example shows nothing"
    assert receipt.survival is not None and 0.8 < receipt.survival["mean"] < 1.2
    assert receipt.survival["min"] == min(kept.values())
    assert edgeport.inspect(tmp_path / "out")["survival"]["min"] == min(kept.values())


def test_nan_in_the_base_is_refused_and_named(base: Path, patch: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][7, 3] = float("nan")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(NonFiniteResult, match="the base holds NaN") as caught:
        edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    assert name in str(caught.value) or caught.value.tensor == name


def test_nothing_is_left_by_a_failure_in_the_middle(
    base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: LowRank, device: str) -> Any:
        def apply(rows: range, matrix: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("in the middle")

        return apply if "layers.1" in self.target else lambda rows, matrix: matrix

    monkeypatch.setattr(LowRank, "load", load)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArithmeticError, match="in the middle"):
        edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_two_runs_into_one_output(
    to: str, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second, which starts in the middle of the first, is told so; it would write into the first one's files."""
    base = tiny_llama()
    job: dict[str, Any] = {"patch": save_patch(base, tmp_path / "lora"), "new_base": base, "to": to}
    output, alone = (tmp_path / f"{name}.{to}" for name in ("out", "alone"))
    edgeport.port(**job, output=alone)
    answers, edit = [], run.edit

    def amid(*arguments: Any) -> Any:
        if len(answers) < 2:
            answers.append("")
            with pytest.raises(OutputExists) as caught:
                edgeport.port(**job | {"patch": f"{job['patch']}:-1"}, output=output, resume=len(answers) == 2)
            answers[-1] = str(caught.value)
        return edit(*arguments)

    monkeypatch.setattr(run, "edit", amid)
    late = edgeport.plan(**job, output=output)
    edgeport.port(**job, output=output)
    assert answers == [f"another run is writing {output} at this moment; wait for it, or give another -o"] * 2
    with pytest.raises(OutputExists, match="exists already"):
        run.run(late)  # planned before there was anything
    edgeport.verify(output)
    files = [path / "model.safetensors" if to == "hf" else path for path in (output, alone)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("to", "split"), [("hf", None), ("gguf", None), ("gguf", 200_000)])
def test_what_comes_to_stand_there_meanwhile_is_not_replaced(
    to: str, split: int | None, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    """A run may take hours. With --resume its work is kept until that is moved away."""
    base, output = tiny_llama(), tmp_path / f"out.{to}"
    job: dict[str, Any] = {"patch": save_patch(base, tmp_path / "lora"), "new_base": base, "output": output, "to": to}
    job |= {"max_shard_size": split}
    before = set(tmp_path.iterdir())
    mine = output / "mine" if to == "hf" else output.with_name(edgeport.plan(**job).files[-1].name)

    def meanwhile(weight: str, nbytes: int) -> None:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")

    for resume in (False, True):
        with pytest.raises(OutputExists, match="exists already"):
            edgeport.port(**job, progress=meanwhile, resume=resume)
        assert mine.read_text() == "mine"
        assert {path.name for path in set(tmp_path.iterdir()) - before if path.name.startswith(".")} == (
            {f".out.{to}.partial", f".out.{to}.journal"} if resume else set()
        )
        mine.unlink()
        if to == "hf":
            output.rmdir()
    receipt = edgeport.port(**job, resume=True)
    assert any("21 of 21 weights were written before an interruption" in note for note in receipt.notes)
    edgeport.verify(output)
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_is_refused_leaves_the_place_to_the_one_that_has_it(tmp_path: Path) -> None:
    """Before the first file is made, while the gate still reads, the place is empty."""
    output = tmp_path / "out"
    with claimed(output):
        for _ in range(2):
            with pytest.raises(OutputExists, match="another run is writing"), claimed(output):
                raise AssertionError("both have it")
        assert list(tmp_path.iterdir()) == [staging_path(output)]
    assert not list(tmp_path.iterdir())


def test_a_port_without_a_patch_is_none(base: Path, tmp_path: Path) -> None:
    """As where a pattern for file names has matched nothing."""
    with pytest.raises(UnknownName, match="a port needs a patch"):
        edgeport.port(patch=[], new_base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_seconds_from_hours(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(hidden=256, dtype="bfloat16")
    quants = ("bf16", "Q8_0", "Q4_K_M", "IQ4_XS")
    plans = [edgeport.plan(new_base=base, output=tmp_path / "out.gguf", to="gguf", quant=quant) for quant in quants]
    assert 0 < plans[0].seconds < plans[1].seconds < plans[2].seconds < plans[3].seconds < 60
    assert [duration(count) for count in (0.2, 59, 300, 3 * 3600)] == ["1 s", "59 s", "5 min", "3 h"]


def test_a_misspelt_option_is_not_one_that_was_not_given(base: Path, patch: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"new_base": base, "output": tmp_path / "out", "quan": "bf16"}
    for call in (lambda: edgeport.plan(**job), lambda: edgeport.port(**job, patch=patch)):
        with pytest.raises(TypeError, match="no option is called 'quan'; did you mean 'quant'"):
            call()
    for given in ({"patch": patch}, {"old_base": base}, {"force": True}, {"probe": True}):  # a port's own
        with pytest.raises(TypeError, match=f"no option is called '{next(iter(given))}'"):
            edgeport.export(model=base, output=tmp_path / "out", to="hf", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_process_above_its_budget_is_stopped(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "peak_bytes", lambda: IMPORT_BYTES * 10)
    with pytest.raises(BudgetTooSmall, match="above --max-ram"):
        edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", max_ram=IMPORT_BYTES * 2)
    assert not (tmp_path / "out").exists()


def test_a_process_that_outgrows_its_budget_on_the_way_goes_on_with_a_larger_one(
    base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def growing() -> int:
        nonlocal looks
        looks += 1
        return 1 if looks <= 4 else IMPORT_BYTES * 10

    job: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out"}
    before = set(tmp_path.iterdir())
    for resume in (False, True):
        looks = 0
        monkeypatch.setattr(run, "peak_bytes", growing)
        with pytest.raises(BudgetTooSmall, match="give a larger --max-ram"):
            edgeport.port(**job, max_ram=IMPORT_BYTES * 8, resume=resume)
        left = {path.name for path in set(tmp_path.iterdir()) - before}
        assert left == ({".out.partial", ".out.journal"} if resume else set())
    monkeypatch.setattr(run, "peak_bytes", lambda: 1)
    receipt = edgeport.port(**job, max_ram=IMPORT_BYTES * 9, resume=True)
    assert "4 of 20 weights were written before an interruption, and are as they were" in receipt.notes
    edgeport.verify(tmp_path / "out")


def test_whole_values_beside_an_old_base_that_keeps_more_rows_together(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_tensors: Callable[[Path], dict[str, bytes]]
) -> None:
    """Blocks of 32 rows, where the old base, a GGUF, has 24 of each head in an order of its own."""
    monkeypatch.setattr("edgeport.steps.BLOCK_ELEMENTS", 32 * 96)
    base = tiny_llama(hidden=96)
    patch = save_patch(base, tmp_path / "patch", target_modules=["v_proj"], modules_to_save=["q_proj"])
    old = edgeport.export(model=base, output=tmp_path / "old.gguf", to="gguf", quant="f32").output
    outputs = [edgeport.port(patch=patch, new_base=base, old_base=one, output=tmp_path / f"from {one.stem}").output
               for one in (old, base)]  # fmt: skip
    assert read_tensors(outputs[0]) == read_tensors(outputs[1])


@pytest.mark.parametrize("name", ["base/model.safetensors", "patch/adapter_model.safetensors"])
def test_an_input_that_changes_meanwhile(name: str, base: Path, patch: Path, tmp_path: Path) -> None:
    """Half of the output would be of what it was, half of what it is, under the hash of either."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptCheckpoint, match=rf"{Path(name).name} has changed while it was read"):
        edgeport.port(
            patch=patch, new_base=base, output=tmp_path / "out",
            progress=lambda weight, nbytes: os.utime(tmp_path / name, (1, 1)),
        )  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_does_not_wait_for_the_hashes_of_the_inputs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    over, hashed = Event(), []

    def sha256(path: Path) -> str:
        over.wait(20)
        hashed.append(path)
        return ""

    monkeypatch.setattr("edgeport.manifest.sha256", sha256)
    with pytest.raises(NonFiniteResult):
        edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="f16")
    assert not hashed
    over.set()


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_depend_on_neither_block_size_nor_threads(
    threads: int, base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read_tensors: Callable[[Path], dict[str, bytes]],
) -> None:  # fmt: skip
    whole = edgeport.plan(patch=patch, new_base=base, output=tmp_path / "whole")
    small = edgeport.plan(patch=patch, new_base=base, output=tmp_path / "small", max_ram=IMPORT_BYTES + ALLOWANCE_BYTES + MIB)
    assert max(step.rows for step in whole.steps if step.edits) >= 8 * min(step.rows for step in small.steps if step.edits)
    monkeypatch.setattr(run, "check_budget", lambda plan: None)  # pytest's own process is larger
    run.run(whole)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run.run(small)
    finally:
        torch.set_num_threads(before)
    assert read_tensors(tmp_path / "whole") == read_tensors(tmp_path / "small")


def test_gguf_bytes_do_not_depend_on_block_size(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = write_patch(Shape(576, 1, 1536, 49152, 9, 3), tmp_path / "patch")
    monkeypatch.setattr(run, "check_budget", lambda plan: None)
    for name, budget in {"small": IMPORT_BYTES + ALLOWANCE_BYTES + 8 * MIB, "whole": None}.items():
        output = tmp_path / f"{name}.gguf"
        plan = edgeport.plan(patch=patch, new_base=smollm2_gguf, output=output, to="gguf", quant="Q4_K_M", max_ram=budget)
        run.run(plan, force=True)
    assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_blocks_are_equal_and_whole_granules() -> None:
    weight = codec("plain").layout("w", (1003, 8), "F32")
    for rows in (32, 100, 500, 2000):
        blocks = list(ranges(weight, rows, 1))
        assert [row for block in blocks for row in block] == list(range(1003))
        assert min(map(len, blocks)) >= 16 and max(map(len, blocks)) <= rows
    assert all(block.start % 64 == 0 for block in ranges(weight, 128, 64))




def test_a_header_is_written_whole(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is nearly full, or the header large, the system takes less than it is given, and says how much."""
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, offset: pwrite(handle, memoryview(data)[:700], offset))
    outputs = [tmp_path / name for name in ("little by little", "at once")]
    edgeport.port(patch=patch, new_base=base, output=outputs[0])
    monkeypatch.undo()
    edgeport.port(patch=patch, new_base=base, output=outputs[1])
    pieces, whole = ((output / "model.safetensors").read_bytes() for output in outputs)
    assert pieces == whole
