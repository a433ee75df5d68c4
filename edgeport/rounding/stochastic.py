"""Unbiased rounding on the grid as it stands: up with the probability that the value's place between two codes gives.

The expected result is the value itself, so a patch far smaller than a step survives on average, under noise of about
half a step for the values between. Source: Croci et al., Stochastic rounding (Royal Society Open Science 9, 2022).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.rounding.draws import uniform

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid


class Stochastic:
    name = "stochastic"

    def codes(self, grid: Grid, target: Tensor, weight: str, first: int) -> Tensor:
        low, _, fraction = grid.bracket(target)
        rows, columns = target.shape
        draws = uniform(weight, first, rows, columns, target.device)
        return low.add_(draws < fraction)


rounding = Stochastic()
