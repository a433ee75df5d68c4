"""Questions and how they are written down: a JSONL file, one question a line.

    {"prompt": "Diagnosis: Acute tonsillitis\\nDepartment:", "options": [" surgery", " pediatrics"], "answer": 1}
    {"prompt": "3 cows and 2 hens have how many legs?\\nAnswer:", "target": " 16"}

With `options` the model chooses: the option of the greatest log-likelihood after the prompt wins, the sum over its
tokens, as lm-evaluation-harness' `acc`. With `target` it writes, greedily, until a line ends: right if that is the
target, blanks at either end aside (`exact_match`). The prompt goes to the model as it stands, without a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeport.demo import triage
from edgeport.errors import EdgeportError

MOST_OPTIONS = 128

Choice = triage.Question
"""One prompt, its options, and the number of the right one."""


class BadQuestions(EdgeportError):
    """A questions file that does not say what to ask."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt, and the text that has to come after it."""

    prompt: str
    target: str


Asked = Choice | Generation


def gold(question: Asked) -> str:
    """The right continuation."""
    return question.target if isinstance(question, Generation) else question.options[question.answer]


def read_questions(path: Path) -> list[Asked]:
    """Every line of a JSONL file. Raises BadQuestions for the first line that is no question."""
    try:
        # with Windows' mark at the begin or without; splitlines would also cut at signs that may stand within a text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadQuestions(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    found = [parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadQuestions(f"{path} holds no question; write one JSON object a line")
    return found


def parsed(line: str, where: str) -> Asked:
    """One question. Raises BadQuestions, which begins with `where`."""
    names: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names.extend(name for name, _ in pairs)
        return dict(pairs)

    try:
        fields = json.loads(line, object_pairs_hook=noted)
    except (ValueError, RecursionError) as error:
        raise BadQuestions(f"{where}: not JSON ({error}); write one object a line") from error
    repeated = sorted({name for name in names if names.count(name) > 1})
    complaint = f"{', '.join(map(repr, repeated))} stands there more than once" if repeated else mistake(fields)
    if complaint:
        raise BadQuestions(f"{where}: {complaint}")
    if "target" in fields:
        return Generation(fields["prompt"], fields["target"])
    return Choice(fields["prompt"], tuple(fields["options"]), fields["answer"])


def mistake(fields: Any) -> str | None:
    """What keeps an object from being a question."""
    if not isinstance(fields, dict):
        return "an object with prompt, and either options and answer or target, was expected"
    unknown = sorted(set(fields) - {"prompt", "options", "answer", "target"})
    if unknown:
        return f"{', '.join(map(repr, unknown))}: no such field; there are prompt, options, answer and target"
    if not isinstance(fields.get("prompt"), str) or not fields["prompt"].strip():
        return "prompt has to be a text"
    if any("\ud800" <= sign <= "\udfff" for text in texts(fields) for sign in text):
        return "half of a surrogate pair (\\ud800 to \\udfff) is no character"
    if ("target" in fields) == ("options" in fields):
        return "either options (with answer) or target has to be there, and not both"
    if "target" in fields:
        if "answer" in fields:
            return "answer is the number of an option, and there are none beside a target"
        target = fields["target"]
        if not isinstance(target, str) or not target.strip():
            return "target has to be a text"
        return "target has to be one line: with it a model's answer ends" if "\n" in target.strip() else None
    options, answer = fields["options"], fields.get("answer")
    if not isinstance(options, list) or not all(isinstance(one, str) and one for one in options):
        return "options has to be a list of texts"
    if not 2 <= len(options) == len(set(options)) <= MOST_OPTIONS:
        return f"options has to hold 2 to {MOST_OPTIONS} different texts"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        return f"answer has to be the number of the right option, 0 to {len(options) - 1}"
    return None


def texts(fields: Mapping[str, Any]) -> list[str]:
    """All that an object would give a model to read."""
    options = fields.get("options")
    given = [fields.get("prompt"), fields.get("target"), *(options if isinstance(options, list) else [])]
    return [text for text in given if isinstance(text, str)]


def write_questions(path: Path, questions: Sequence[Asked]) -> None:
    path.write_text("".join(json.dumps(to_json(question)) + "\n" for question in questions), encoding="utf-8")


def to_json(question: Asked) -> Mapping[str, Any]:
    if isinstance(question, Generation):
        return {"prompt": question.prompt, "target": question.target}
    return {"prompt": question.prompt, "options": list(question.options), "answer": question.answer}
