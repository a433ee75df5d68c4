"""What has to run a model so that questions can be put to it, and how several questions go through at once.

A question is a tree: the prompt's tokens, from which each option branches off.

    Diagnosis: Acute tonsillitis \\n Department: --+-- on   cology
                                                  +-- ped  iatrics
    trees are packed side by side into one batch; a token sees its own prompt and its own branch, and nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeport.api import check_whole
from edgeport.errors import NotACheckpoint
from edgeport.locate import open_model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

WORD = "a"
STEM = -1
"""In place of a branch's number: the prompt, which all branches share."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Token ids of a prompt and of the continuations to be judged, each of one token or more."""

    prompt: Sequence[int]
    branches: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """How many the model has to see: a branch's last token needs no successor."""
        return len(self.prompt) + sum(len(branch) - 1 for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest branch, the last one without a successor left out."""
        return len(self.prompt) + max(map(len, self.branches)) - 1


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model thinks of a tree."""

    first: Array
    """[vocabulary] log-probabilities of the token after the prompt."""
    loglikelihoods: Sequence[float]
    """Of each branch, in nats, the sum over its tokens."""
    greedy: Sequence[bool]
    """Whether each branch is what the model would have written."""


class Runner(Protocol):
    """A model that is loaded. A container's runner is a module with `open_runner(path) -> Runner`; see RUNNERS."""

    @property
    def positions(self) -> int:
        """Tokens that a text may have."""
        ...

    @property
    def start(self) -> int:
        """The token that stands before a text of which there is nothing before: the start's, or else the end's."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids, with one start token where the model wants it, and no end: what a model is asked goes on. What spells a
        control token is one."""
        ...

    def judge(self, trees: Sequence[Tree]) -> Iterator[Judged]:
        """One for each tree, in order."""
        ...

    def write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str]) -> list[str]:
        """The greedy continuation of each prompt, of so many tokens at most.

        Blanks at its begin aside, it ends soon after the first of the texts `stops`, which may be in it, and before a
        control token, of which the text's end is one: what would follow belongs to another turn.
        """
        ...


def opening(encode: Callable[[str], list[int]], bare: Callable[[str], list[int]]) -> list[int]:
    """What a tokenizer puts before every text, from what it makes of one with (`encode`) and without (`bare`) its own tokens."""
    whole, inner = encode(WORD), bare(WORD)
    places = range(len(whole) - len(inner) + 1)
    return whole[: next((place for place in places if whole[place : place + len(inner)] == inner), 0)]


def opened(opening: list[int], ids: list[int]) -> list[int]:
    """A text's tokens with what stands before every text, once: a chat template that is written into a prompt has it too."""
    return ids if ids[: len(opening)] == opening else opening + ids


RUNNERS = {"gguf": "edgeport.benchmark.llama", "hf": "edgeport.benchmark.folder", "onnx": "edgeport.benchmark.onnx"}
"""Container to the module that runs its models."""


def open_runner(path: Path) -> Runner:
    """Load a model in whatever container it is. Raises SourceError, MissingExtra, TargetMissing for one without its adapter."""
    source = open_model(path)
    check_whole(source, ())
    container = source.container
    if container not in RUNNERS:
        raise NotACheckpoint(f"{path} is a model in {container}, which cannot be asked; there are {', '.join(RUNNERS)}")
    runner: Runner = import_module(RUNNERS[container]).open_runner(path)
    return runner


@dataclass(slots=True)
class Pack:
    """Trees side by side: for every token its id, its place in its own sequence, its tree and its branch."""

    ids: list[int]
    positions: list[int]
    trees: list[int]
    branches: list[int]
    asked: list[list[tuple[int, int, int]]]
    """For each tree (token whose successor is judged, branch, successor), the first of each branch first."""

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Pack:
        pack = cls([], [], [], [], [])
        for number, tree in enumerate(trees):
            pack._add(tree.prompt, 0, number, STEM)
            stem = len(pack.ids) - 1
            asked = [(stem, branch, tokens[0]) for branch, tokens in enumerate(tree.branches)]
            for branch, tokens in enumerate(tree.branches):
                start = len(pack.ids)
                pack._add(tokens[:-1], len(tree.prompt), number, branch)
                asked += [(start + place, branch, token) for place, token in enumerate(tokens[1:])]
            pack.asked.append(asked)
        return pack

    def _add(self, ids: Sequence[int], position: int, tree: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.trees += [tree] * len(ids)
        self.branches += [branch] * len(ids)

    @property
    def wanted(self) -> list[int]:
        """The tokens whose logits are needed, ascending."""
        return sorted({token for asked in self.asked for token, _, _ in asked})

    def judged(self, logits: Any) -> Iterator[Judged]:
        """From `logits(token)`, [vocabulary] for each token of `wanted`."""
        for asked in self.asked:
            stem = asked[0][0]
            first = log_softmax(logits(stem))
            branches = 1 + max(branch for _, branch, _ in asked)
            sums, greedy = [0.0] * branches, [True] * branches
            for token, branch, successor in asked:
                row = first if token == stem else log_softmax(logits(token))
                sums[branch] += float(row[successor])
                greedy[branch] &= int(row.argmax()) == successor
            yield Judged(first, sums, greedy)


def groups(trees: Sequence[Tree], tokens: int, branches: int) -> Iterator[list[Tree]]:
    """Cut into runs of trees that have no more than so many tokens and branches together (a tree that has more: alone)."""
    group: list[Tree] = []
    for tree in trees:
        held = sum(one.tokens for one in group), sum(len(one.branches) for one in group)
        if group and (held[0] + tree.tokens > tokens or held[1] + len(tree.branches) > branches):
            yield group
            group = []
        group.append(tree)
    if group:
        yield group


def together(parts: Sequence[Judged]) -> Judged:
    """One tree's judgement from those of its branches alone."""
    return Judged(parts[0].first, [one.loglikelihoods[0] for one in parts], [one.greedy[0] for one in parts])


def log_softmax(logits: Array) -> Array:
    """float32 [vocabulary]."""
    import numpy as np

    shifted = logits - logits.max()
    result: Array = shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
    return result
