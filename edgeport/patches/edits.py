"""What a patch can do to a weight: add a product of two factors or a matrix, or put values in the place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from edgeport.blocks import as_tensor, decode_rows, finite, known, padded, restore, within
from edgeport.checkpoint import Stored, read_range
from edgeport.codecs.plain import torch_type
from edgeport.errors import NonFiniteResult, PlanViolation
from edgeport.registry import codec
from edgeport.seams import Applied, Source
from edgeport.tensor import AS_IS, Arrangement, Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """delta = s B A, with B [out, r] and A [r, in]; `transposed` where the weight is stored [in, out]."""

    target: str
    shape: tuple[int, ...]
    down: Stored
    up: Stored
    scaling: float
    transposed: bool
    tied: bool
    semantics: str = "delta"
    arrangement: Arrangement = AS_IS
    """Of the rows of B, in a container that keeps the weight's so."""
    idle: tuple[str, ...] = ()
    """Names of the patch's tensors that say nothing beside the factors."""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.down.name, self.up.name, *self.idle

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def held_bytes(self) -> int:
        # the raw bytes and their float32 copy stand side by side while a factor is read
        return sum(stored.nbytes + 4 * stored.shape[0] * stored.shape[1] for stored in (self.down, self.up))

    def load(self, device: str) -> Applied:
        down, up = factor(self.down).to(device), factor(self.up, self.arrangement).to(device)

        def apply(rows: range, matrix: Tensor) -> Tensor:
            # zeros for rows that another patch adds, before the product: its last bit depends on the block's size
            if self.transposed:
                delta = (up @ padded(down.T[rows.start : rows.stop], rows).T).T
            else:
                delta = padded(up[rows.start : rows.stop], rows) @ down
            return matrix + delta * self.scaling

        return apply

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = factor(self.down), factor(self.up, self.arrangement)
        scaled = (down if self.transposed else up).mul_(self.scaling)
        return (scaled.T, up.T) if self.transposed else (scaled, down)


@dataclass(frozen=True, slots=True)
class Difference:
    """A whole matrix that is added, in rows; those that the base does not have are taken as they are, at any scale."""

    target: str
    shape: tuple[int, ...]
    value: Stored
    base_rows: int
    scale: float
    tied: bool
    semantics: str = "delta"

    @property
    def whole_rows(self) -> Sequence[int]:
        return range(self.base_rows, height(self.shape))

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.value.name,)

    @property
    def held_bytes(self) -> int:
        return 0  # its rows are read block by block

    def load(self, device: str) -> Applied:
        def apply(rows: range, matrix: Tensor) -> Tensor:
            value = own_rows(self.value, rows, self.shape).to(device)
            base = min(len(within(rows, self.base_rows)), len(value))
            return joined(matrix[:base] + value[:base] * self.scale, value[base:], matrix[len(value) :])

        return apply


@dataclass(frozen=True, slots=True)
class NewRows:
    """The rows of a grown vocabulary, taken as they are; those that the base has stay its own."""

    target: str
    shape: tuple[int, ...]
    value: Stored
    base_rows: int
    tied: bool = True
    """Of a tied model both are one matrix, which grows as one."""
    semantics: str = "delta"

    @property
    def whole_rows(self) -> Sequence[int]:
        return range(self.base_rows, height(self.shape))

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.value.name,)

    @property
    def held_bytes(self) -> int:
        return 0  # its rows are read block by block

    def load(self, device: str) -> Applied:
        def apply(rows: range, matrix: Tensor) -> Tensor:
            own = within(rows, self.shape[0])
            base = len(within(own, self.base_rows))
            value = stored_rows(self.value, own[base:], self.shape[1]).to(device)
            return joined(matrix[:base], value, matrix[len(own) :])

        return apply


@dataclass(frozen=True, slots=True)
class Replace:
    """Whole values of a weight, in rows; as differences to `old` where that is known.

    Of rows that the old base does not have, the way from the new base's to them is scaled; those that neither has are
    taken as they are, at any scale.
    """

    target: str
    shape: tuple[int, ...]
    value: Stored
    base_rows: int
    scale: float
    old: tuple[Source, Weight] | None
    tied: bool
    idle: tuple[str, ...] = ()
    """Names of the patch's tensors that say the same."""

    @property
    def semantics(self) -> str:
        return "delta" if self.old else "operator"

    @property
    def whole_rows(self) -> Sequence[int]:
        return range(in_both(self.old, self.base_rows), height(self.shape))

    @property
    def reads(self) -> tuple[str, ...]:
        return self.value.name, *self.idle

    @property
    def held_bytes(self) -> int:
        return 0  # its rows are read block by block

    def load(self, device: str) -> Applied:
        def apply(rows: range, matrix: Tensor) -> Tensor:
            value, before = own_rows(self.value, rows, self.shape).to(device), self.old_rows(rows, device)
            base = min(len(within(rows, self.base_rows)), len(value))
            common = min(len(before), base)
            changed = matrix[:common] + (value[:common] - before[:common]) * self.scale
            moved = value[common:base]
            if self.scale != 1:
                moved = matrix[common:base] + (moved - matrix[common:base]) * self.scale
            return joined(changed, moved, value[base:], matrix[len(value) :])

        return apply

    def old_rows(self, rows: range, device: str) -> Tensor:
        """Those of the rows that the old base has; none where it is not known."""
        import torch

        if self.old is None:
            return torch.empty(0, width(self.shape), device=device)
        source, weight = self.old
        return whole_granules(source, weight, known(weight, rows), device)


@dataclass(frozen=True, slots=True)
class ReplaceRows:
    """Single rows of an embedding or a head, by index, as `Replace` does all."""

    target: str
    shape: tuple[int, ...]
    value: Stored
    base_rows: int
    indices: tuple[int, ...]
    scale: float
    old: tuple[Source, Weight] | None
    tied: bool
    """PEFT gives the rows of a tied head the same values itself, but where it has trained other rows there."""
    idle: tuple[str, ...] = ()
    """Names of the patch's tensors that say nothing beside the rows."""

    @property
    def semantics(self) -> str:
        """New tokens' rows take the place of nothing."""
        return "delta" if self.old or all(index >= self.base_rows for index in self.indices) else "operator"

    @property
    def whole_rows(self) -> Sequence[int]:
        return [index for index in self.indices if index >= in_both(self.old, self.base_rows)]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.value.name, *self.idle

    @property
    def held_bytes(self) -> int:
        return 3 * 4 * len(self.indices) * self.shape[-1]

    def load(self, device: str) -> Applied:
        values = stored_rows(self.value, range(len(self.indices)), self.shape[-1]).to(device)

        def apply(rows: range, matrix: Tensor) -> Tensor:
            matrix = matrix.clone()
            # of a token that is named twice the later values count, as with PEFT
            for index, value in dict(zip(self.indices, values, strict=True)).items():
                if index in rows:
                    here, before = matrix[index - rows.start], self.old_row(index, device)
                    change = value - (here if before is None else before)
                    whole = index >= self.base_rows or (before is None and self.scale == 1)
                    matrix[index - rows.start] = value if whole else here + change * self.scale
            return matrix

        return apply

    def old_row(self, index: int, device: str) -> Tensor | None:
        """None where no old base is known, or its vocabulary ends before."""
        if self.old is None or index >= self.old[1].rows:
            return None
        source, weight = self.old
        return whole_granules(source, weight, range(index, index + 1), device)[0]


def whole_granules(source: Source, weight: Weight, rows: range, device: str) -> Tensor:
    """Some rows as float32, read with those that the weight's format does not let them apart from."""
    first, last = (edge // weight.row_granule * weight.row_granule for edge in (rows.start, rows.stop + weight.row_granule - 1))
    return decode_rows(source, weight, range(first, min(last, weight.rows)), device)[rows.start - first : rows.stop - first]


def own_rows(stored: Stored, rows: range, shape: tuple[int, ...]) -> Tensor:
    """Those of the rows that a matrix of that shape has: another patch may grow the vocabulary beyond it."""
    return stored_rows(stored, within(rows, height(shape)), width(shape))


def in_both(old: tuple[Source, Weight] | None, base_rows: int) -> int:
    """How many rows the new base has, and the old one where that is known."""
    return min(old[1].rows, base_rows) if old else base_rows


def height(shape: tuple[int, ...]) -> int:
    """Rows of a weight as a matrix; a vector is one."""
    return prod(shape[:-1])


def width(shape: tuple[int, ...]) -> int:
    """Columns of a weight as a matrix; a single number is one."""
    return shape[-1] if shape else 1


def joined(*pieces: Tensor) -> Tensor:
    """All pieces' rows, without a copy where only one has any."""
    import torch

    some = [piece for piece in pieces if len(piece)]
    return some[0] if len(some) == 1 else torch.cat(pieces)


def factor(stored: Stored, arrangement: Arrangement = AS_IS) -> Tensor:
    """A whole stored matrix as float32, its rows in transformers' order."""
    values = stored_rows(stored, range(stored.shape[0]), stored.shape[1])
    return restore(values, replace(codec("plain").layout(stored.name, stored.shape, stored.dtype), arrangement=arrangement))


def stored_rows(stored: Stored, rows: range, columns: int) -> Tensor:
    """Some rows of a plain stored tensor as float32 [rows, columns]. Raises NonFiniteResult, PlanViolation."""
    if rows.stop * columns > prod(stored.shape):
        raise PlanViolation(f"rows up to {rows.stop} of {stored.name} were asked for, which has the shape {list(stored.shape)}")
    dtype = torch_type(stored.dtype)
    size = columns * dtype.itemsize
    data = read_range(stored.path, stored.offset + rows.start * size, stored.offset + rows.stop * size)
    values = as_tensor(data).view(dtype).view(-1, columns).float()
    del data
    if not finite(values):
        raise NonFiniteResult(f"the patch tensor {stored.name} holds NaN or infinity")
    return values
