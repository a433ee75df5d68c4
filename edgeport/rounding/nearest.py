"""To the nearest code of the grid as it stands, for formats whose scales cannot be made anew block by block.

A change smaller than half a step is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.rounding import NEAREST

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid
    from edgeport.rounding import Inputs


class Nearest:
    name = NEAREST
    calibrated = False
    rescales = False
    pieces = 8

    def scratch(self, columns: int, tokens: int) -> float:
        return 8.0

    def held(self, columns: int, tokens: int) -> int:
        return 0

    def codes(self, grid: Grid, target: Tensor, draws: str | None, first: int, inputs: Inputs | None = None) -> Tensor:
        return grid.nearest(target)


rounding = Nearest()
