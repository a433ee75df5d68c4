"""How much of a patch the stored numbers keep."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Survival:
    """Sums over a weight's blocks that say how much of the patch the stored result keeps."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """On the device, so that nothing waits: squares of base, exact, change and error, and <stored - base, change>."""

    def add(self, base: Tensor, exact: Tensor, stored: Tensor) -> None:
        import torch

        # in pieces, whose temporaries are small and stay in the cache
        size = -(-len(base) // 8) or 1
        for pieces in zip(*(torch.split(one, size) for one in (base, exact, stored)), strict=True):
            sums = products(*pieces)
            self.sums = sums if self.sums is None else self.sums.add_(sums)

    def figures(self) -> tuple[float | None, float, float] | tuple[None, None, None]:
        """|change| / |base| (None of a base of zeros), retention, |stored - exact| / |exact|; None where nothing changed."""
        base, exact, change, error, kept = self.sums.tolist() if self.sums is not None else [0.0] * 5
        if change == 0:
            return None, None, None
        relative = round(sqrt(change / base), 6) if base else None
        return relative, round(kept / change, 6), round(sqrt(error / exact), 8) if exact else 0.0

    def noise(self) -> float:
        """|stored - exact|^2 / |change|^2; 0 where nothing changed."""
        _, _, change, error, _ = self.sums.tolist() if self.sums is not None else [0.0] * 5
        return float(error / change) if change else 0.0


def products(base: Tensor, exact: Tensor, stored: Tensor) -> Tensor:
    """float64 [5]: the sums of `Survival`."""
    import torch

    change, error = exact - base, stored - exact
    sums = [inner(one, one) for one in (base, exact, change, error)]
    del error
    # each sum is float32 over a piece, and float64 over the pieces
    return torch.stack([*sums, inner(stored - base, change)]).double()


def inner(one: Tensor, other: Tensor) -> Tensor:
    return one.flatten().dot(other.flatten())
