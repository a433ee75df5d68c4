"""What `auto` takes for plain numbers on their way to a quantized format: were they ever quantized before?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from edgeport.blocks import arrange, decode_parts, decode_rows, encode_rows
from edgeport.errors import about
from edgeport.grid import Gridded
from edgeport.registry import codec
from edgeport.rounding import AUTO, NEAREST
from edgeport.seams import Source
from edgeport.steps import Rule, Step

if TYPE_CHECKING:
    from torch import Tensor

PROBE_ROWS = 32
NEAR_GRID = 0.125
"""Steps from the grid, on average, below which nearest rounding would undo a small change."""
UNFAIR = 0.4
"""Of the patch, more or less than which nearest rounding may not keep: blocks that clip their ends keep less, too (the demo's
patch in ONNX int4: from 0.71 of it on, in the rows that are tried)."""


def settled(step: Step, source: Source, rule: Rule) -> Step:
    """The step with its rule decided by the first rows: nearest, where plain numbers were never quantized."""
    if step.rounding != AUTO:
        return step
    with about(step.target.name):
        rows = range(min(step.granule * -(-PROBE_ROWS // step.granule), step.origin.rows))
        base = decode_rows(source, step.origin, rows)
        never = grid_distance(step, base) >= NEAR_GRID and nearest_is_fair(step, rows, base)
    return replace(step, rounding=NEAREST if never else rule.on_grid(step.target))


def grid_distance(step: Step, base: Tensor) -> float:
    """Of the base's first rows from the grid that encoding finds for them: in steps, on average.

    Numbers that were quantized in that format lie on it, and a small drift since then leaves them near it; numbers that were
    never quantized are a quarter of a step from it.
    """
    from torch import minimum

    owner = cast(Gridded, codec(step.target.codec))
    grid = owner.grid(step.target, encode_rows(step.target, base))
    _, _, fraction = grid.bracket(arrange(base, step.target))
    return float(minimum(fraction, 1 - fraction).mean())


def nearest_is_fair(step: Step, rows: range, base: Tensor) -> bool:
    """Whether rounding to nearest keeps the patch in the base's first rows, as far as chance lets one tell.

    Numbers of a coarser grid lie at the same few places between two codes each, and those of a place all round alike: Q4_1's
    keep 1.5 times a patch in Q5_1.
    """
    exact = base
    for edit in step.edits:
        exact = edit.load("cpu")(rows, exact)
    change = (exact - base).double()
    whole = float(change.square().sum())
    stored = decode_parts(step.target, encode_rows(step.target, exact)).double()
    kept = float(((stored - base) * change).sum()) / (whole or 1.0)
    chance = float(((stored - exact) * change).square().sum()) ** 0.5 / (whole or 1.0)
    return not whole or abs(kept - 1) <= max(UNFAIR, 4 * chance)
