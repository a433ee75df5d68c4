"""Writing the adapter beside an output, and measuring what both together keep of the patch.

A sidecar holds the patch itself: the factors of a weight's edits, side by side, are again two factors. A residual holds
the best low-rank approximation of what rounding lost, R = exact - stored, with each column weighed by the root mean square
of its input where an importance matrix is at hand (LQER, arXiv 2402.02446). Its leading directions are those that `lowrank`
finds. Both are stored in float32 with all scales multiplied in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeport.adapter import SIDECAR
from edgeport.blocks import check_finite, decode_rows, encode_rows, known, padded, ranges
from edgeport.errors import about
from edgeport.lowrank import OVERSAMPLING, row_space
from edgeport.manifest import WeightFact
from edgeport.memory import trim_heap
from edgeport.seams import Factors, LowRankEdit, Source
from edgeport.staging import Staging
from edgeport.steps import Step
from edgeport.survival import Survival

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.adapter import Adapter

LEAST_SCALE = 0.01
"""Of the mean scale: columns whose input is next to nothing are not to be divided by it."""


def write_adapter(
    adapter: Adapter, source: Source, staging: Staging, facts: Sequence[WeightFact], importance: Mapping[str, Tensor] | None
) -> list[WeightFact]:
    """Fill the adapter, when the model's weights are written; their `facts` with what both keep together."""
    told = {fact.weight: fact for fact in facts}
    for step, factors in zip(adapter.steps, adapter.factors, strict=True):
        name, target = factors.target, step.target
        with about(name):
            if adapter.kind == SIDECAR:
                up, down = joined(step)
            else:
                scale = column_scale((importance or {}).get(name), target.columns)
                leading = directions(step, factors.rank, scale, source, staging)
                up, down = fitted(step, (leading * scale).T, source, staging), leading / scale
            store(factors, adapter.alpha, up, down, staging)
            figures = survey(step, source, staging, up, down).figures()
        # a tied head that only the adapter tells from the embedding has no fact yet
        fact = told.get(name) or WeightFact(name, "copy", target.shape, step.origin.format, target.format)
        semantics = "+".join(sorted({edit.semantics for edit in step.edits}))
        told[name] = replace(fact, semantics=semantics, **figures, beside=True)
        trim_heap()
    return list(told.values())


def joined(step: Step) -> tuple[Tensor, Tensor]:
    """float32 up [rows, rank] and down [rank, columns] of all the step's low-rank edits."""
    import torch

    pairs = [edit.factors() for edit in step.edits if isinstance(edit, LowRankEdit)]
    return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])


def directions(step: Step, rank: int, scale: Tensor, source: Source, staging: Staging) -> Tensor:
    """float32 [rank, columns], orthonormal: the leading right singular vectors of what rounding lost times `scale`."""

    def lost() -> Iterator[tuple[range, Tensor]]:
        for rows, _, exact, stored in blocks(step, source, staging):
            yield rows, exact.sub_(stored).mul_(scale)

    width = min(rank + OVERSAMPLING, step.target.rows, step.target.columns)
    return row_space(lost, step.target.columns, width, f"residual {step.draws}")[:rank]


def column_scale(importance: Tensor | None, columns: int) -> Tensor:
    """float32 [columns]: the root mean square of each input, away from zero; ones where nothing is known."""
    import torch

    if importance is None:
        return torch.ones(columns)
    scale = importance.float().sqrt()
    return scale.clamp(min=max(float(scale.mean()) * LEAST_SCALE, 1e-12))


def blocks(step: Step, source: Source, staging: Staging) -> Iterator[tuple[range, Tensor, Tensor, Tensor]]:
    """Rows, and float32 base, exact result and stored result of them; the last two are the caller's to change.

    Raises NonFiniteResult.
    """
    applied = [edit.load("cpu") for edit in step.edits]
    for rows in ranges(step.target, step.rows, step.granule):
        base = exact = padded(decode_rows(source, step.origin, known(step.origin, rows)), rows)
        for apply in applied:
            exact = apply(rows, exact)
        check_finite(base, exact, rows)
        yield rows, base, exact, decode_rows(staging, step.target, rows)


def fitted(step: Step, test: Tensor, source: Source, staging: Staging) -> Tensor:
    """float32 [rows, rank]: what rounding lost, times `test` [columns, rank]."""
    import torch

    return torch.cat([exact.sub_(stored) @ test for _, _, exact, stored in blocks(step, source, staging)])


def store(factors: Factors, alpha: int, up: Tensor, down: Tensor, staging: Staging) -> None:
    """Write the factors of a change `up @ down`, so that a runtime's alpha / rank gives just that."""
    for weight, values in ((factors.down, down), (factors.up, up * (factors.rank / alpha))):
        spec = weight.parts["data"].spec
        staging.expect(spec.name, spec.nbytes)
        staging.write(spec.name, 0, encode_rows(weight, values)["data"].numpy().data)


def survey(step: Step, source: Source, staging: Staging, up: Tensor, down: Tensor) -> Survival:
    """What is stored of one weight's patch, the adapter's part included, in the rows that the base has."""
    survival = Survival()
    for rows, base, exact, stored in blocks(step, source, staging):
        if old := len(known(step.origin, rows)):
            survival.add(base[:old], exact[:old], stored.addmm_(up[rows.start : rows.stop], down)[:old])
    return survival
