"""The packaged tasks: questions made by installed packages, the same for the same seed, train and test disjoint.

| task | kind | made by | what is asked |
|---|---|---|---|
| triage | 8 options | simple-icd-10-cm | a diagnosis: which department |
| chapters | 22 options | simple-icd-10-cm | a diagnosis: which chapter of ICD-10-CM (of the 22nd there are 3 texts) |
| legs | a number | reasoning-gym `leg_counting` | a word problem of one or two products and their sum |
| sums | a number | reasoning-gym `chain_sum` | two or three numbers of one or two digits, added and subtracted |
| family | 14 options | reasoning-gym `family_relationships` | a relation that follows from three or more others |
| syllogism | yes or no | reasoning-gym `syllogism` | whether a conclusion follows from two premises |

Whole ICD categories belong to either train or test. A generated question belongs to the split that a hash of its text
says, so no seed can bring a training question into a test.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from edgeport.benchmark.questions import Asked, Choice, Generation
from edgeport.demo import triage
from edgeport.errors import UnknownName, need

Split = Literal["train", "test"]

CHAPTERS = {
    "1": " infections", "2": " neoplasms", "3": " blood", "4": " endocrine", "5": " mental", "6": " nerves", "7": " eye",
    "8": " ear", "9": " circulation", "10": " respiratory", "11": " digestive", "12": " skin", "13": " bones", "14": " urinary",
    "15": " pregnancy", "16": " newborn", "17": " congenital", "18": " symptoms", "19": " injury", "20": " accident",
    "21": " services", "22": " provisional",
}  # fmt: skip
RELATIONS = tuple(
    f" {word}" for word in (
        "mother", "father", "sister", "brother", "daughter", "son", "wife", "husband", "grandmother", "grandfather", "aunt",
        "uncle", "niece", "nephew",
    )
)  # fmt: skip
IN_LAW = (" mother-in-law", " father-in-law")
"""Relations to be trained on, and not asked: to every tokenizer they begin as an option does that is likelier then."""
YES_NO = (" Yes", " No")
ANSWER = "{}\nAnswer:"
SEEDS_APART = 10**6
"""reasoning-gym's question i of seed s is that of seed s + i, so seeds are set this far apart."""


def icd_chapters(split: Split, count: int, seed: int) -> list[Asked]:
    return list(triage.questions(split, count, seed, CHAPTERS, "Diagnosis: {}\nChapter:"))


def legs(split: Split, count: int, seed: int) -> list[Asked]:
    made = generated("leg_counting", split, count, seed, min_animals=1, max_animals=2, max_instances=9)
    return [Generation(ANSWER.format("How" + text.rpartition("Now, how")[2]), f" {answer}") for text, answer in made]


def sums(split: Split, count: int, seed: int) -> list[Asked]:
    made = generated("chain_sum", split, count, seed, min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    return [Generation(text.partition(": ")[2], f" {answer}") for text, answer in made]


def family(split: Split, count: int, seed: int) -> list[Asked]:
    options = RELATIONS if split == "test" else RELATIONS + IN_LAW
    made = generated("family_relationships", split, count, seed, known=options)
    return [Choice(ANSWER.format(text), options, options.index(f" {answer}")) for text, answer in made]


def syllogism(split: Split, count: int, seed: int) -> list[Asked]:
    made = generated("syllogism", split, count, seed, invalid_ratio=0.5)
    return [Choice(ANSWER.format(text), YES_NO, YES_NO.index(f" {answer}")) for text, answer in made]


def generated(
    name: str, split: Split, count: int, seed: int, known: Collection[str] = (), **settings: Any
) -> list[tuple[str, str]]:
    """`count` different questions of a generator of reasoning-gym with their answers, which are among the options `known`."""
    found: dict[str, str] = {}
    for text, answer in stream(name, seed, **settings):
        if is_test(text) == (split == "test") and (not known or f" {answer}" in known):
            found.setdefault(text, answer)
        if len(found) == count:
            break
    return list(found.items())


def stream(name: str, seed: int, **settings: Any) -> Iterator[tuple[str, str]]:
    gym = need("reasoning_gym", "bench")
    for item in gym.create_dataset(name, seed=seed * SEEDS_APART, size=SEEDS_APART, **settings):
        yield item["question"].strip(), item["answer"]


def is_test(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 256 * triage.TEST_SHARE


@dataclass(frozen=True, slots=True)
class Task:
    """A source of questions; `make(split, count, seed)` gives different ones each."""

    name: str
    title: str
    source: str
    make: Callable[[Split, int, int], list[Asked]]


TASKS = {
    task.name: task
    for task in (
        Task("triage", "ICD-10-CM triage, 8 departments", "simple-icd-10-cm",
             lambda split, count, seed: list(triage.questions(split, count, seed))),
        Task("chapters", "ICD-10-CM, all 22 chapters", "simple-icd-10-cm", icd_chapters),
        Task("legs", "Arithmetic in words, exact match", "reasoning-gym leg_counting", legs),
        Task("sums", "Arithmetic in digits, exact match", "reasoning-gym chain_sum", sums),
        Task("family", "Relations that follow, 14 options", "reasoning-gym family_relationships", family),
        Task("syllogism", "Syllogisms, yes or no", "reasoning-gym syllogism", syllogism),
    )
}  # fmt: skip


@cache
def asked(name: str, split: Split, count: int, seed: int = 0) -> tuple[Asked, ...]:
    """The questions of a packaged task. Raises UnknownName, MissingExtra."""
    if name not in TASKS:
        raise UnknownName(f"no task is called {name}; there are {', '.join(TASKS)}")
    made = TASKS[name].make(split, count, seed)
    random.Random(seed).shuffle(made)
    return tuple(made)
