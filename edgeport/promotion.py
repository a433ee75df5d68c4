"""Which patched weights go up in precision, so that an output of at most a given size errs least.

A first pass over the base: each weight that would be rounded is rounded in its own format and in the finer ones that its
container has, on some rows spread over it. Its error is the mean square of what rounding changes, relative to that of what
the patch changes. The format that takes most of this error away for each further byte is taken first, as long as it fits
(the greedy rule for the knapsack problem; Dantzig, Operations Research 5, 1957).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from edgeport.blocks import SAMPLED_ROWS, read_tensors, sampled
from edgeport.errors import BudgetTooSmall, ConvertError, about
from edgeport.memory import in_words
from edgeport.patches.edits import ReplaceRows
from edgeport.planning import Plan
from edgeport.run import compute
from edgeport.seams import Promoting, Sink
from edgeport.settling import settled
from edgeport.steps import Step, rounding_of
from edgeport.survival import Survival
from edgeport.tensor import Weight

ALIGNMENT = 32
"""Bytes to which a container may pad a tensor."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """A weight's change of format, and its error before and after: that of rounding relative to the patch's change."""

    weight: str
    origin: str
    format: str
    bytes: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A format that a weight could have."""

    stored: Weight
    error: float
    nbytes: int


def promotions(plan: Plan, most_bytes: int) -> list[Promotion]:
    """What to promote, in the order of the plan. Raises ConvertError, BudgetTooSmall where nothing can be."""
    room = most_bytes - plan.bytes_out
    if room < 0:
        raise BudgetTooSmall(
            f"--max-size {in_words(most_bytes)} is less than the {in_words(plan.bytes_out)} of the output without any promotion"
        )
    ladders = {step.target.name: list(ladder(step, plan)) for step in plan.steps if step.edits and step.target.codec != "plain"}
    ladders = {name: choices for name, choices in ladders.items() if len(choices) > 1}
    if not ladders:
        raise ConvertError("--promote: no patched weight is stored in a format that the container has a finer one for")
    chosen = dict.fromkeys(ladders, 0)
    if not any(affordable(ladders, chosen, inf)):
        raise ConvertError("--promote: no finer format brings any patched weight nearer to the exact port")
    costs = [ladders[name][index].nbytes - ladders[name][0].nbytes for _, name, index in affordable(ladders, chosen, inf)]
    if min(costs) > room:
        raise BudgetTooSmall(
            f"--max-size {in_words(most_bytes)} has no room for a promotion: the least takes {in_words(min(costs))} beside the "
            f"{in_words(plan.bytes_out)} of the output without any"
        )
    while moves := list(affordable(ladders, chosen, room)):
        _, name, index = max(moves)
        room -= ladders[name][index].nbytes - ladders[name][chosen[name]].nbytes
        chosen[name] = index
    return [
        Promotion(name, own.stored.format, best.stored.format, best.nbytes - own.nbytes, own.error, best.error)
        for name, index in chosen.items()
        if index and (own := ladders[name][0]) and (best := ladders[name][index])
    ]


def affordable(
    ladders: Mapping[str, Sequence[Choice]], chosen: Mapping[str, int], room: float
) -> Iterator[tuple[float, str, int]]:
    """Error taken away for each byte, weight, and place on its ladder: every step up that fits and helps."""
    for name, choices in ladders.items():
        now = choices[chosen[name]]
        for index in range(chosen[name] + 1, len(choices)):
            more, less = choices[index].nbytes - now.nbytes, now.error - choices[index].error
            if 0 < more <= room and less > 0:
                yield less / more, name, index


def ladder(step: Step, plan: Plan) -> Iterator[Choice]:
    """The step's own format, and the finer ones that its container has for it."""
    with about(step.target.name):
        for stored in (step.target, *finer(plan.sink, step.target)):
            rule = plan.rule.without_inputs
            rounding = rounding_of(step.origin, stored, step.edits, rule)
            tried = settled(replace(step, target=stored, rounding=rounding), plan.source, rule)
            yield Choice(stored, error(tried, plan), -(-stored.nbytes // ALIGNMENT) * ALIGNMENT)


def of_tokens(step: Step) -> list[range]:
    """The granules of the rows that a patch of single rows has, as many as are sampled of a whole weight."""
    size, rows = step.granule, step.origin.rows
    indices = [index for edit in step.edits if isinstance(edit, ReplaceRows) for index in edit.indices if index < rows]
    starts = sorted({index // size * size for index in indices})[: max(SAMPLED_ROWS // size, 1)]
    return [range(start, min(start + size, rows)) for start in starts]


def finer(sink: Sink, weight: Weight) -> Sequence[Weight]:
    return sink.finer(weight) if isinstance(sink, Promoting) else ()


def error(step: Step, plan: Plan) -> float:
    """Mean square of what rounding changes on the sampled rows, relative to what the patch changes there."""
    applied = [edit.load("cpu") for edit in step.edits]
    importance = (plan.sink.importance or {}).get(step.target.name)
    survival = Survival()
    for rows in (*sampled(step.origin.rows, step.granule), *of_tokens(step)):
        parts = read_tensors(plan.source, step.origin, rows)
        compute(step, rows, parts, applied, importance, None, survival)
    return survival.noise()
