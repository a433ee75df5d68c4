"""One block of rows of one weight: from stored bytes to transformers' own order and values, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Protocol, cast

from edgeport.errors import NonFiniteResult
from edgeport.registry import codec
from edgeport.seams import Lined
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor


SAMPLED_ROWS, PLACES = 64, 4
"""Rows that stand for a weight where all of them would take too long, and the places they come from."""


class Readable(Protocol):
    """A `Source`, or an output that is being written."""

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray: ...


def ranges(weight: Weight, rows: int, granule: int = 1) -> Iterator[range]:
    """Cut the weight's rows into blocks of nearly equal size: at most `rows` each, in whole granules.

    Equal, since a BLAS takes another path, with another last bit, for a remainder of a few rows.
    """
    granules = -(-weight.rows // granule)
    blocks = -(-granules // max(rows // granule, 1))
    for index in range(blocks):
        start, stop = (granules * edge // blocks * granule for edge in (index, index + 1))
        yield range(start, min(stop, weight.rows))


def sampled(rows: int, granule: int) -> Iterator[range]:
    """SAMPLED_ROWS of the rows at PLACES spread over them; whole granules, if they are larger."""
    granules = max(rows // granule, 1)
    each = max(SAMPLED_ROWS // PLACES // granule, 1)
    count = max(min(PLACES, granules // each), 1)
    for place in range(count):
        start = place * (granules - each) // max(count - 1, 1) * granule if count > 1 else 0
        yield range(start, min(start + each * granule, rows))


def decode_rows(source: Readable, weight: Weight, rows: range, device: str = "cpu") -> Tensor:
    """float32 [rows, columns] as transformers has them. `rows` starts and ends on the weight's row granule."""
    return decode_parts(weight, read_tensors(source, weight, rows, device))


def read_tensors(source: Readable, weight: Weight, rows: range, device: str = "cpu") -> dict[str, Tensor]:
    """The stored bytes that spell some rows as uint8, by part."""
    return {role: as_tensor(data).to(device) for role, data in read_parts(source, weight, rows).items()}


def read_parts(source: Readable, weight: Weight, rows: range) -> dict[str, bytearray]:
    """The stored bytes that spell some rows, by part."""
    return {role: read_part(source, part, rows, weight.granule) for role, part in weight.parts.items()}


def read_part(source: Readable, part: Part, rows: range, granule: int) -> bytearray:
    """A part's stored bytes of some rows; of a part in lines, line by line."""
    span = part.span(rows, granule)
    return source.read(part.spec, *span) if part.lines == 1 else cast(Lined, source).read_lines(part.spec, *span, part.lines)


def known(weight: Weight, rows: range) -> range:
    """Those of the rows that the weight has: a grown vocabulary has more."""
    return within(rows, weight.rows)


def within(rows: range, count: int) -> range:
    """Those of the rows that are among the first `count`."""
    return range(min(rows.start, count), min(rows.stop, count))


def padded(matrix: Tensor, rows: range) -> Tensor:
    """The matrix with zeros for those of the rows that it does not have."""
    import torch

    missing = len(rows) - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])]) if missing else matrix


def finite(matrix: Tensor) -> bool:
    """Whether no value is NaN or infinite. Its extremes say so, and `isfinite` would take 7 bytes an element."""
    return not matrix.numel() or all(isfinite(bound.item()) for bound in matrix.aminmax())


def check_finite(base: Tensor, exact: Tensor, rows: range) -> None:
    """Raises NonFiniteResult where the rows with the patch added, `exact`, are no numbers."""
    if not finite(exact):
        where = "the base with the patch added" if finite(base) else "the base"
        raise NonFiniteResult(f"{where} holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")


def as_tensor(data: bytearray) -> Tensor:
    """uint8, on the same memory."""
    import torch

    # torch warns on the empty buffer that a weight without elements has
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def decode_parts(weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
    """Stored bytes (uint8, by part) to float32 [rows, columns] as transformers has them, on the same device."""
    return restore(codec(weight.codec).decode(weight, parts), weight)


def encode_rows(weight: Weight, matrix: Tensor, importance: Tensor | None = None) -> Mapping[str, Tensor]:
    """The stored bytes, by part, of some rows that transformers has as float32 [rows, columns]."""
    return codec(weight.codec).encode(weight, arrange(matrix, weight), importance)


def arrange(matrix: Tensor, weight: Weight) -> Tensor:
    """Rows as the weight's container keeps them. Source: llama.cpp `LlamaModel.permute`."""
    if weight.arrangement.shift:
        matrix = matrix + weight.arrangement.shift
    return _swap_halves(matrix, weight, 2)


def restore(matrix: Tensor, weight: Weight) -> Tensor:
    """The inverse of `arrange`."""
    matrix = _swap_halves(matrix, weight, -1)
    return matrix - weight.arrangement.shift if weight.arrangement.shift else matrix


def _swap_halves(matrix: Tensor, weight: Weight, pairs: int) -> Tensor:
    """Within each head, [2, half] rows to [half, 2] (pairs = 2), or back (pairs = -1)."""
    heads = weight.arrangement.heads
    if not heads:
        return matrix
    values = matrix.reshape(-1, 1) if weight.rows == 1 else matrix
    half = (weight.columns if weight.rows == 1 else weight.rows) // heads // 2
    split = (-1, 2, half) if pairs == 2 else (-1, half, 2)
    swapped = values.reshape(*split, values.shape[-1]).transpose(1, 2)
    return swapped.reshape(matrix.shape)
