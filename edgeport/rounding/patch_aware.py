"""Rounding on the grid as it stands so that the layer's outputs, and not its weights, come out as the exact port's.

Each value keeps one of the two codes around it. From unbiased random choices, coordinate descent switches a value to its
other code wherever that lowers, for its row of errors e = stored - exact,

    mean over the tokens of (e . x)^2 + damping * |e|^2,

x being what the layer is given on a text that need not be about the patch, and the directions that the patch reads. The
damping, a share of the inputs' mean square, holds what so few tokens say nothing of. The objective is that of
Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization (ICML 2020, arXiv 2004.10568), and of
Frantar et al., GPTQ (ICLR 2023, arXiv 2210.17323); descent over both neighbours of every value as in
Behdin et al., QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.rounding.draws import uniform

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid

DAMPING = 0.03
"""Of the inputs' mean square. Less of it lets errors along the patch grow, more of it draws towards the old codes."""
SWEEPS = 2
COLUMNS = 64
"""Columns between two updates of the whole row's outputs, as in GPTQ's lazy batches."""


class PatchAware:
    name = "patch-aware"
    calibrated = True
    pieces = 1

    def scratch(self, columns: int, tokens: int) -> float:
        # five float32 matrices, three of bytes; the outputs on every token; a batch of the inputs
        return 24.0 + 4.0 * tokens / max(columns, 1)

    def codes(self, grid: Grid, target: Tensor, draws: str, first: int, inputs: Tensor | None) -> Tensor:
        import torch

        assert inputs is not None
        low, high, fraction = grid.bracket(target)
        up = uniform(draws, first, len(target), target.shape[1], target.device) < fraction
        del fraction
        span = grid.values(high).sub_(grid.values(low))
        error = grid.values(torch.where(up, high, low)).sub_(target)
        tokens = len(inputs)
        damping = DAMPING * mean_square(inputs)
        batches = [slice(start, start + COLUMNS) for start in range(0, target.shape[1], COLUMNS)]
        outputs = error.new_zeros(len(error), tokens)
        for some in batches:
            outputs.addmm_(error[:, some], inputs[:, some].float().T)
        for some in batches * SWEEPS:
            seen = inputs[:, some].float()
            moments = seen.T @ seen / tokens
            moments.diagonal().add_(damping)
            # transposed, so that a column's values lie together
            slope = (outputs @ seen / tokens).add_(error[:, some], alpha=damping).T.contiguous()
            chosen = up[:, some].T.contiguous()
            moved = descend(chosen, span[:, some].T.contiguous(), slope, moments)
            up[:, some] = chosen.T
            error[:, some] += moved.T
            outputs.addmm_(moved.T, seen.T)
        return torch.where(up, high, low)


def descend(up: Tensor, span: Tensor, slope: Tensor, moments: Tensor) -> Tensor:
    """Switch, one column after the other, each value for which that lowers its row's objective; returns the change.

    All but `moments` [columns, columns] are [columns, rows]; `up` is changed, and `slope`, half the objective's
    gradient, is followed.
    """
    import torch

    moved = torch.empty_like(span)
    for column, curvature in enumerate(moments.diagonal().tolist()):
        change = torch.where(up[column], -span[column], span[column])
        better = change * (2 * slope[column] + curvature * change) < 0
        up[column] ^= better
        moved[column] = change.mul_(better)
        slope[column + 1 :].addr_(moments[column, column + 1 :], change)
    return moved


def mean_square(inputs: Tensor) -> float:
    """Over all tokens and columns, a part of the columns in float32 at a time."""
    total = sum(float(inputs[:, start : start + COLUMNS].float().square().sum()) for start in range(0, inputs.shape[1], COLUMNS))
    return total / max(inputs.numel(), 1)


rounding = PatchAware()
