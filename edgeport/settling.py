"""What only the numbers can tell a plan: were they ever quantized before, and does the patch leave the grid they lie on?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from edgeport.blocks import arrange, check_finite, decode_parts, encode_rows, read_tensors
from edgeport.errors import about
from edgeport.grid import Gridded
from edgeport.registry import codec, roundings
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
CLIPPED = 0.5
"""Of the error that nearest leaves on the base's grid: a grid made of the patched values takes its place where it leaves less."""


def settled(step: Step, source: Source, rule: Rule) -> Step:
    """The step with its rule, and the grid that this works on, decided by the first rows."""
    keeps_grid = rule.wanted == AUTO and bool(step.edits) and step.on_own_grid
    if step.rounding != AUTO and not keeps_grid:
        return step
    with about(step.target.name):
        rows = range(min(step.granule * -(-PROBE_ROWS // step.granule), step.origin.rows))
        parts = read_tensors(source, step.origin, rows)
        base = decode_parts(step.origin, parts)
        exact = base
        for edit in step.edits:
            exact = edit.load("cpu")(rows, exact)
        check_finite(base, exact, rows)
        if keeps_grid:
            anew = replace(step, fresh=leaves_grid(step, parts, exact))
            return anew.without_inputs if anew.fresh and not roundings()[step.rounding].calibrated else anew
        if grid_distance(step, base) < NEAR_GRID or not nearest_is_fair(step, base, exact):
            return replace(step, rounding=rule.on_grid(step.target) if step.edits else NEAREST)
    chosen = rule.off_grid(step.target)
    return replace(step, rounding=chosen, fresh=chosen != NEAREST)


def leaves_grid(step: Step, parts: Mapping[str, Tensor], exact: Tensor) -> bool:
    """Whether the patched first rows reach so far beyond the ends of their blocks, as `parts` spell them, that other scales are
    worth it.

    As a patch as large as its weights does. An ordinary one never does: on the grid nearest rounding loses no more than the
    patch, and with other scales all other values would have to be rounded anew.
    """
    if codec(step.target.codec).formats[step.target.format] != "rw":
        return False
    grid = cast(Gridded, codec(step.target.codec)).grid(step.target, parts)
    wanted = arrange(exact, step.target)
    cut_off = float((grid.values(grid.nearest(wanted)) - wanted).double().square().sum())
    anew = float((decode_parts(step.target, encode_rows(step.target, exact)) - exact).double().square().sum())
    return anew < CLIPPED * cut_off


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


def nearest_is_fair(step: Step, base: Tensor, exact: Tensor) -> bool:
    """Whether rounding to nearest keeps the patch in the base's first rows, as far as chance lets one tell.

    Numbers of a coarser grid lie at the same few places between two codes each, and those of a place all round alike: Q4_1's
    keep 1.5 times a patch in Q5_1.
    """
    change = (exact - base).double()
    whole = float(change.square().sum())
    stored = decode_parts(step.target, encode_rows(step.target, exact)).double()
    kept = float(((stored - base) * change).sum()) / (whole or 1.0)
    chance = float(((stored - exact) * change).square().sum()) ** 0.5 / (whole or 1.0)
    return not whole or abs(kept - 1) <= max(UNFAIR, 4 * chance)
