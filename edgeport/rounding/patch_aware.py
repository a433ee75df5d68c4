"""Rounding on the grid so that the layer's outputs, and not its weights, come out as the exact port's.

Each value takes one of the two codes around it. From unbiased random choices, coordinate descent goes over the columns
and gives each value the one of its two errors that leaves less, for its row of errors e = stored - exact, of

    mean over the tokens of (e . x + w . d)^2 + damping * |e|^2,

x being what the layer is given on a text that need not be about the patch, in the port that is being made, and d how that
differs from the exact port's: what the roundings before have done to the output of the exact row w is taken back. Beside
the tokens x are the directions that the patch reads, which do not drift. The damping, a share of the inputs' mean square,
holds what so few tokens say nothing of. Random choices to begin with, since they are unbiased: a descent from no error
ends in errors that undo a part of the patch wherever the text says little. Values that lie on no grid begin at the nearest codes,
which know nothing of the patch.

Where a format keeps a scale (and a minimum) for each group of columns, every sweep also gives it the value that leaves
least of the same, as far as its type can say it.

The objective is that of Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020, arXiv
2004.10568), and of Frantar et al., GPTQ (ICLR 2023, arXiv 2210.17323), whose lazy batches of columns are used; descent
over both neighbours of every value as in Behdin et al., QuantEase (arXiv 2309.01885); the exact port's outputs as the aim, on the
port's inputs, as in Li et al., GPTAQ (ICML 2025, arXiv 2504.02692); codes and scales by turns, the latter by least squares,
as in Zhang et al., LQ-Nets (ECCV 2018, arXiv 1807.10029).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeport.grid import Grid, said
from edgeport.rounding import on_grid
from edgeport.rounding.nearest import rounding as nearest
from edgeport.rounding.stochastic import rounding as chance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgeport.rounding import Inputs

DAMPING = 0.1
"""Of the inputs' mean square. Less of it lets errors along the patch grow, more of it draws towards the old codes."""
SWEEPS = 3
COLUMNS = 128
"""Columns between two updates of the outputs on all tokens, as in GPTQ's lazy batches."""
NARROW = 8
"""Columns between two updates of the rest of such a batch: one matrix product then does for many outer ones."""
RIDGE = 1e-3
"""Of what a scale weighs by itself, in favour of the one that is there."""


class PatchAware:
    name = "patch-aware"
    calibrated = True
    rescales = True
    pieces = 1

    def scratch(self, columns: int, tokens: int) -> float:
        # the codes and what draws them; the outputs on every token; a batch of columns in 13 float32 matrices
        return 2.0 + chance.scratch(columns, tokens) / chance.pieces + (4.0 * tokens + 52.0 * COLUMNS) / max(columns, 1)

    def held(self, columns: int, tokens: int) -> int:
        # the moments of all batches; of one batch the inputs, their transpose's product and the drift, in float32
        return 4 * COLUMNS * (columns + COLUMNS + 3 * tokens)

    def codes(self, grid: Grid, target: Tensor, draws: str | None, first: int, inputs: Inputs | None) -> Tensor:
        import torch

        assert inputs is not None
        rows, columns, share = len(target), target.shape[1], 1 / len(inputs.rows)
        dtype, damping = dtype_for(target.device), DAMPING * inputs.mean_square
        if not inputs.moments:
            inputs.moments.extend(moments_of(inputs.rows, dtype, damping))
        batches = [slice(start, min(start + COLUMNS, columns)) for start in range(0, columns, COLUMNS)]
        codes = on_grid(nearest if draws is None else chance, grid, target, draws, first)
        # divided by the tokens, as the moments are
        outputs = torch.zeros(len(inputs.rows), rows, dtype=dtype, device=target.device)
        for some in batches:
            error = error_of(grid.of_columns(some), codes[:, some], target[:, some])
            outputs.addmm_(inputs.rows[:, some].to(dtype), error.to(dtype), alpha=share)
            if inputs.drift:
                drift = inputs.drift(some).to(dtype)
                outputs[: drift.shape[1]].addmm_(drift.T, target[:, some].T.to(dtype), alpha=share)
        for _ in range(SWEEPS):
            for some, moments in zip(batches, inputs.moments, strict=True):
                part, exact, seen = grid.of_columns(some), target[:, some], inputs.rows[:, some].to(dtype)
                before = error_of(part, codes[:, some], exact)
                slope = (seen.T @ outputs).float().add_(before, alpha=damping)
                codes[:, some], change = descended(part, exact, before, slope.clone(), moments)
                if part.scales is not None:
                    slope.addmm_(moments, change)
                    refit(part, codes[:, some], exact, slope, moments)
                    change = error_of(part, codes[:, some], exact).sub_(before)
                outputs.addmm_(seen, change.to(dtype), alpha=share)
        return codes


def error_of(grid: Grid, codes: Tensor, exact: Tensor) -> Tensor:
    """float32 [columns, rows]: what the codes (uint8 [rows, columns]) stand for, less what they should."""
    return grid.values(codes).sub_(exact).T.contiguous()


def descended(grid: Grid, exact: Tensor, before: Tensor, slope: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep over a batch of columns: its codes (uint8 [rows, columns]), and the change of errors (float32 [columns, rows]).

    `before` [columns, rows]: the errors as they are. `slope` and `moments` are `descend`'s.
    """
    import torch

    low, high, _ = grid.bracket(exact)
    below, above = error_of(grid, low, exact), error_of(grid, high, exact)
    middle, distance = (below + above).mul_(0.5), (above - below).mul_(0.5)
    half = middle - before
    descend(slope, half, distance.abs(), moments)
    # a negative step turns the two around
    return torch.where(((half < 0) == (distance >= 0)).T, high, low), middle.sub_(half).sub_(before)


def moments_of(rows: Tensor, dtype: torch.dtype, damping: float) -> Iterator[Tensor]:
    """float32 [COLUMNS, COLUMNS] (the last fewer): of each batch of columns, damped."""
    for start in range(0, rows.shape[1], COLUMNS):
        seen = rows[:, start : start + COLUMNS].to(dtype)
        moments = (seen.T @ seen).float().div_(len(rows))
        moments.diagonal().add_(damping)
        yield moments


def descend(slope: Tensor, half: Tensor, distance: Tensor, moments: Tensor) -> None:
    """Make `half` [columns, rows], one column after the other, distance or -distance, with which middle - half leaves less.

    Before, middle - half is the error as it is, whatever that may be. `moments`: [columns, columns]. `slope`
    [columns, rows], half the objective's gradient at it, is followed and lost.
    """
    import torch

    # what a column's own value and those of the columns before it have brought in is taken out, and then brought in anew
    slope.addmm_(moments.tril(), half)
    for start in range(0, len(slope), NARROW):
        stop = start + NARROW
        narrow, following = slope[start:stop], moments[start:stop, start:stop].triu(1)
        places = zip(half[start:stop].unbind(), distance[start:stop].unbind(), narrow.unbind(), following.unbind(), strict=True)
        for value, size, place, effect in places:
            torch.copysign(size, place, out=value)
            narrow.addr_(effect, value, alpha=-1)
        slope[stop:].addmm_(moments[stop:, start:stop], half[start:stop], alpha=-1)


def refit(grid: Grid, codes: Tensor, exact: Tensor, slope: Tensor, moments: Tensor) -> None:
    """Give each group of the grid, one after the other, the step (and the offset, if it shifts) that leaves least.

    With what a group's step makes of its codes u and the errors e, the least of (e + a u + b) under the moments is where a
    and b solve two linear equations; b only of a grid that shifts. What can be stored of that is kept in the rows in which
    it leaves less than there was. `codes` uint8 and `exact` [rows, columns]; `slope` [columns, rows], half the objective's
    gradient as things are, follows.
    """
    import torch

    size = grid.group
    for place in range(grid.step.shape[1]):
        some = slice(place * size, (place + 1) * size)
        group, within, wish = grid.of_columns(some), moments[some, some], slope[some]
        assert group.scales is not None
        error = error_of(group, codes[:, some], exact[:, some])
        step, offset = group.step.clone(), group.offset.clone()
        made = exact[:, some].T + error
        if group.shifts is not None:
            made -= offset.T
        felt = within @ made
        weight, pull = (made * felt).sum(0).mul_(1 + RIDGE), (made * wish).sum(0)
        if group.shifts is not None:
            # by elimination of b, which every value of the group takes
            flat, tilt = within.sum() * (1 + RIDGE), felt.sum(0)
            weight -= tilt.square() / flat
            pull -= tilt * wish.sum(0) / flat
        found = step * (1 - pull / weight)[:, None]
        # a step of another sign, or of 0, would be another grid, with nowhere to go from there
        group.step.copy_(said(torch.where(found.isfinite() & (found * step > 0), found, step), group.scales))
        if group.shifts is None:
            group.offset.copy_(torch.where(step == 0, offset, offset * (group.step / step)))
        else:
            grown = (group.step / step - 1).nan_to_num_(0.0)[:, 0]
            group.offset.copy_(said(offset - ((wish.sum(0) + tilt * grown) / flat)[:, None], group.shifts))
        change = error_of(group, codes[:, some], exact[:, some]).sub_(error)
        worse = ~((change * (2 * wish + within @ change)).sum(0) < 0)[:, None]
        for values, before, how in ((group.step, step, group.scales), (group.offset, offset, group.shifts)):
            values.copy_(torch.where(worse, before, values))
            if isinstance(how, Grid):
                said(values, how)
        slope.addmm_(moments[:, some], change.masked_fill_(worse.T, 0.0))


def dtype_for(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it by itself, which is several times as fast; else float32."""
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(False)
    else:
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if native else torch.float32


rounding = PatchAware()
