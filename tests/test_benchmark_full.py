"""The whole benchmark's parts: jobs in their order, patches trained on a tiny base, results of several runs made one."""

from __future__ import annotations

import json
import resource
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft, of the extra bench, is not installed")

from bench import full, train_task
from bench.full import Job, jobs, run
from bench.suite import STAGES, evolved_of, headline, journaled, merged, write_merged
from bench.train_task import fed
from edgeport.benchmark.command import written
from edgeport.benchmark.questions import Generation
from edgeport.benchmark.results import EVOLVED, OLD, PORTED, REFIT, TUNED, Results, Row
from edgeport.demo.triage import shares
from tests.conftest import TinyLlama


def options(output: Path, **change: object) -> Namespace:
    given = {
        "output": output, "books": output / "books", "device": "cpu", "cores": 2, "threads": 1, "trainings": 8,
        "stages": list(STAGES), "tasks": ["triage", "legs", "sums"], "seeds": 2, "questions": 8, "steps": 2, "batch_size": None,
        "refits": True,
    }  # fmt: skip
    return Namespace(**{**given, **change})


def test_every_job_comes_after_what_it_needs(tmp_path: Path) -> None:
    found = jobs(options(tmp_path))
    places = {job.name: place for place, job in enumerate(found)}
    assert len(places) == len(found)
    carried = {"train-triage-0", "train-legs-0", "train-sums-0"}  # in the package and the repository
    assert "train-sums-1" in places and not carried & places.keys()
    for job in found:
        assert all(places[name] < places[job.name] for name in set(job.needs) - carried), job.name
    assert "ask-full-triage-0-onnx-int4" in places and "ask-lora-legs-1-bf16" in places and "train-legs-1-full" in places
    assert "ask-lora-sums-1-bf16" in places and "train-sums-1-lora" in places
    assert not any(job.name.startswith("ask-chain") for job in jobs(options(tmp_path, stages=["lora"])))


def test_what_needs_no_refit_is_asked_without(tmp_path: Path) -> None:
    names = [job.name for job in jobs(options(tmp_path, refits=False))]
    refits = {f"train-{task}-{seed}-{stage}" for task in ("triage", "legs", "sums") for seed in (0, 1) for stage in STAGES}
    assert names == [job.name for job in jobs(options(tmp_path)) if job.name not in refits] and "train-sums-0-lora" in refits


def test_jobs_run_once_and_not_after_a_failure(tmp_path: Path) -> None:
    todo = [
        Job("good", ["this"]), Job("bad", ["no_such_module"], (), True), Job("after", ["this"], ["bad"]),
        Job("last", ["this"], ["good", "not-of-this-run"]),
    ]  # fmt: skip
    assert run(todo, options(tmp_path)) == ["bad", "after"]
    assert {path.name for path in (tmp_path / "done").iterdir()} == {"good", "last"}
    assert "no_such_module" in (tmp_path / "log" / "bad.txt").read_text()
    (tmp_path / "log" / "good.txt").unlink()
    assert run(todo, options(tmp_path)) == ["bad", "after"]
    assert not (tmp_path / "log" / "good.txt").exists()


def test_the_demos_evolution_is_made_where_there_is_none(smollm2_gguf: Path, tmp_path: Path) -> None:
    base = evolved_of("lora", None, tmp_path)
    assert base == tmp_path / "evolved" / "lora" and (base / "config.json").is_file()
    assert evolved_of("chain2", tmp_path / "others", tmp_path) == tmp_path / "others" / "chain" / "2"


def test_a_patch_is_trained_on_a_folder(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgeport

    base, output = tiny_llama("base", vocab=300), tmp_path / "patch"
    given = ["family", "--base", base, "-o", output, "--steps", "10", "--batch-size", "2", "--device", "cpu", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.train_task", *map(str, given)])
    train_task.main()
    record = json.loads((output / "training.json").read_text())
    assert record["recipe"]["steps"] == 10 and record["recipe"]["learning_rate"] == train_task.RECIPES["family"].learning_rate
    first, last = record["mean_loss_of_5_steps"]
    assert last < first
    receipt = edgeport.port(patch=output, new_base=base, old_base=base, output=tmp_path / "ported")
    assert receipt.facts


def test_questions_are_read_again_in_another_order() -> None:
    asked = [Generation(str(number), " x") for number in range(4)]
    found = fed(asked, 10, seed=0)
    assert found[:4] == asked and len(found) == 10
    assert set(found[4:8]) == set(asked)
    assert fed(asked, 3, seed=0) == asked[:3]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(6, [9, 9, 9], [2, 2, 2]), (5, [9, 9, 9], [2, 2, 1]), (10, [9, 1, 9], [5, 1, 4]), (12, [9, 1, 2], [9, 1, 2]), (0, [3], [0])],
)
def test_shares(count: int, most: list[int], expected: list[int]) -> None:
    assert shares(count, most) == expected


def row(model: str, precision: str, correct: int, seed: int = 0, evolution: str = "full parameters") -> Row:
    return Row("triage", evolution, model, precision, 1, correct, 10, 0.0, 1, patch_seed=seed)


def test_results_that_do_not_fit_leave_the_earlier_ones(tmp_path: Path) -> None:
    written(Results("command", [], 0, [row(EVOLVED, "bf16", 2)]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            written(Results("command", [], 0, [row(EVOLVED, "bf16", 3)]), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_of_several_runs_are_one(tmp_path: Path) -> None:
    task = {"name": "triage", "title": "t", "source": "s", "questions": 10, "floor": 0.1}
    small = {"processor": "p", "cores": 2, "system": "Linux", "ram_bytes": 1, "versions": {"edgeport": "0"}}
    large = {**small, "cores": 64}
    parts = {
        "a": [row(EVOLVED, "bf16", 2), row(PORTED, "bf16", 6), row(PORTED, "Q4_K_M", 5)],
        "b": [row(PORTED, "bf16", 7), row(PORTED, "bf16", 9, seed=1), row(REFIT, "bf16", 8)],
        "c": [row(PORTED, "bf16", 4, evolution="LoRA r8")],
    }
    for name, rows in parts.items():
        (tmp_path / name).mkdir()
        written(Results("command", [task], 0, rows, ["a note"], [large if name == "b" else small]), tmp_path / name)
    said = write_merged([tmp_path / name for name in parts], tmp_path / "all", "one command")
    found = Results.read(tmp_path / "all" / "results.json")
    assert [replace(one, machine=0) for one in found.rows] == merged(parts.values()) and len(found.rows) == 6
    assert (found.machines, found.command, list(found.tasks)) == ([small, large], "one command", [task])
    assert list(found.notes) == ["a note"]
    assert [one.machine for one in found.rows if one.evolution == "full parameters"] == [0, 1, 0, 1, 1]
    # what a row of one machine keeps of the gain that a refit has on another
    assert {one.precision: one.gain_kept for one in found.rows if one.model == PORTED and one.key[1] == "full parameters"
            and not one.patch_seed} == {"bf16": pytest.approx(5 / 6), "Q4_K_M": pytest.approx(0.5)}  # fmt: skip
    # the later of two rows, both seeds in the mean, and the table without the second seed's row
    assert "80.0% ± 10.0" in said and said == headline(found.rows) + "\n"
    assert (tmp_path / "all" / "results.md").read_text().count("| ported | bf16 |") == 2
    assert full.FEW[0] == "bf16"


def test_a_journal_gives_its_finished_rows(tmp_path: Path) -> None:
    """The old base's rows stand for both evolutions that have read one text; what is missing makes no figure."""

    def line(model: str, right: Sequence[bool], text: str, evolution: str = "LoRA r8") -> str:
        answers = "".join("01"[one] for one in right)
        one = replace(row(model, "bf16", sum(right), evolution=evolution), total=len(right), answers=answers)
        return json.dumps([json.dumps(["port", "bf16", "triage", len(right), text]), asdict(one)])

    lines = [
        line(OLD, [True, False], "handbook"), line(TUNED, [True, True], "handbook"), line(PORTED, [False, True], "handbook"),
        line(EVOLVED, [False, False], "handbook", "full parameters"), line(PORTED, [True, False], "reference", "chain 2"),
        line(PORTED, [True], "handbook"),
    ]  # fmt: skip
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    found = {(one.evolution, one.model): one for one in journaled(tmp_path / "journal.jsonl", 2)}
    assert set(found) == {
        ("LoRA r8", OLD), ("LoRA r8", TUNED), ("LoRA r8", PORTED), ("full parameters", OLD), ("full parameters", TUNED),
        ("full parameters", EVOLVED), ("chain 2", PORTED),
    }  # fmt: skip
    assert found["LoRA r8", PORTED].negative_flips == 1 and found["LoRA r8", PORTED].gain_kept is None
    assert found["chain 2", PORTED].negative_flips == 0 and found["full parameters", TUNED].evolution == "full parameters"
