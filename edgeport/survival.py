"""How much of a patch the stored numbers keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

TELLING = 0.25
"""Standard error of a weight's retention above which it tells of rounding's noise alone."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one weight. `retention`: <stored - base, change> / |change|^2. `norm`: |change|. `chance`: the retention's standard
    error, were what rounding does independent of the change: |stored - exact| / (|change| sqrt(elements))."""

    retention: float
    norm: float
    chance: float


def telling(chances: Mapping[str, float]) -> list[str]:
    """The weights whose retention tells of more than rounding's noise, by its standard error; all where none does."""
    return [name for name, chance in chances.items() if chance <= TELLING] or list(chances)


class Figures(TypedDict, total=False):
    """What a receipt tells of a weight that was changed: `change` is |change| / |base| (None of a base of zeros), `error`
    |stored - exact| / |exact|; the others are those of `Kept`."""

    change: float | None
    retention: float
    error: float
    norm: float
    chance: float


def overall(kept: Mapping[str, Kept]) -> dict[str, Any] | None:
    """Retention of the patched weights taken together, and the weight that kept least of those that tell.

    Each weight counts by the square of its change, so that the mean is of the patch as one vector: the retention of a weight
    that is hardly changed is what rounding happened to do there, and may be anything.
    """
    whole = sum(one.norm**2 for one in kept.values())
    if not whole:
        return None
    worst = min(telling({name: one.chance for name, one in kept.items()}), key=lambda name: kept[name].retention)
    mean = sum(one.retention * one.norm**2 for one in kept.values()) / whole
    return {"mean": mean, "min": kept[worst].retention, "worst": worst}


class Survival:
    """Sums over a weight's blocks that say how much of the patch the stored result keeps."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """On the device, so that nothing waits: squares of base, exact, change and error, and <stored - base, change>."""
        self.elements = 0

    def add(self, base: Tensor, exact: Tensor, stored: Tensor) -> None:
        import torch

        # in pieces, whose temporaries are small and stay in the cache
        size = -(-len(base) // 8) or 1
        self.elements += base.numel()
        for pieces in zip(*(torch.split(one, size) for one in (base, exact, stored)), strict=True):
            sums = products(*pieces)
            self.sums = sums if self.sums is None else self.sums.add_(sums)

    def figures(self) -> Figures:
        """Empty where nothing changed."""
        base, exact, change, error, kept = self.sums.tolist() if self.sums is not None else [0.0] * 5
        if change == 0:
            return {}
        return {
            "change": round(sqrt(change / base), 6) if base else None, "retention": round(kept / change, 6),
            "error": round(sqrt(error / exact), 8) if exact else 0.0, "norm": sqrt(change),
            "chance": round(sqrt(error / change / self.elements), 8),
        }  # fmt: skip

    def kept(self) -> Kept | None:
        """What of the change is kept; None where nothing changed."""
        found = self.figures()
        return Kept(found["retention"], found["norm"], found["chance"]) if found else None

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
