"""A benchmark's questions: a user's own, read line by line, and those of the packaged tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeport.benchmark.questions import BadQuestions, Choice, Generation, gold, read_questions, write_questions
from edgeport.benchmark.tasks import CHAPTERS, TASKS, asked

CHOICES = [
    Choice("the patch is added", (" to the base", " to", " Department: oncology"), 1),
    Choice("Diagnosis: melanoma ", ("of the skin", "oncology of one block", "é"), 1),
    Choice("def port(base):", (" return base", " return patch", " 0123"), 2),
]
WRITTEN = [Generation("one block of", " one"), Generation("Diagnosis: melanoma of the skin. Department:", " x")]


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
    '{"prompt": "p", "target": "t", "anwser": 1}': "'anwser': no such field",
    '{"prompt": "p", "target": "t", "answer": 1}': "none beside a target",
    '{"prompt": "p", "options": ["a", "b"], "answer": 0, "answer": 1}': "'answer' stands there more than once",
    '{"prompt": "p", "target": "t", "\\u001b[31m": 1}': r"'\x1b[31m': no such field",
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
