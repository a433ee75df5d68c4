"""Rounding on the grid as it stands so that the layer's outputs, and not its weights, come out as the exact port's.

Each value keeps one of the two codes around it. From unbiased random choices, coordinate descent goes over the columns
and gives each value the one of its two errors that leaves less, for its row of errors e = stored - exact, of

    mean over the tokens of (e . x)^2 + damping * |e|^2,

x being what the layer is given on a text that need not be about the patch, and the directions that the patch reads. The
damping, a share of the inputs' mean square, holds what so few tokens say nothing of. The objective is that of
Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020, arXiv 2004.10568), and of
Frantar et al., GPTQ (ICLR 2023, arXiv 2210.17323), whose lazy batches of columns are used; descent over both neighbours
of every value as in Behdin et al., QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeport.rounding.draws import uniform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgeport.grid import Grid
    from edgeport.rounding import Inputs

DAMPING = 0.03
"""Of the inputs' mean square. Less of it lets errors along the patch grow, more of it draws towards the old codes."""
SWEEPS = 2
COLUMNS = 128
"""Columns between two updates of the outputs on all tokens, as in GPTQ's lazy batches."""
PIECES = 8
"""Of the rows, when the codes around them are found, so that temporaries stay small."""
NARROW = 8
"""Columns between two updates of the rest of such a batch: one matrix product then does for many outer ones."""


class PatchAware:
    name = "patch-aware"
    calibrated = True
    pieces = 1

    def scratch(self, columns: int, tokens: int) -> float:
        # three float32 matrices, three of bytes; the outputs on every token; six batches of columns
        return 15.0 + (4.0 * tokens + 24.0 * COLUMNS) / max(columns, 1)

    def codes(self, grid: Grid, target: Tensor, draws: str, first: int, inputs: Inputs | None) -> Tensor:
        import torch

        assert inputs is not None
        less, more, middle, half = two_errors(grid, target, draws, first)
        dtype, damping = dtype_for(target.device), DAMPING * inputs.mean_square
        if not inputs.moments:
            inputs.moments.extend(moments_of(inputs.rows, dtype, damping))
        batches = [slice(start, start + COLUMNS) for start in range(0, target.shape[1], COLUMNS)]
        # divided by the tokens, as the moments are
        outputs = torch.zeros(len(inputs.rows), len(target), dtype=dtype, device=target.device)
        for some in batches:
            outputs.addmm_(inputs.rows[:, some].to(dtype), (middle[some] - half[some]).to(dtype), alpha=1 / len(inputs.rows))
        for _ in range(SWEEPS):
            for some, moments in zip(batches, inputs.moments, strict=True):
                seen, before = inputs.rows[:, some].to(dtype), half[some].clone()
                slope = (seen.T @ outputs).float().add_(middle[some], alpha=damping).sub_(before, alpha=damping)
                descend(slope, half[some], moments)
                outputs.addmm_(seen, before.sub_(half[some]).to(dtype), alpha=1 / len(inputs.rows))
        return torch.where(half.T < 0, more, less)


def two_errors(grid: Grid, target: Tensor, draws: str, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two codes around every value, by value (uint8 [rows, columns] each), and their errors: middle - half is that of
    the one that an unbiased draw chooses, and middle + half the other's (float32 [columns, rows] each).
    """
    import torch

    rows, columns = target.shape
    less, more = torch.empty_like(grid.codes), torch.empty_like(grid.codes)
    middle, half = target.new_empty(columns, rows), target.new_empty(columns, rows)
    size = -(-rows // PIECES) or 1
    for some in (slice(start, min(start + size, rows)) for start in range(0, rows, size)):
        part = grid.of_rows(some)
        low, high, fraction = part.bracket(target[some])
        up = uniform(draws, first + some.start, len(low), columns, target.device) < fraction
        below, above = part.values(low), part.values(high)
        downward = above < below
        less[some], more[some] = torch.where(downward, high, low), torch.where(downward, low, high)
        distance = above.sub_(below).mul_(0.5)
        middle[:, some] = below.sub_(target[some]).add_(distance).T
        half[:, some] = torch.where(up, -distance, distance).T
    return less, more, middle, half


def moments_of(rows: Tensor, dtype: torch.dtype, damping: float) -> Iterator[Tensor]:
    """float32 [COLUMNS, COLUMNS] (the last fewer): of each batch of columns, damped."""
    for start in range(0, rows.shape[1], COLUMNS):
        seen = rows[:, start : start + COLUMNS].to(dtype)
        moments = (seen.T @ seen).float().div_(len(rows))
        moments.diagonal().add_(damping)
        yield moments


def descend(slope: Tensor, half: Tensor, moments: Tensor) -> None:
    """Give `half` [columns, rows], one column after the other, the sign with which middle - half leaves less.

    `moments`: [columns, columns]. `slope` [columns, rows], half the objective's gradient, is followed and lost.
    """
    import torch

    # what a column's own value and those of the columns before it have brought in is taken out, and then brought in anew
    slope.addmm_(moments.tril(), half)
    half.abs_()
    for start in range(0, len(slope), NARROW):
        stop = start + NARROW
        narrow, following = slope[start:stop], moments[start:stop, start:stop].triu(1)
        for value, place, effect in zip(half[start:stop].unbind(), narrow.unbind(), following.unbind(), strict=True):
            torch.copysign(value, place, out=value)
            narrow.addr_(effect, value, alpha=-1)
        slope[stop:].addmm_(moments[stop:, start:stop], half[start:stop], alpha=-1)


def dtype_for(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it by itself, which is several times as fast; else float32."""
    import torch

    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


rounding = PatchAware()
