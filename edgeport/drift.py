"""How far a new base has moved from the old one, against what a patch changes: sums over rows of weights.

W_old is the base that the patch was made on, W the new one, E = W - W_old the drift, D the patch's change of W:

    change   |D| / |W|          drift   |E| / |W_old|          cosine   <W, W_old> / |W| |W_old|
    read     |E V| / |D|, V an orthonormal basis of the input directions that a low-rank patch reads: the drift that it meets
    written  |U^T E| / |D|, U one of the output directions that it writes; only from all rows
    along    <E, D> / |D|^2: 1 where the new base has the patch already, -1 where it has moved the other way
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from typing import TYPE_CHECKING

from edgeport.blocks import check_finite, decode_rows, ranges, sampled, within
from edgeport.errors import ShapeMismatch, TargetMissing, about
from edgeport.hub import called
from edgeport.memory import trim_heap
from edgeport.pair import Both, block_of
from edgeport.patches.names import find
from edgeport.seams import Edit, LowRankEdit, Source
from edgeport.steps import BLOCK_ELEMENTS
from edgeport.survival import inner
from edgeport.tensor import Weight
from edgeport.ties import is_end

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 4096
"""Rows of a factor whose products are taken in float64 at once."""
NOTHING = 1e-10
"""Of the largest squared singular value: a direction below it is rounding's."""

Item = tuple[str, Weight, Sequence[Edit]]
"""Of a weight that is looked at: its name, how the new base stores it, and the patches' edits of it."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over all numbers that were looked at; the figures of the module's docstring are their ratios."""

    old: float = 0.0
    new: float = 0.0
    product: float = 0.0
    drift: float = 0.0
    patch: float = 0.0
    read: float = 0.0
    """|E V|^2"""
    written: float = 0.0
    """|U^T E|^2"""
    low: float = 0.0
    """|D|^2 of the weights that have a V."""
    wide: float = 0.0
    """|D|^2 of those of them that all rows were seen of."""
    crossing: float = 0.0
    """<E, D>"""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def figures(self) -> dict[str, float | None]:
        return {
            "change": ratio(sqrt(self.patch), sqrt(self.new)), "drift": ratio(sqrt(self.drift), sqrt(self.old)),
            "cosine": ratio(self.product, sqrt(self.old * self.new)), "read": ratio(sqrt(self.read), sqrt(self.low)),
            "written": ratio(sqrt(self.written), sqrt(self.wide)), "along": ratio(self.crossing, self.patch if self.old else 0),
        }  # fmt: skip


def ratio(above: float, below: float) -> float | None:
    return round(above / below, 6) if below else None


def compared(new: Source, old: Source | None, items: Iterable[Item], whole: bool) -> Iterator[tuple[str, Sums]]:
    """The sums of each item, over all its rows or over a sample; without the old base, of change alone.

    Raises TargetMissing, ShapeMismatch, NonFiniteResult.
    """
    for name, weight, edits in items:
        with about(name):
            yield name, sums_of(name, weight, new, old, edits, whole)
        trim_heap()


def sums_of(name: str, weight: Weight, new: Source, old: Source | None, edits: Sequence[Edit], whole: bool) -> Sums:
    """Over the rows that both bases have."""
    both = Both(name, in_old(name, weight, new, old) if old else weight, weight)
    common, columns, granule = min(both.old.rows, weight.rows), max(weight.columns, 1), both.granule
    size = max(BLOCK_ELEMENTS // columns // granule, 1) * granule
    low_rank = factors(edits)
    applied = [] if low_rank else [edit.load("cpu") for edit in edits]
    total = Sums()
    projected: Tensor | None = None
    for rows in ranges(weight, size, granule) if whole else sampled(common, granule):
        rows = within(rows, common)
        if not rows:
            continue
        before, after = block_of(both, old, new, rows) if old else (None, decode_rows(new, weight, rows))
        exact = after
        if low_rank:
            exact = after + low_rank.up[rows.start : rows.stop] @ low_rank.down
        for apply in applied:
            exact = apply(rows, exact)
        check_finite(after, exact, rows)
        patch = exact - after
        total += Sums(new=square(after), patch=square(patch))
        if before is None:
            continue
        drift = after - before
        total += Sums(
            old=square(before), product=float(inner(before, after)), drift=square(drift), crossing=float(inner(drift, patch))
        )
        if low_rank:
            total += Sums(read=square(drift @ low_rank.down.T @ low_rank.inputs), low=square(patch))
        if low_rank and whole:
            part = low_rank.up[rows.start : rows.stop].T @ drift
            projected = part if projected is None else projected.add_(part)
    if low_rank and projected is not None:
        total += Sums(written=square(low_rank.outputs.T @ projected), wide=total.low)
    return total


def in_old(name: str, weight: Weight, new: Source, old: Source) -> Weight:
    """The old base's weight of that name. Raises TargetMissing, ShapeMismatch."""
    before = find(name, old.weights)
    if before is None:
        raise TargetMissing(f"{called(new.path)} has it and {called(old.path)} does not; they are not of one architecture")
    if before.shape[1:] != weight.shape[1:] or (before.shape != weight.shape and not is_end(name)):
        raise ShapeMismatch(
            f"it has shape {list(before.shape)} in {called(old.path)} and {list(weight.shape)} in {called(new.path)}; "
            "both must be of the same architecture and size"
        )
    return before


def square(values: Tensor) -> float:
    return float(inner(values, values))


@dataclass(frozen=True, slots=True)
class Factors:
    """What all edits of a weight add together: float32 up [rows, rank] times down [rank, columns]."""

    up: Tensor
    down: Tensor
    outputs: Tensor
    """[rank, directions]: with it `up` becomes an orthonormal basis of the directions that are written."""
    inputs: Tensor
    """Likewise of those that are read, of the turned `down`."""


def factors(edits: Sequence[Edit]) -> Factors | None:
    """None where an edit is whole."""
    import torch

    pairs = [edit.factors() for edit in edits if isinstance(edit, LowRankEdit)]
    if not pairs or len(pairs) < len(edits):
        return None
    up, down = pairs[0] if len(pairs) == 1 else (torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs]))
    return Factors(up, down, orthonormal(up), orthonormal(down.T))


def orthonormal(factor: Tensor) -> Tensor:
    """W [rank, directions] with which the columns of `factor` [n, rank] @ W are orthonormal and span what it does.

    By the eigenvectors of its products, so that no second matrix of its size is held.
    """
    import torch

    products = torch.zeros(factor.shape[1], factor.shape[1], dtype=torch.float64)
    for piece in torch.split(factor, PIECE):
        products += piece.double().T @ piece.double()
    values, vectors = torch.linalg.eigh(products)
    held = values > values[-1] * NOTHING
    directions: Tensor = (vectors[:, held] / values[held].sqrt()).float()
    return directions
