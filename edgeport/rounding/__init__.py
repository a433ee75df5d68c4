"""How a value between two numbers of a format becomes one of them: one rule a file, each holding a `rounding`.

Nearest rounding with fresh scales is right for weights that have never been rounded. On weights that lie on the
format's grid already it returns the old codes and erases a patch, so the other rules move codes on the grid that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer is given on a text, for a calibrated rule."""

    rows: Tensor
    """bfloat16 [tokens and more, columns], on the device: after the text's tokens the directions that the patch reads."""
    mean_square: float
    """Of the text's."""
    drift: Callable[[slice], Tensor] | None = None
    """Of some columns, bfloat16 [columns, tokens] on the device: how the text's inputs differ from the exact port's."""
    moments: list[Tensor] = field(default_factory=list)
    """Room for what a rule makes of them once for all blocks of a weight."""


class Rounding(Protocol):
    name: str
    calibrated: bool
    """Whether it has to see what the layer is given on a text."""
    rescales: bool
    """Whether it gives groups other scales, where the grid has a type for them."""
    pieces: int
    """Into how many pieces a block of rows is cut, so that temporaries stay small."""

    def scratch(self, columns: int, tokens: int) -> float:
        """Temporary bytes an element of a piece, for inputs of so many tokens."""
        ...

    def held(self, columns: int, tokens: int) -> int:
        """Bytes beside the pieces, whatever rows these have."""
        ...

    def codes(self, grid: Grid, target: Tensor, draws: str | None, first: int, inputs: Inputs | None) -> Tensor:
        """uint8 [rows, columns]: a code of the grid for every value of float32 `target` [rows, columns].

        The rows are a weight's from `first` on, and the result for a row does not depend on its neighbours: the same
        port gives the same bytes however its blocks are cut. `draws` seeds what is random; None, which
        calibrated rules alone are given: nothing is, since the values lie on no grid. `inputs`: on the target's device, where
        the rule is calibrated. A rule that rescales writes into the grid's `step` and `offset`.
        """
        ...


NEAREST = "nearest"
AUTO = "auto"
ON_GRID, UNCALIBRATED = "patch-aware", "stochastic"
"""What auto takes on a grid: the first where a text can be run through the model."""


def on_grid(
    rule: Rounding, grid: Grid, target: Tensor, draws: str | None, first: int, inputs: Inputs | None = None
) -> Tensor:
    """uint8 [rows, columns]: the rule's codes, found a piece of the rows at a time."""
    import torch

    codes = torch.empty_like(grid.codes)
    size = -(-len(codes) // rule.pieces) or 1
    for start in range(0, len(codes), size):
        some = slice(start, min(start + size, len(codes)))
        codes[some] = rule.codes(grid.of_rows(some), target[some], draws, first + start, inputs)
    return codes
