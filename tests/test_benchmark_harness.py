"""The adapter for lm-evaluation-harness against the harness's own model of transformers folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edgeport
from edgeport.benchmark.questions import Choice, write_questions
from edgeport.benchmark.runner import open_runner
from edgeport.benchmark.score import answers
from tests.conftest import TinyLlama

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")

PAIRS = [("the patch is", " added to the base"), ("Diagnosis: melanoma ", "of the skin"), ("def port(", "base")]
PROMPTS = [
    ("one block of", {"until": ["\n"], "max_gen_toks": 6}), ("Diagnosis:", {"until": "e", "max_gen_toks": 8}),
    ("one block of", {"until": ["\n"], "max_new_tokens": 5}),
]  # fmt: skip


def requests(kind: Any, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one if isinstance(one, tuple) else (one,), 0) for one in arguments]


def opened_with_a_start_token(folder: Path) -> None:
    """A tokenizer that puts token 1 before every text, as Llama's does."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    start = next(word for word, token in tokenizer["model"]["vocab"].items() if token == 1)
    begun = [{"SpecialToken": {"id": start, "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [*begun, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*begun, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {start: {"id": start, "ids": [1], "tokens": [start]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.filterwarnings("ignore")
def test_a_long_text_behind_a_start_token(tiny_llama: TinyLlama) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    from edgeport.benchmark.harness import register

    folder = tiny_llama("base", vocab=300)
    opened_with_a_start_token(folder)
    register()
    asked = requests("loglikelihood_rolling", [" the patch is added to the base" * 30])
    for length in (None, 40):
        ours = get_model("edgeport")(path=str(folder), max_length=length)
        theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32", max_length=length)
        assert theirs.tok_encode("a")[0] == 1
        assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_the_adapter_scores_as_the_harness_does(container: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    from edgeport.benchmark.harness import register

    folder = tiny_llama("base", vocab=300)
    model = tmp_path / ("model.gguf" if container == "gguf" else "model")
    edgeport.export(model=folder, output=model, to=container, quant="f32")
    register()
    ours = get_model("edgeport")(path=str(model))
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32")
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS))
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-2)
    written = ours.generate_until(requests("generate_until", PROMPTS))
    assert written == theirs.generate_until(requests("generate_until", PROMPTS))
    prompt, settings = PROMPTS[0]
    also_empty = [(prompt, {**settings, "until": ["", *settings["until"]]})]
    assert ours.generate_until(requests("generate_until", also_empty)) == written[:1]
    texts = ["the patch is", " the patch is added to the base" * 30]
    rolled = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert rolled == pytest.approx(theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts)), rel=1e-4)


OPTIONS = (" surgery", " skin", " eye")
ASKED = [Choice(f"Diagnosis: {word}\nAnswer:", OPTIONS, place % 3) for place, word in enumerate("abcdefghij")]
TASK = """task: departments
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_of_the_harness_runs_on_a_gguf(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Its command, its prompts and its accuracy, beside the benchmark's own of the same questions."""
    model, questions = tmp_path / "model.gguf", tmp_path / "questions.jsonl"
    edgeport.export(model=tiny_llama("base", vocab=300), output=model, to="gguf", quant="f32")
    write_questions(questions, ASKED)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "departments.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    given = ["--model", "edgeport", "--model_args", f"path={model}", "--tasks", "departments",
             "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "results.json"]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "edgeport.benchmark.harness", *map(str, given)], capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (written,) = tmp_path.glob("results*.json")
    found = json.loads(written.read_text())["results"]["departments"]["acc,none"]
    right = answers(open_runner(model), ASKED, keep=None, against=None)["right"]
    assert found == pytest.approx(sum(right) / len(right)) and 0 < found < 1
