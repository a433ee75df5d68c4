"""edgeport bench: scores against transformers, the figures between rows by hand, and what a user may get wrong."""

from __future__ import annotations

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
from bench.spoiling import NORM
from edgeport.aside import ask
from edgeport.benchmark.harness import rolling
from edgeport.benchmark.questions import BadQuestions, Choice, Generation, gold, read_questions, write_questions
from edgeport.benchmark.results import EVOLVED, MODELS, PORTED, REFIT, TUNED, Row
from edgeport.benchmark.runner import Tree, groups, open_runner
from edgeport.benchmark.score import answers, divergence, pair, perplexity, same, tree
from edgeport.benchmark.suite import Bench, Case, Precision, completed, entry
from edgeport.benchmark.tasks import CHAPTERS, TASKS, asked
from edgeport.cli import app
from edgeport.demo import child
from edgeport.errors import EdgeportError, NonFiniteResult, UnknownName
from edgeport.locate import open_model
from edgeport.probe import open_tokenizer
from tests.conftest import TinyLlama

CHOICES = [
    Choice("the patch is added", (" to the base", " to", " Department: oncology"), 0),
    Choice("Diagnosis: melanoma ", ("of the skin", "oncology of one block", "é"), 1),
    Choice("def port(base):", (" return base", " return patch", " 0123"), 2),
]
WRITTEN = [Generation("one block of", " one"), Generation("Diagnosis: melanoma of the skin. Department:", " x")]


def naive(folder: Path, question: Choice) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Each option in a forward pass of its own: log-likelihoods, and the distribution after the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(question.prompt.rstrip())["input_ids"])
    found = []
    for option in question.options:
        ids = tokenizer(question.prompt + option, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        found.append(sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])))
    return found, logs[start - 1].numpy()


@pytest.fixture
def models(tiny_llama: TinyLlama, tmp_path: Path) -> dict[str, Path]:
    """One model in every container, in float32."""
    folder = tiny_llama("model", vocab=300)
    edgeport.export(model=folder, output=tmp_path / "model.gguf", to="gguf", quant="f32")
    edgeport.export(model=folder, output=tmp_path / "onnx", to="onnx", quant="f32")
    return {"hf": folder, "gguf": tmp_path / "model.gguf", "onnx": tmp_path / "onnx"}


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_options_are_judged_as_by_one_forward_pass_each(container: str, models: dict[str, Path]) -> None:
    runner = open_runner(models[container])
    judged = list(runner.judge([tree(runner, question) for question in CHOICES]))
    for question, one in zip(CHOICES, judged, strict=True):
        expected, first = naive(models["hf"], question)
        np.testing.assert_allclose(one.loglikelihoods, expected, atol=2e-2, rtol=1e-3)
        np.testing.assert_allclose(one.first, first, atol=1e-2)


def test_a_prompt_longer_than_the_sliding_window(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama("mistral", vocab=300)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6}
    (folder / "config.json").write_text(json.dumps(config))
    long = Choice("the patch is added to the base, one block", CHOICES[0].options, 0)
    runner = open_runner(folder)
    for question, one in zip([long, *CHOICES], runner.judge([tree(runner, each) for each in (long, *CHOICES)]), strict=True):
        expected, first = naive(folder, question)
        np.testing.assert_allclose(one.loglikelihoods, expected, atol=1e-4)
        np.testing.assert_allclose(one.first, first, atol=1e-4)


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_writing_is_greedy_and_stops(container: str, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["hf"]), AutoTokenizer.from_pretrained(models["hf"])
    runner = open_runner(models[container])
    texts = runner.write([runner.encode(question.prompt) for question in WRITTEN], 6, ["\n"])
    for question, text in zip(WRITTEN, texts, strict=True):
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        row = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        expected = tokenizer.decode(row, skip_special_tokens=True)
        assert expected.startswith(text) and (text == expected or "\n" in text)


@pytest.fixture
def turning(tiny_llama: TinyLlama, tmp_path: Path) -> dict[str, Path]:
    """A model that after WRITTEN[0] opens a turn, with the token <s>, and goes on with text in it; in every container."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama("turning", vocab=300)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(WRITTEN[0].prompt, return_tensors="pt")["input_ids"]
    opening, text = tokenizer.bos_token_id, tokenizer(" one")["input_ids"][-1]
    with torch.no_grad():
        states = model.model(torch.cat([ids, torch.tensor([[opening]])], 1)).last_hidden_state[0]
        first, second = states[-2] / states[-2].norm(), states[-1]
        model.lm_head.weight[opening] = 20 * first
        model.lm_head.weight[text] = 200 * (second - second @ first * first)
    model.save_pretrained(folder)
    written = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=2)[0, -2:].tolist()
    assert written == [opening, text]
    edgeport.export(model=folder, output=tmp_path / "turning.gguf", to="gguf", quant="f32")
    edgeport.export(model=folder, output=tmp_path / "turning-onnx", to="onnx", quant="f32")
    return {"hf": folder, "gguf": tmp_path / "turning.gguf", "onnx": tmp_path / "turning-onnx"}


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_an_answer_ends_where_another_turn_begins(container: str, turning: dict[str, Path]) -> None:
    runner = open_runner(turning[container])
    assert runner.write([runner.encode(question.prompt) for question in WRITTEN], 6, ["\n"])[0] == ""


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_perplexity_is_that_of_transformers(container: str, models: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = " ".join(f"def port{number}(base, patch): return base + patch" for number in range(3))
    ids = AutoTokenizer.from_pretrained(models["hf"])(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(models["hf"])(ids, labels=ids).loss.exp().item()
    assert perplexity(open_runner(models[container]), text) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_what_is_longer_than_the_model_s_positions(container: str, models: dict[str, Path]) -> None:
    """A question is refused by each runtime alike, and a text is read in pieces that fit."""
    runner = open_runner(models[container])
    long = Choice("one block of " * 60, (" one", " two"), 0)
    with pytest.raises(BadQuestions, match=r"question 2 \('one block.* has positions for 128; shorten the prompt"):
        answers(runner, [CHOICES[0], long], None, None)
    assert perplexity(runner, long.prompt) > 1


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_a_text_with_nothing_before_it(container: str, models: dict[str, Path]) -> None:
    """As lm-evaluation-harness asks for: after the start token, and a long text in windows that the model has positions for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runner, text = open_runner(models[container]), " the patch is added to the base" * 30
    ids = [1, *AutoTokenizer.from_pretrained(models["hf"])(text)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(models["hf"])
    expected = []
    for at in range(0, len(ids) - 1, runner.positions):
        window = torch.tensor([ids[at : at + runner.positions + 1]])
        with torch.no_grad():
            logs = model(window[:, :-1]).logits[0].log_softmax(-1)
        expected.append(logs.gather(1, window[0, 1:, None])[:, 0])
    assert len(expected) > 1
    assert rolling(runner, text) == pytest.approx(torch.cat(expected).sum().item(), rel=1e-3)
    (judged,) = runner.judge([pair(runner, "", " the patch")])
    count = len(runner.encode(" the patch"))
    assert judged.loglikelihoods[0] == pytest.approx(expected[0][:count].sum().item(), abs=2e-2)


def test_paths_that_are_no_unicode(models: dict[str, Path], tmp_path: Path) -> None:
    folder, file = (models[name].rename(tmp_path / os.fsdecode(b"\xff" + name.encode())) for name in ("hf", "gguf"))
    tokenizer = open_tokenizer(open_model(folder))
    assert tokenizer is not None and open_runner(file).encode("the patch") == tokenizer.encode("the patch").ids


def test_a_model_that_computes_no_numbers(tiny_llama: TinyLlama) -> None:
    """Its divergence from another is no 0, and its first option no answer."""
    from safetensors.torch import load_file, save_file

    folder = tiny_llama("model", vocab=300)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, NORM: tensors[NORM] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteResult, match="NaN or infinity at question 1"):
        answers(open_runner(folder), CHOICES, None, None)


def test_groups_hold_what_they_may() -> None:
    trees = [Tree([0] * 5, [[1, 2], [3]])] * 5
    sizes = [len(group) for group in groups(trees, 12, 100)]
    assert sizes == [2, 2, 1]
    assert [len(group) for group in groups(trees, 100, 4)] == [2, 2, 1]
    assert [len(group) for group in groups(trees, 3, 1)] == [1] * 5


def test_divergence_by_hand(tmp_path: Path) -> None:
    reference, other = np.log(np.array([0.5, 0.25, 0.25], np.float32)), np.log(np.array([0.25, 0.25, 0.5], np.float32))
    path = tmp_path / "kept"
    path.write_bytes(reference.tobytes())
    from edgeport.benchmark.runner import Judged

    with path.open("rb") as file:
        assert divergence(file, Judged(other, [], [])) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    with path.open("rb") as file, pytest.raises(EdgeportError, match="4 tokens"):
        divergence(file, Judged(np.zeros(4, np.float32), [], []))


@pytest.mark.parametrize(("text", "right"), [(" 34\n35", True), ("34", True), ("\n 34", True), (" 345", False), ("", False)])
def test_exact_match(text: str, right: bool) -> None:
    assert same(text, " 34") == right


# Figures between rows.


def row(model: str, precision: str, right: Sequence[bool]) -> Row:
    return Row("t", "e", model, precision, 1, sum(right), len(right), 0.0, 1, kl=0.5)


def test_flips_and_kept_gain_by_hand() -> None:
    right = {
        (TUNED, "bf16"): [True, True, True, False], (EVOLVED, "bf16"): [True, False, False, False],
        (PORTED, "bf16"): [True, True, False, False], (REFIT, "bf16"): [True, True, True, False],
        (PORTED, "Q4_0"): [False, True, False, True], (EVOLVED, "Q4_0"): [False, False, False, False],
    }  # fmt: skip
    given = [(row(*key, answers), answers) for key, answers in right.items()]
    found = {(one.model, one.precision): one for one in completed(given, "bf16")}
    assert [found[PORTED, name].negative_flips for name in ("bf16", "Q4_0")] == [1, 2]
    assert [found[PORTED, name].gain_kept for name in ("bf16", "Q4_0")] == [0.5, 0.5]
    assert found[REFIT, "bf16"].gain_kept == 1.0
    assert found[EVOLVED, "Q4_0"].gain_kept is None and found[EVOLVED, "Q4_0"].negative_flips is None
    assert found[EVOLVED, "Q4_0"].kl is None and found[PORTED, "Q4_0"].kl == 0.5


def test_no_share_of_a_gain_that_is_not_there() -> None:
    given = {EVOLVED: [True, True], PORTED: [True, False], REFIT: [True, True]}
    found = completed([(row(model, "bf16", right), right) for model, right in given.items()], "bf16")
    assert [one.gain_kept for one in found] == [None] * 3


def test_rows_alone_say_what_they_can() -> None:
    """A refit without its base, and a port in fewer bits without the one it is compared with."""
    given = {(REFIT, "bf16"): [True, True], (PORTED, "Q4_0"): [True, False]}
    found = completed([(row(*key, right), right) for key, right in given.items()], "bf16")
    assert [(one.gain_kept, one.negative_flips) for one in found] == [(None, None)] * 2


def test_what_the_journal_holds_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two evolutions of one old base: its rows serve both, and a base that the journal does not know is made."""
    case, precision = Case("t", CHOICES, "patch"), Precision("gguf", "bf16")
    bench = Bench(tmp_path, [precision], journal=tmp_path / "journal.jsonl")
    command, right = ["export", "old"], [True, False, True]
    known = [entry(command, precision, case), asdict(row("old base", "bf16", right)), right]
    (tmp_path / "journal.jsonl").write_text(json.dumps(known) + "\n")
    (found,) = bench.one("another", [case], "old base", precision, command)
    assert found == (replace(row("old base", "bf16", right), evolution="another"), right)

    (tmp_path / "text").write_text("another text, of which the journal has no perplexity")
    assert entry(command, precision, case, tmp_path / "text") not in bench.finished()

    def made(arguments: Sequence[str]) -> None:
        raise EdgeportError(f"made {arguments[4]}")

    monkeypatch.setattr("edgeport.benchmark.suite.child", made)
    with pytest.raises(EdgeportError, match="made new"):
        list(bench.one("another", [case], "evolved base", precision, ["export", "new"]))


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


# Questions.


def test_questions_are_read_back(tmp_path: Path) -> None:
    write_questions(tmp_path / "q.jsonl", [*CHOICES, *WRITTEN])
    assert read_questions(tmp_path / "q.jsonl") == [*CHOICES, *WRITTEN]


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Other programs write these signs into a text as they are, and Windows' begin a file with a mark of its own."""
    question = Generation("one\u2028two\u2029three\x85four\x0bfive", " t")
    line = json.dumps({"prompt": question.prompt, "target": question.target}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_bytes(f"\ufeff{line}\r\n{line}".encode())
    assert read_questions(tmp_path / "q.jsonl") == [question, question]


GOOD = '{"prompt": "p", "target": "t"}'
BAD = {
    "{": "not JSON",
    "[1]": "an object",
    '{"prompt": "p"}': "either options",
    '{"prompt": "p", "target": "t", "options": ["a", "b"], "answer": 0}': "not both",
    '{"prompt": " ", "target": "t"}': "prompt has to be a text",
    '{"prompt": "p", "target": 3}': "target has to be a text",
    '{"prompt": "p", "options": "ab", "answer": 0}': "list of texts",
    '{"prompt": "p", "options": ["a"], "answer": 0}': "2 to 128",
    '{"prompt": "p", "options": ["a", "a"], "answer": 0}': "2 to 128",
    '{"prompt": "p", "options": ["a", "b"]}': "0 to 1",
    '{"prompt": "p", "options": ["a", "b"], "answer": 2}': "0 to 1",
    '{"prompt": "p", "options": ["a", "b"], "answer": true}': "0 to 1",
    '{"prompt": "p", "target": "t", "anwser": 1}': "anwser: no such field",
    '{"prompt": "p", "target": "two\\nlines"}': "target has to be one line",
    '{"prompt": "p", "options": ["a", "\\ud83d"], "answer": 0}': "half of a surrogate pair",
    "[" * 5000: "not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:80])
def test_the_first_bad_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n\n{line}\n{{\n")
    with pytest.raises(BadQuestions, match=r"q\.jsonl, line 3: ") as caught:
        read_questions(tmp_path / "q.jsonl")
    assert BAD[line] in str(caught.value)


@pytest.mark.parametrize(("content", "says"), [(b"", "no question"), (b"\xff\xfe", "not UTF-8")])
def test_files_without_questions(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(BadQuestions, match=says):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_disjoint_deterministic_and_large(name: str) -> None:
    test, train = asked(name, "test", 500), TASKS[name].make("train", 480, 0)
    other = TASKS[name].make("train", 480, 1)
    prompts = {question.prompt for question in test}
    assert len(test) == len(prompts) == 500
    assert prompts.isdisjoint(question.prompt for question in [*train, *other])
    assert {gold(question) for question in test} & {gold(question) for question in train}
    assert TASKS[name].make("train", 480, 0) == train != other


def test_a_generator_gives_the_same_questions_in_another_process() -> None:
    script = "from edgeport.benchmark.tasks import asked; print([q.prompt for q in asked('family', 'test', 5)])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([question.prompt for question in asked("family", "test", 5)])


def test_arithmetic_is_right() -> None:
    known = {question.prompt: gold(question) for question in asked("legs", "test", 500)}
    assert known["How many legs are there in total if you have 3 dogs, 5 fireflys?\nAnswer:"] == " 42"


def test_every_chapter_is_asked_for() -> None:
    assert {gold(question) for question in asked("chapters", "test", 500)} == set(CHAPTERS.values())


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
        (["--patch", "nowhere"], 1, "nowhere does not exist"),
        (["--questions", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--old-base", "nowhere"], 1, "nowhere does not exist"),
        (["--refit", "nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_mistakes_come_before_any_file(change: list[str], code: int, says: str, own: list[str | Path], tmp_path: Path) -> None:
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
    assert (tmp_path / "out" / "results.json").read_text() == "mine"
