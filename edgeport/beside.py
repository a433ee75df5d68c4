"""Writing the adapter beside an output, and measuring what both together keep of the patch.

The factors of a weight's edits, side by side, are again two factors. They are stored in float32 with the edits' scales
multiplied in, so that what a runtime adds is what a merge would have added, before any rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeport.blocks import decode_rows, encode_rows, ranges
from edgeport.errors import about
from edgeport.manifest import WeightFact
from edgeport.memory import trim_heap
from edgeport.seams import Factors, LowRankEdit, Source
from edgeport.staging import Staging
from edgeport.steps import Step
from edgeport.survival import Survival

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.adapter import Adapter


def write_adapter(adapter: Adapter, source: Source, staging: Staging, facts: Sequence[WeightFact]) -> list[WeightFact]:
    """Fill the adapter, when the model's weights are written; their `facts` with what both keep together."""
    told = {fact.weight: fact for fact in facts}
    for step, factors in zip(adapter.steps, adapter.factors, strict=True):
        with about(factors.target):
            up, down = joined(step)
            store(factors, adapter.alpha, up, down, staging)
            change, retention, error = survey(step, source, staging, up, down).figures()
        name, target = factors.target, step.target
        # a tied head that only the adapter tells from the embedding has no fact yet
        fact = told.get(name) or WeightFact(name, "copy", target.shape, step.origin.format, target.format)
        semantics = "+".join(sorted({edit.semantics for edit in step.edits}))
        trim_heap()
        told[name] = replace(fact, semantics=semantics, change=change, retention=retention, error=error, beside=True)
    return list(told.values())


def joined(step: Step) -> tuple[Tensor, Tensor]:
    """float32 up [rows, rank] and down [rank, columns] of all the step's edits."""
    import torch

    pairs = [edit.factors() for edit in step.edits if isinstance(edit, LowRankEdit)]
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])


def store(factors: Factors, alpha: int, up: Tensor, down: Tensor, staging: Staging) -> None:
    """Write the factors of a change `up @ down`, so that a runtime's alpha / rank gives just that."""
    for weight, values in ((factors.down, down), (factors.up, up * (factors.rank / alpha))):
        spec = weight.parts["data"].spec
        staging.expect(spec.name, spec.nbytes)
        staging.write(spec.name, 0, encode_rows(weight, values)["data"].numpy().data)


def survey(step: Step, source: Source, staging: Staging, up: Tensor, down: Tensor) -> Survival:
    """What is stored of one weight's patch, the adapter's part included."""
    survival = Survival()
    applied = [edit.load("cpu") for edit in step.edits]
    for rows in ranges(step.target, step.rows, step.granule):
        base = exact = decode_rows(source, step.origin, rows)
        for apply in applied:
            exact = apply(rows, exact)
        stored = decode_rows(staging, step.target, rows).addmm_(up[rows.start : rows.stop], down)
        survival.add(base, exact, stored)
    return survival
