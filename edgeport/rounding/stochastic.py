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
    from edgeport.rounding import Inputs


class Stochastic:
    name = "stochastic"
    calibrated = False
    rescales = False
    pieces = 8

    def scratch(self, columns: int, tokens: int) -> float:
        return 32.0

    def held(self, columns: int, tokens: int) -> int:
        return 0

    def codes(self, grid: Grid, target: Tensor, draws: str | None, first: int, inputs: Inputs | None = None) -> Tensor:
        assert draws is not None
        low, _, fraction = grid.bracket(target)
        rows, columns = target.shape
        return low.add_(uniform(draws, first, rows, columns, target.device) < fraction)


rounding = Stochastic()
