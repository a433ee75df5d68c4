"""edgeport bench: the figures between rows by hand, its processes, and what a user may get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import edgeport
from edgeport.aside import ask
from edgeport.benchmark.questions import write_questions
from edgeport.benchmark.results import EVOLVED, MODELS, PORTED, REFIT, TUNED, Results, Row, with_gain_kept
from edgeport.benchmark.runner import open_runner
from edgeport.benchmark.score import perplexity, same, tree
from edgeport.benchmark.suite import Bench, Case, Evolution, Precision, completed, entry
from edgeport.cli import app
from edgeport.demo import child
from edgeport.errors import EdgeportError, UnknownName
from tests.conftest import TinyLlama
from tests.test_benchmark_questions import CHOICES, GOOD, WRITTEN

# Figures between rows.


def row(model: str, precision: str, right: Sequence[bool]) -> Row:
    answers = "".join("01"[one] for one in right)
    return Row("t", "e", model, precision, 1, sum(right), len(right), 0.0, 1, kl=0.5, answers=answers)


def test_flips_and_kept_gain_by_hand() -> None:
    right = {
        (TUNED, "bf16"): [True, True, True, False], (EVOLVED, "bf16"): [True, False, False, False],
        (PORTED, "bf16"): [True, True, False, False], (REFIT, "bf16"): [True, True, True, False],
        (PORTED, "Q4_0"): [False, True, False, True], (EVOLVED, "Q4_0"): [False, False, False, False],
    }  # fmt: skip
    right = {key: answers * 10 for key, answers in right.items()}
    given = [row(*key, answers) for key, answers in right.items()]
    found = {(one.model, one.precision): one for one in completed(given, "bf16")}
    assert [found[PORTED, name].negative_flips for name in ("bf16", "Q4_0")] == [10, 20]
    assert [found[PORTED, name].gain_kept for name in ("bf16", "Q4_0")] == [0.5, 0.5]
    assert found[REFIT, "bf16"].gain_kept == 1.0
    assert found[EVOLVED, "Q4_0"].gain_kept is None and found[EVOLVED, "Q4_0"].negative_flips is None
    assert found[EVOLVED, "Q4_0"].kl is None and found[PORTED, "Q4_0"].kl == 0.5


def test_no_share_of_a_gain_that_is_not_there() -> None:
    for refit in ([True, True], [True, False]):  # none, and one of a question in two
        given = {EVOLVED: [True, False], PORTED: [True, False], REFIT: refit}
        found = completed([row(model, "bf16", right) for model, right in given.items()], "bf16")
        assert [one.gain_kept for one in found] == [None] * 3


@pytest.mark.parametrize(("told", "cell"), [(True, "56% ± 7"), (False, "56% ± 10")])
def test_the_error_of_a_kept_gain_is_that_of_many_draws(told: bool, cell: str) -> None:
    """Questions drawn anew twenty thousand times: for all models together, and where answers are not told for each."""
    total, likely = 500, {EVOLVED: 0.5, PORTED: 0.75, REFIT: 0.95}
    right = {model: [place < total * share for place in range(total)] for model, share in likely.items()}
    rows = [row(model, "bf16", answers) for model, answers in right.items()]
    found = {one.model: one for one in with_gain_kept([one if told else replace(one, answers=None) for one in rows], "bf16")}
    assert found[REFIT].gain_kept == 1 and found[REFIT].gain_error is None and found[EVOLVED].gain_error is None
    draw = np.random.default_rng(0)
    drawn = [draw.integers(total, size=(20_000, total)) for _ in range(1 if told else 3)] * (3 if told else 1)
    evolved, ported, refit = (np.array(answers)[one].sum(1) for answers, one in zip(right.values(), drawn, strict=True))
    spread = float(((ported - evolved) / (refit - evolved)).std())
    assert found[PORTED].gain_error == pytest.approx(1.96 * spread, rel=0.03)
    assert f"| {cell} |" in Results("c", [], 0, list(found.values())).markdown()


@pytest.mark.parametrize("told", [True, False])
def test_three_questions_are_no_certainty(told: bool) -> None:
    """None right of three, and all of three: sixty points or so may be chance on either side."""
    right = {EVOLVED: [False] * 3, PORTED: [True] * 3, REFIT: [True] * 3}
    rows = [row(model, "bf16", answers) for model, answers in right.items()]
    ported = with_gain_kept([one if told else replace(one, answers=None) for one in rows], "bf16")[1]
    assert ported.gain_kept == 1.0 and ported.gain_error is not None and 0.3 < ported.gain_error < 0.8


def test_rows_alone_say_what_they_can() -> None:
    """A refit without its base, and a port in fewer bits without the one it is compared with."""
    given = {(REFIT, "bf16"): [True, True], (PORTED, "Q4_0"): [True, False]}
    found = completed([row(*key, right) for key, right in given.items()], "bf16")
    assert [(one.gain_kept, one.negative_flips) for one in found] == [(None, None)] * 2


def test_what_the_journal_holds_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evolutions of one old base: its rows serve both, and a base that the journal does not know is made."""
    case, precision = Case("t", CHOICES, "patch"), Precision("gguf", "bf16")
    bench = Bench(tmp_path, [precision], journal=tmp_path / "journal.jsonl")
    command, right = ["export", "old"], [True, False, True]
    known = [entry(command, precision, case), asdict(row("old base", "bf16", right))]
    (tmp_path / "journal.jsonl").write_text(json.dumps(known) + "\n" + json.dumps(known)[:40])  # one was cut off
    (found,) = bench.one("another", [case], "old base", precision, command)
    assert found == replace(row("old base", "bf16", right), evolution="another")

    # as many questions, and others
    others = replace(case, questions=[*CHOICES[1:], CHOICES[0]])
    assert entry(command, precision, others) not in bench.finished() and bench.rows_file(others) != bench.rows_file(case)

    (tmp_path / "text").write_text("another text, of which the journal has no perplexity")
    assert entry(command, precision, case, tmp_path / "text") not in bench.finished()

    def made(arguments: Sequence[str]) -> None:
        raise EdgeportError(f"made {arguments[4]}")

    monkeypatch.setattr("edgeport.benchmark.suite.child", made)
    with pytest.raises(EdgeportError, match="made new"):
        list(bench.one("another", [case], "evolved base", precision, ["export", "new"]))


def test_only_ports_are_compared_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others no row says the divergence, and between an old base's vocabulary and a grown one there is none."""
    asked: list[str] = []

    def made(arguments: Sequence[str]) -> dict[str, Any]:
        return {"bytes_out": 1, "survival": None, "seconds": 0.0, "peak_ram_bytes": 1, "peak_above_import_bytes": 1}

    def answered(command: Sequence[str], input: str, **_: Any) -> Any:
        (task,) = json.loads(input)["tasks"]
        asked.append("keep" if task["keep"] else "against" if task["against"] else "neither")
        found = {"tasks": [{"right": [True] * 3, "kl": None, "seconds": 0.0, "peak_ram_bytes": 1}], "perplexity": None}
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr("edgeport.benchmark.suite.child", made)
    monkeypatch.setattr("edgeport.benchmark.suite.subprocess.run", answered)
    bench = Bench(tmp_path, [Precision("gguf", "bf16"), Precision("gguf", "Q8_0")])
    rows = list(bench.measure(Evolution("e", "new", "old"), [Case("t", CHOICES, "patch", "refit")]))
    roles = [(row.model, role) for row, role in zip(rows, asked, strict=True) if role != "neither"]
    assert len(rows) == 8 and roles == [(PORTED, "keep"), (PORTED, "against")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Q4_K_M", ("gguf", "Q4_K_M")), ("nf4", ("hf", "nf4")), ("hf:bf16", ("hf", "bf16")), ("bf16", ("gguf", "bf16"))],
)
def test_precisions_know_their_container(text: str, expected: tuple[str, str]) -> None:
    found = Precision.parse(text)
    assert (found.container, found.quant) == expected


@pytest.mark.parametrize("text", ["tflite:int8", "gguf:", ":Q8_0"])
def test_a_precision_that_means_nothing(text: str) -> None:
    with pytest.raises(UnknownName, match="CONTAINER:TYPE"):
        Precision.parse(text)


def test_the_folder_at_hand_is_no_place_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of edgeport's own reads no module that lies where the user happens to be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("open('read', 'w')")
    case, precision = Case("t", CHOICES, "patch"), Precision("gguf", "bf16")
    bench = Bench(tmp_path, [precision])
    write_questions(bench.questions(case), CHOICES)
    with pytest.raises(EdgeportError, match="nowhere does not exist"):
        list(bench.one("e", [case], "evolved base", precision, ["export", "./nowhere"]))
    with pytest.raises(EdgeportError, match="nowhere does not exist"):
        bench.ask(tmp_path / "nowhere", [case], "keep")
    assert "KeyError" in ask("edgeport.effect", {}, lambda text: None)
    assert not (tmp_path / "read").exists()


# The verb.


def patch(folder: Path, seed: int, scale: float = 0.2) -> Path:
    """A PEFT LoRA on both layers' q_proj of the tiny model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(layer, which): scale * torch.randn(shape, generator=draw)
        for layer in range(2) for which, shape in (("A", (4, 64)), ("B", (64, 4)))
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    return folder


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments), "--no-progress"])


@pytest.fixture
def own(tiny_llama: TinyLlama, tmp_path: Path) -> list[str | Path]:
    """What a user types for a benchmark of a tiny model."""
    model = tiny_llama("evolved", vocab=300, dtype="bfloat16")
    write_questions(tmp_path / "mine.jsonl", [*CHOICES, *WRITTEN])
    given = patch(tmp_path / "patch", 1)
    return ["--model", model, "--patch", given, "--questions", tmp_path / "mine.jsonl", "-o", tmp_path / "out"]


def test_ones_own_model_patch_and_questions(own: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the patch is added to the base, one block of one weight at a time\n" * 3)
    done = run(*own, "--quant", "bf16", "--quant", "Q8_0", "--text", tmp_path / "text.txt", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "results.html"}
    rows = {(one["model"], one["precision"]): one for one in found["rows"]}
    assert set(rows) == {(model, quant) for model in ("evolved base", "ported") for quant in ("bf16", "Q8_0")}
    # the port that the verb measured is the port that a user would make, put to the same questions
    ported = tmp_path / "ported.gguf"
    edgeport.port(patch=own[3], new_base=own[1], output=ported, to="gguf", quant="bf16")
    runner = open_runner(ported)
    expected = [judged.loglikelihoods for judged in runner.judge([tree(runner, question) for question in CHOICES])]
    right = sum(scores.index(max(scores)) == question.answer for scores, question in zip(expected, CHOICES, strict=True))
    texts = runner.write([runner.encode(question.prompt) for question in WRITTEN], 12, ["\n"])
    right += sum(same(text, question.target) for text, question in zip(texts, WRITTEN, strict=True))
    assert rows["ported", "bf16"]["correct"] == right
    assert rows["ported", "bf16"]["perplexity"] == pytest.approx(perplexity(runner, (tmp_path / "text.txt").read_text()))
    assert rows["ported", "bf16"]["bytes"] == ported.stat().st_size > rows["ported", "Q8_0"]["bytes"]
    assert 0 < rows["ported", "Q8_0"]["kl"] < 0.1 and rows["ported", "bf16"]["kl"] is None
    assert rows["evolved base", "bf16"]["port_seconds"] is None
    assert all(one["score_peak_bytes"] > one["bytes"] for one in found["rows"])
    assert found["tasks"] == [
        {"name": "mine", "title": "mine", "source": "mine.jsonl", "questions": 5, "floor": 0.2}
    ]


@pytest.mark.slow
def test_all_rows_and_a_folder(own: list[str | Path], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    old, refit = tiny_llama("old", vocab=300, dtype="bfloat16"), patch(tmp_path / "refit", 2)
    done = run(*own, "--quant", "hf:bf16", "--old-base", old, "--refit", refit)
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(one["model"], one["precision"]) for one in rows} == {(model, "bf16 (hf)") for model in MODELS}


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (["--quant", "Q9_9"], 2, "Q9_9"),
        (["--quant", "tflite:int8"], 2, "CONTAINER:TYPE"),
        (["--suite", "x", "--model", ""], 2, "--model, --patch and --questions together"),
        (["--suite", "triage"], 2, "--suite and --seed are of the packaged suites"),
        (["--seed", "0"], 2, "--suite and --seed are of the packaged suites"),
        (["--patch", "nowhere"], 1, "nowhere does not exist"),
        (["--questions", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--quant", "bf16", "--quant", "nf4"], 1, "bitsandbytes is to ask nf4 (hf) and not installed: pip install"),
        (["--old-base", "nowhere"], 1, "nowhere does not exist"),
        (["--refit", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_mistakes_come_before_any_file(
    change: list[str], code: int, says: str, own: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("edgeport.benchmark.command.find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    done = run(*own, *change)
    assert (done.exit_code, (tmp_path / "out").exists()) == (code, False), done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "says"), [(b"\xe9\xe0", "is not UTF-8 text"), (b" a \n", "less than 20 characters")])
def test_a_text_that_is_none(text: bytes, says: str, own: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(text)
    done = run(*own, "--text", tmp_path / "text.txt")
    assert (done.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_a_base_that_the_gate_refuses(own: list[str | Path], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    done = run(*own, "--old-base", tiny_llama("unrelated", vocab=300, seed=5))
    assert (done.exit_code, (tmp_path / "out").exists()) == (3, False)
    assert "does not come from the old base" in done.stderr and done.stderr.count("\n") == 1


def test_a_failure_on_the_way_keeps_its_code_and_leaves_nothing(
    own: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that runs in a process of its own, with too little memory there."""
    port = ["port", "--new-base", str(own[1]), "--patch", str(own[3]), "--max-ram", "1MB", "-o", str(tmp_path / "port")]
    monkeypatch.setattr(Bench, "one", lambda *_: child(["-m", "edgeport", *port]))
    done = run(*own, "--quant", "Q8_0")
    assert done.exit_code == 4 and "--max-ram 976.6 KiB is too small" in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert run(*own, "--quant", "Q8_0").exit_code == 4
    assert not list((tmp_path / "out").iterdir())
    assert run(*own, "--quant", "Q8_0", "-o", tmp_path / "a" / "deep" / "place").exit_code == 4
    assert not (tmp_path / "a").exists()


def test_a_precision_that_fails_on_the_way_is_told_and_the_others_stay(
    own: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Bench.one

    def some(self: Bench, evolution: str, cases: Any, model: str, precision: Precision, command: Any) -> Any:
        if model == PORTED and precision.name == "Q4_0":
            raise EdgeportError("rounding keeps nothing of it")
        return one(self, evolution, cases, model, precision, command)

    monkeypatch.setattr(Bench, "one", some)
    done = run(*own, "--quant", "Q8_0", "--quant", "Q4_0")
    assert done.exit_code == 0, done.stderr
    found = Results.read(tmp_path / "out" / "results.json")
    assert [(row.model, row.precision) for row in found.rows] == [
        (PORTED, "Q8_0"), ("evolved base", "Q8_0"), ("evolved base", "Q4_0")
    ]  # fmt: skip
    assert list(found.notes) == ["ported, Q4_0: rounding keeps nothing of it"]
    assert found.notes[0] in (tmp_path / "out" / "results.md").read_text()
    assert run(*own, "--quant", "Q4_0", "--overwrite").exit_code == 1  # the reference


def test_a_killed_run_leaves_nothing_and_another_s_models_go(own: list[str | Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeport", "bench", *map(str, own), "--quant", "Q8_0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr and "evolved" in child.stderr.readline()  # a model is being made
        child.terminate()
        assert child.wait() == 143
    assert not (tmp_path / "out").exists()
    left = tmp_path / "out" / ".models.partial" / "model-x"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"what a run left that was killed outright")
    assert run(*own, "--quant", "Q8_0", "--quant", "q8_0").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "results.html"}
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [one["model"] for one in rows] == ["ported", "evolved base"]


def test_a_folder_whose_name_is_no_text(own: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(own[1]).rename(tmp_path / os.fsdecode(b"ev\xff"))
    one = ("ported", "bf16", 1, 1, 1, 0, 1)
    monkeypatch.setattr(Bench, "measure", lambda _, evolution, cases: [Row(cases[0].name, evolution.name, *one)])
    assert run(*own, "--model", model).exit_code == 0
    assert "ev\ufffd" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_the_harness_that_is_not_there_is_named() -> None:
    without = "import sys; sys.modules['lm_eval'] = None; from edgeport.benchmark.harness import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "lm-evaluation-harness is not installed: pip install lm-eval\n")


def test_a_text_through_a_pipe(own: list[str | Path], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"the patch is added to the base, one block of one weight at a time\n")
    os.close(write)
    done = run(*own, "--quant", "Q8_0", "--text", f"/dev/fd/{read}")
    os.close(read)
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert all(one["perplexity"] > 1 for one in rows)


def test_names_that_would_break_the_tables(own: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own[1])
    one = ("ported", "bf16", 1, 1, 1, 0, 1)
    monkeypatch.setattr(Bench, "measure", lambda _, evolution, cases: [Row(cases[0].name, evolution.name, *one)])
    (tmp_path / "a|b.jsonl").write_text(GOOD)
    assert run(*own, "--model", ".", "--questions", tmp_path / "a|b.jsonl").exit_code == 0
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert lines[2].startswith(r"| a\|b | evolved |") and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:3]}) == 1


def test_more_questions_than_a_suite_has(tmp_path: Path) -> None:
    done = run("--limit", 100_000, "-o", tmp_path / "out")
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "--limit 100000 is more than there is" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_suite_and_present_results(own: list[str | Path], tmp_path: Path) -> None:
    done = run("--suite", "mmlu", "-o", tmp_path / "out")
    assert (done.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "triage" in done.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    done = run(*own)
    assert done.exit_code == 1 and "--overwrite" in done.stderr
    done = run(*own, "--overwrite")
    assert done.exit_code == 1 and "is nothing that edgeport bench wrote; it is not overwritten" in done.stderr
    assert (tmp_path / "out" / "results.json").read_text() == "mine"
