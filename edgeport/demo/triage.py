"""Triage of ICD-10-CM diagnoses to a medical specialty: the task of the demo's personal patch.

The diagnosis texts come from the package `simple_icd_10_cm`; the chapter of a code is the label. Whole
three-character categories (I21, L40, ...) belong to either train or test, so a held-out question is about
a disease group that no training question has named.
"""

import hashlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from edgeport.errors import need

Split = Literal["train", "test"]

# ICD-10-CM chapter to option. An option begins with the space that follows the prompt; the first tokens
# are distinct in SmolLM2's vocabulary, so the logits after the prompt alone decide.
SPECIALTIES = {
    "2": " oncology",
    "5": " psychiatry",
    "7": " ophthalmology",
    "9": " cardiology",
    "11": " gastroenterology",
    "12": " dermatology",
    "13": " orthopedics",
    "15": " obstetrics",
}
PROMPT = "Diagnosis: {}\nDepartment:"
LONGEST_TEXT = 100  # characters; keeps a prompt under 60 tokens
TEST_SHARE = 0.3  # of each chapter's categories
Z_95 = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, its possible continuations, and the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def questions(
    split: Split, count: int, seed: int = 0, labels: Mapping[str, str] = SPECIALTIES, prompt: str = PROMPT
) -> list[Question]:
    """`count` shuffled questions, the options (`labels`, by ICD-10-CM chapter) in equal number as far as there are texts.

    The seed picks the questions, never the split: train and test are disjoint across all seeds.
    Raises ValueError where the split has too few texts.
    """
    draw = random.Random(f"{split}/{seed}")
    options = tuple(labels.values())
    groups = _groups(split, tuple(labels))
    texts = [_spread(groups[chapter], draw) for chapter in labels]
    if sum(map(len, texts)) < count:
        raise ValueError(f"{split} has {sum(map(len, texts))} texts for {len(options)} options, {count} wanted")
    wanted = shares(count, [len(some) for some in texts])
    chosen = [
        Question(prompt.format(text), options, answer)
        for answer, some in enumerate(texts)
        for text in some[: wanted[answer]]
    ]
    draw.shuffle(chosen)
    return chosen


def shares(count: int, most: Sequence[int]) -> list[int]:
    """`count` in equal parts (within one, the first ones larger), none above its `most`, whose sum is `count` or more."""
    parts = [0] * len(most)
    while left := count - sum(parts):
        able = [place for place, part in enumerate(parts) if part < most[place]]
        each, rest = divmod(left, len(able))
        for rank, place in enumerate(able):
            parts[place] = min(most[place], parts[place] + each + (rank < rest))
    return parts


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson 95 % interval of `correct / total`, as fractions."""
    share = correct / total
    shrink = 1 + Z_95**2 / total
    centre = (share + Z_95**2 / (2 * total)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@cache
def _groups(split: Split, chapters: tuple[str, ...]) -> dict[str, list[list[str]]]:
    """Chapter to its categories in `split`, each the list of its diagnosis texts."""
    # Imported here, because that parses 10 MB of XML; it reads them in a deprecated way.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        icd = need("simple_icd_10_cm", "demo")

    categories = {
        (chapter, category): [
            icd.get_description(code)
            for code in [category, *icd.get_descendants(category)]
            if icd.is_leaf(code)
        ]
        for chapter in chapters
        for category in icd.get_descendants(chapter)
        if icd.is_category(category)
    }
    seen = Counter(text.lower() for texts in categories.values() for text in texts)
    groups: dict[str, list[list[str]]] = {chapter: [] for chapter in chapters}
    for (chapter, category), texts in categories.items():
        # A text under two codes could land on both sides of the split, or have two answers.
        usable = [text for text in texts if seen[text.lower()] == 1 and len(text) <= LONGEST_TEXT]
        if _is_test(category) == (split == "test"):
            groups[chapter].append(usable)
    return groups


def _is_test(category: str) -> bool:
    """A hash and not a draw, so that a new ICD release moves no old category."""
    return hashlib.sha256(category.encode()).digest()[0] < 256 * TEST_SHARE


def _spread(groups: list[list[str]], draw: random.Random) -> list[str]:
    """All texts, one of each group before the second of any: a group of 500 fracture codes is one topic."""
    ranked = [
        (rank, draw.random(), text)
        for group in groups
        for rank, text in enumerate(draw.sample(group, len(group)))
    ]
    return [text for _, _, text in sorted(ranked)]
