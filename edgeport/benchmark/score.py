"""Put questions to one model: `python -m edgeport.benchmark.score`, a job in JSON on stdin, the answers in JSON on stdout.

A process of its own, so that its peak memory and its seconds are its own. The job:

    {"model": PATH, "text": FILE or null,
     "tasks": [{"questions": FILE, "keep": FILE or null, "against": FILE or null}, ...]}

`keep` is written: the next-token distributions after the first KL_QUESTIONS prompts. `against` is such a file of another
model, of which the KL divergence is taken.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from math import exp, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeport.benchmark.questions import Asked, BadQuestions, Choice, Generation, gold, read_questions
from edgeport.benchmark.runner import Judged, Runner, Tree, open_runner
from edgeport.errors import EdgeportError, MissingExtra, NonFiniteResult, NotACheckpoint
from edgeport.memory import peak_bytes, reset_peak

if TYPE_CHECKING:
    from edgeport.benchmark.runner import Array

KL_QUESTIONS = 256
CHUNK_TOKENS, CHUNKS = 256, 8
LEAST_SIGNS = 20
"""Characters that a text has to have."""
SPARE_TOKENS = 3
"""Tokens beyond the longest target that a model may write before its answer is cut off."""


def tree(runner: Runner, question: Asked) -> Tree:
    """Prompt and options; of a question without options the one branch is the target."""
    if not isinstance(question, Choice):
        return pair(runner, question.prompt, question.target)
    found = pair(runner, question.prompt, *question.options)
    right = found.branches[question.answer]
    for option, branch in zip(question.options, found.branches, strict=True):
        if len(branch) < len(right) and right[: len(branch)] == branch:
            raise BadQuestions(
                f"after {question.prompt[-40:]!r} the right answer {gold(question)!r} begins with the tokens of the option "
                f"{option!r}, which no model can find less likely; leave the question out, or reword one of them"
            )
    # tokens that all options begin with tell nothing of the choice: the first that does is the one that is compared
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*found.branches, strict=False))
    shared = min(len(list(alike)), min(map(len, found.branches)) - 1)
    return Tree([*found.prompt, *right[:shared]], [branch[shared:] for branch in found.branches])


def pair(runner: Runner, prompt: str, *continuations: str) -> Tree:
    """Each pair tokenized as one text and cut where the prompt's tokens end, as in lm-evaluation-harness' `_encode_pair`."""
    # blanks at the prompt's end belong to what follows, since most tokenizers join them with the next word
    stem = prompt.rstrip()
    blanks = prompt[len(stem) :]
    ids = runner.encode(stem)
    branches = [runner.encode(stem + blanks + text)[len(ids) :] for text in continuations]
    if not all(branches):
        lost = continuations[branches.index([])]
        raise BadQuestions(f"{lost!r} adds no token to the prompt {stem[-40:]!r}; begin options and targets with a space")
    if len(set(map(tuple, branches))) < len(branches):
        raise BadQuestions(f"two options after {stem[-40:]!r} are the same tokens to the model, which cannot choose between them")
    return Tree(ids or [runner.start], branches)


def check_lengths(
    runner: Runner, questions: Sequence[Asked], trees: Sequence[Tree], prompts: Mapping[int, Sequence[int]], longest: int
) -> None:
    """Raises BadQuestions for one that is longer than the texts that the model was made for: not every runtime would say so.

    `prompts`: those that the model writes on from, by the question's place; `longest`: tokens that it may write.
    """
    for place, (question, tree) in enumerate(zip(questions, trees, strict=True)):
        before = len(prompts.get(place, tree.prompt))
        after = longest if place in prompts else max(map(len, tree.branches))
        if before + after > runner.positions:
            raise BadQuestions(
                f"question {place + 1} ({question.prompt[:40]!r} ...) takes {before} tokens and its answer up to {after}, "
                f"and the model has positions for {runner.positions}; shorten the prompt or leave the question out"
            )


def answers(runner: Runner, questions: Sequence[Asked], keep: str | None, against: str | None) -> dict[str, Any]:
    """Which questions are answered right, and the mean KL(against || this) after their prompts."""
    trees = [tree(runner, question) for question in questions]
    # of answers that are written one is judged as well, which tells a damaged model
    judged_places = [place for place, question in enumerate(questions) if isinstance(question, Choice)] or [0]
    # spaces at a prompt's end belong to the next word, and a line's end to the prompt: a chat template may have it there
    prompts = {
        place: runner.encode(question.prompt.rstrip(" "))
        for place, question in enumerate(questions) if isinstance(question, Generation)
    }  # fmt: skip
    longest = max((len(trees[place].branches[0]) for place in prompts), default=0) + SPARE_TOKENS
    check_lengths(runner, questions, trees, prompts, longest)
    right: list[bool] = [False] * len(questions)
    divergences: list[float] = []
    compared = sum(isinstance(question, Choice) for question in questions[:KL_QUESTIONS])
    with ExitStack() as stack:
        kept = stack.enter_context(open(keep, "wb")) if keep else None
        reference = stack.enter_context(open(against, "rb")) if against else None
        judgements = runner.judge([trees[place] for place in judged_places])
        for number, judged in zip(judged_places, judgements, strict=True):
            question = questions[number]
            if not all(map(isfinite, judged.loglikelihoods)):
                raise NonFiniteResult(f"the model computes NaN or infinity at question {number + 1}; its weights are damaged")
            if isinstance(question, Choice):
                right[number] = judged.loglikelihoods.index(max(judged.loglikelihoods)) == question.answer
            # before a number that a model is to write it gives the blank, whatever it knows
            if isinstance(question, Choice) and number < KL_QUESTIONS:
                if kept:
                    kept.write(judged.first.tobytes())
                if reference:
                    check_vocabulary(reference, compared, judged)
                    divergences.append(divergence(reference, judged))
    if prompts:
        texts = runner.write(list(prompts.values()), longest, ("\n",))
        for place, text in zip(prompts, texts, strict=True):
            question = questions[place]
            right[place] = isinstance(question, Generation) and same(text, question.target)
    return {"right": right, "kl": sum(divergences) / len(divergences) if divergences else None}


def same(text: str, target: str) -> bool:
    """Whether what a model wrote is the target, up to the first line's end and blanks at either end."""
    return text.strip().split("\n")[0].strip() == target.strip()


def check_vocabulary(reference: BinaryIO, questions: int, judged: Judged) -> None:
    """Raises EdgeportError where the reference, which tells of so many questions, has more or fewer tokens."""
    if os.fstat(reference.fileno()).st_size != questions * judged.first.nbytes:
        raise EdgeportError(f"this model has {judged.first.size} tokens, and the one it is compared with has another number")


def divergence(reference: BinaryIO, judged: Judged) -> float:
    """KL in nats from the reference's next distribution to this one. Raises NonFiniteResult."""
    import numpy as np

    row: Array = np.frombuffer(reference.read(judged.first.nbytes), dtype=np.float32)
    likely = np.exp(row) > 0
    found = float((np.exp(row[likely]) * (row[likely] - judged.first[likely])).sum(dtype=np.float64))
    if not isfinite(found):
        raise NonFiniteResult("the model gives no chance to a token that the one it is compared with does; it has no KL")
    return max(0.0, found)


def read_text(path: Path) -> str:
    """A text to take the perplexity of. Raises NotACheckpoint."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotACheckpoint(f"--text {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if len(text.strip()) < LEAST_SIGNS:
        raise NotACheckpoint(f"--text {path} has less than {LEAST_SIGNS} characters; give a text of some hundred words")
    return text


def perplexity(runner: Runner, text: str) -> float:
    """Of up to CHUNKS pieces of CHUNK_TOKENS tokens, spread evenly over the text, each read on its own, as a text of its own:
    without its start token, where the model wants one, a Gemma says next to nothing right."""
    opening = runner.encode("")
    ids = runner.encode(text)[len(opening) :]
    pieces = list(cut(ids, min(CHUNK_TOKENS, runner.positions) - len(opening)))
    if not pieces:
        raise NotACheckpoint("the text of --text is a single token to the model; give one of some hundred words")
    spread = [pieces[number * len(pieces) // CHUNKS] for number in range(CHUNKS)] if len(pieces) > CHUNKS else pieces
    trees = [Tree(opening, [piece]) if opening else Tree(piece[:1], [piece[1:]]) for piece in spread]
    surprise = -sum(one.loglikelihoods[0] for one in runner.judge(trees)) / sum(len(one.branches[0]) for one in trees)
    if not isfinite(surprise):  # 16-bit floats may hold a short question and not a longer text
        raise NonFiniteResult("the model computes NaN or infinity on the text of --text; its weights are damaged, or overflow")
    return exp(surprise)


def cut(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Pieces of `size` tokens; the last may be shorter, of two tokens at least."""
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        if len(piece) > 1:
            yield piece


def score(job: dict[str, Any]) -> dict[str, Any]:
    tasks = [read_questions(Path(task["questions"])) for task in job["tasks"]]
    runner = open_runner(Path(job["model"]))
    loaded = peak_bytes()
    results = []
    for task, questions in zip(job["tasks"], tasks, strict=True):
        began, anew = time.perf_counter(), reset_peak()
        found = answers(runner, questions, task["keep"], task["against"])
        # before a whole text's logits, and without those of other tasks where the kernel allows it
        peak = max(loaded, peak_bytes()) if anew else peak_bytes()
        results.append({**found, "seconds": time.perf_counter() - began, "peak_ram_bytes": peak})
    text = read_text(Path(job["text"])) if job["text"] else None
    return {"tasks": results, "perplexity": perplexity(runner, text) if text else None}


def main() -> int:
    try:
        found = score(json.load(sys.stdin))
    except (EdgeportError, MissingExtra) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
