"""The leading directions of a matrix too large to hold, from a few passes over blocks of its rows.

A randomized range finder with power iterations (Halko, Martinsson and Tropp, SIAM Review 53, 2011, algorithm 4.4 on the
transpose): what is held is a sketch of `width` rows and as many columns, whatever the matrix. Where `width` is all that the
matrix has, the result is its singular value decomposition itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.rounding.draws import uniform

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLING = 8
"""Directions that the range finder takes beyond those it keeps (the authors recommend 5 to 10)."""
SWEEPS = 2
"""One sketch, one power iteration."""

Blocks = Callable[[], Iterable[tuple[range, "Tensor"]]]
"""Makes one pass: row ranges in order, each with its float32 rows."""


@dataclass(frozen=True, slots=True)
class Truncated:
    """The matrix projected onto its leading directions: left [rows, width], values [width], right [width, columns].

    The best approximation of rank k among these is left[:, :k] * values[:k] @ right[:k]; its squared norm is the sum of
    the k squared values, and what it leaves out is orthogonal to it.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """up [rows, rank] and down [rank, columns], each with the root of the singular values."""
        root = self.values[:rank].sqrt()
        return self.left[:, :rank] * root, self.right[:rank] * root[:, None]


def held_bytes(rows: int, columns: int, width: int) -> int:
    """What `truncated` takes beside the blocks: the sketch in float64, its vectors twice and LAPACK's room (20.7 bytes for each
    square of the width by hand, with MKL), then the projection and its own."""
    return width * max(28 * columns + 40 * width, 12 * rows + 12 * columns + 16 * width)


def row_space(blocks: Blocks, columns: int, width: int, key: str) -> Tensor:
    """float32 [width, columns], orthonormal: nearly the leading right singular vectors. `key` names the random draws."""
    import torch

    basis: Tensor | None = None
    for _ in range(SWEEPS):
        sketch = torch.zeros(width, columns, dtype=torch.float64)
        for rows, block in blocks():
            test = block @ basis.T if basis is not None else draws(key, rows, width)
            sketch += (test.T @ block).double()
        basis = torch.linalg.svd(sketch, full_matrices=False)[2].float()
    assert basis is not None
    return basis


def draws(key: str, rows: range, width: int) -> Tensor:
    """float32 [len(rows), width]: independent, of mean 0."""
    import torch

    return uniform(key, rows.start, len(rows), width, torch.device("cpu")).sub_(0.5)


def truncated(blocks: Blocks, columns: int, width: int, key: str) -> Truncated:
    """The leading `width` directions."""
    import torch

    basis = row_space(blocks, columns, width, key)
    left, values, turn = torch.linalg.svd(torch.cat([block @ basis.T for _, block in blocks()]), full_matrices=False)
    return Truncated(left, values, turn @ basis)
