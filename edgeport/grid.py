"""The values that a stored quantized block can take.

A patch on a base that lies on a grid already has to move codes along that grid: fresh scales and rounding to nearest
return the old codes, and the patch is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from edgeport.tensor import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_PIECE, SMALLEST_PIECE = 1 << 16, 1 << 12
"""Elements that are in work at a time: a sixteenth of the block within these bounds, so that they stay in the cache."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What some rows hold, as value = levels[code] * step + offset, in groups of consecutive columns.

    Of `scratch` bytes an element `values` and `bracket` keep one sixteenth beyond what they return (in small blocks
    more, up to `SMALLEST_PIECE` elements' worth).
    """

    levels: Tensor
    """float32 [levels], ascending; two may be equal (a zero of either sign)."""
    step: Tensor
    """float32 [rows, groups]; may be negative, 0 or (in a corrupt file) no number."""
    offset: Tensor
    """float32 [rows, groups]; -0.0 where the format has none, so that adding it changes no bit."""
    codes: Tensor
    """uint8 [rows, columns], what is stored now: indices into `levels`."""
    uniform: bool = False
    """Whether each level is known to be the one before it plus 1, so that no search is needed."""
    scales: Grid | torch.dtype | None = None
    """How the format stores each group's step by itself, so that it can be another: in a type, or on a grid of its own
    (with a code for each group); None: steps stay."""
    shifts: Grid | torch.dtype | None = None
    """The same of offsets; None: each is a fixed multiple of its step."""

    scratch = 17.1

    @property
    def group(self) -> int:
        """Columns that share a step."""
        return self.codes.shape[1] // self.step.shape[1]

    def of_rows(self, some: slice) -> Grid:
        """The grid of some of the rows, on the same memory."""
        scales, shifts = (how.of_rows(some) if isinstance(how, Grid) else how for how in (self.scales, self.shifts))
        return replace(
            self, step=self.step[some], offset=self.offset[some], codes=self.codes[some], scales=scales, shifts=shifts
        )

    def of_columns(self, some: slice) -> Grid:
        """The grid of the columns from `some.start` to `some.stop`: on the same memory where they are whole groups,
        else in groups of as many columns as lie in one of these, with copies of their scales that stay.
        """
        import torch

        unit = gcd(self.group, some.start, some.stop)
        if unit == self.group:
            groups = slice(some.start // unit, some.stop // unit)
            scales, shifts = (how.of_columns(groups) if isinstance(how, Grid) else how for how in (self.scales, self.shifts))
            return replace(
                self, step=self.step[:, groups], offset=self.offset[:, groups], codes=self.codes[:, some], scales=scales,
                shifts=shifts,
            )  # fmt: skip
        places = torch.arange(some.start, some.stop, unit, device=self.codes.device) // self.group
        step, offset = self.step.index_select(1, places), self.offset.index_select(1, places)
        return replace(self, step=step, offset=offset, codes=self.codes[:, some], scales=None, shifts=None)

    def values(self, codes: Tensor | None = None) -> Tensor:
        """float32 [rows, columns] that `codes` (uint8 [rows, columns]; the stored ones if None) stand for."""
        import torch

        codes = self.codes if codes is None else codes
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        flat, grouped = values.view(-1, self.group), codes.reshape(-1, self.group)
        step, offset = self.step.reshape(-1, 1), self.offset.reshape(-1, 1)
        for some in self._pieces():
            torch.add(self._levels(grouped[some]).mul_(step[some]), offset[some], out=flat[some])
        return values

    def bracket(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The neighbouring codes around `target`, which is finite float32 [rows, columns], and how far it is between them.

        Returns low (uint8), high (uint8: low or low + 1) and fraction (float32, 0 <= fraction < 1), [rows, columns]
        each: value(low) + fraction * (value(high) - value(low)) is the target, clamped to the ends of the grid. Codes
        ascend with the levels, so a negative step makes low the larger value. On a level, at an end and beyond it high
        is low; a group without a usable step keeps its stored codes.
        """
        import torch

        low = torch.empty(self.codes.shape, dtype=torch.uint8, device=self.codes.device)
        high, fraction = torch.empty_like(low), torch.empty_like(low, dtype=torch.float32)
        outputs = [whole.view(-1, self.group) for whole in (low, high, fraction)]
        inputs = [whole.reshape(-1, self.group) for whole in (self.codes, target)]
        scales = [whole.reshape(-1, 1) for whole in (self.step, self.offset)]
        for some in self._pieces():
            self._bracket(*(whole[some] for whole in (*inputs, *scales, *outputs)))
        return low, high, fraction

    def nearest(self, target: Tensor) -> Tensor:
        """uint8 [rows, columns]: the nearest code to each value of finite float32 `target` [rows, columns]."""
        low, _, fraction = self.bracket(target)
        return low.add_(fraction > 0.5)

    def _bracket(
        self, codes: Tensor, target: Tensor, step: Tensor, offset: Tensor, low: Tensor, high: Tensor, fraction: Tensor
    ) -> None:
        """`bracket` of some groups: all are [groups, group] but for step and offset, [groups, 1]; fills the last three."""
        import torch

        first = self._floor((target - offset).div_(step)).to(torch.uint8)
        # the fraction is taken between the values themselves: a value of the grid is met exactly, and where the
        # division has rounded across a level the clamp snaps to that level
        below = self._levels(first).mul_(step).add_(offset)
        above = self._levels(first + 1).mul_(step).add_(offset)
        torch.sub(target, below, out=fraction)
        fraction.div_(above.sub_(below)).nan_to_num_(0.0).clamp_(0, 1)
        raised = fraction.to(torch.uint8)
        fraction.sub_(raised)
        usable = (step.isfinite() & offset.isfinite() & (step != 0)).to(torch.uint8)
        torch.add(first.add_(raised).mul_(usable), codes * (1 - usable), out=low)
        torch.add(low, fraction.ceil().to(torch.uint8), out=high)

    def _floor(self, place: Tensor) -> Tensor:
        """The code of the last level at or below `place` (float32, lost), as a number whose fraction is to be cut off.

        The first code from below it, the last but one from the last on.
        """
        import torch

        last = len(self.levels) - 1
        if self.uniform:
            return place.sub_(self.levels[:1]).clamp_(0, last - 1)
        # torch.bucketize, without its branches: three times as fast
        steps = [1 << bit for bit in reversed(range((last - 1).bit_length() or 1))]
        ladder = torch.cat((self.levels[:last], self.levels.new_full((2 * steps[0] - last,), torch.nan)))
        flat = place.reshape(-1)
        codes = torch.zeros_like(flat, dtype=torch.int32)
        for step in steps:
            reached = ladder.index_select(0, codes + step) <= flat
            codes.add_(reached, alpha=step)
        return codes.view(place.shape)

    def _levels(self, codes: Tensor) -> Tensor:
        """float32 levels of `codes`, of the same shape."""
        import torch

        if self.uniform:
            return codes.to(torch.float32).add_(self.levels[:1])
        return self.levels.index_select(0, codes.to(torch.int32).reshape(-1)).view(codes.shape)

    def _pieces(self) -> Iterator[slice]:
        """The groups, a cacheful at a time."""
        elements = min(max(self.codes.numel() // 16, SMALLEST_PIECE), LARGEST_PIECE)
        size, groups = max(1, elements // self.group), self.step.numel()
        return (slice(first, min(first + size, groups)) for first in range(0, groups, size))


def said(values: Tensor, how: Grid | torch.dtype) -> Tensor:
    """float32 [rows, groups]: the nearest to `values` that can be stored so. A grid's codes become theirs."""
    if not isinstance(how, Grid):
        return values.to(how).float()
    how.codes.copy_(how.nearest(values))
    return how.values()


@runtime_checkable
class Gridded(Protocol):
    """What a codec is, besides a `Codec`, whose formats keep a code for each weight and scales for groups of them."""

    grids: frozenset[str]
    """The formats that have a grid: the others raise DecodeOnly from both methods."""
    grid_scratch: float
    """Temporary bytes an element that either method takes beyond its input and output."""

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        """The grid of some rows from their stored bytes (uint8 tensors, by part), on the same device."""
        ...

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        """The same rows with `codes` (uint8 [rows, columns]) in place of theirs and every other bit as it was."""
        ...


@runtime_checkable
class Rescalable(Protocol):
    """What a codec is, besides `Gridded`, that can give groups other scales where a grid has a type for them."""

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        """The same rows with the grid's steps and offsets in place of theirs, as its `scales` and `shifts` say them."""
        ...
