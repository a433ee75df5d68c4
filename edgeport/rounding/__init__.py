"""How a value between two numbers of a format becomes one of them: one rule a file, each holding a `rounding`.

Nearest rounding with fresh scales is right for weights that have never been rounded. On weights that lie on the
format's grid already it returns the old codes and erases a patch, so the other rules keep the scales and move codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid


class Rounding(Protocol):
    name: str

    def codes(self, grid: Grid, target: Tensor, weight: str, first: int) -> Tensor:
        """uint8 [rows, columns]: a code of the grid for every value of float32 `target` [rows, columns].

        The rows are those of `weight` from `first` on, and the result for a row does not depend on its neighbours:
        the same port gives the same bytes however its blocks are cut. It is given an eighth of a block at a time, and
        may take `SCRATCH` bytes an element of that.
        """
        ...


NEAREST = "nearest"
AUTO = "auto"
ON_GRID = "stochastic"
"""What auto takes on a grid."""
SCRATCH = 32.0
PIECES = 8


def on_grid(rule: Rounding, grid: Grid, target: Tensor, weight: str, first: int) -> Tensor:
    """uint8 [rows, columns]: the rule's codes, found a few rows at a time, so that its temporaries stay small."""
    import torch

    codes = torch.empty_like(grid.codes)
    size = -(-len(codes) // PIECES) or 1
    for start in range(0, len(codes), size):
        some = slice(start, min(start + size, len(codes)))
        codes[some] = rule.codes(grid.of_rows(some), target[some], weight, first + start)
    return codes
