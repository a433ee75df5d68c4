"""The codes and scales of ggml's types apart: what a patch on a quantized base moves, and what it leaves.

Source: the structs of ggml-common.h, the dequantize_row_* of ggml-quants.c; every product and sum in the order of
gguf-py's `quants`, so that a grid's values are the decoded ones to the bit.

A block's codes lie in one or two planes. A plane of 4 bits and width 16, for instance (Q4_0):

    byte        0         1        ...   15
              +----+----+----+----+---+-----+----+
    high, low | 16 |  0 | 17 |  1 |   |  31 | 15 |   the column whose code the bits are
              +----+----+----+----+---+-----+----+

so `width` bytes hold the first `width` columns in their lowest bits, the next in the bits above, and when the bytes
are full the next `width` bytes follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.grid import Grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plane:
    """Bits of every code of a block: where its bytes start, how many, how they run, and which bit of a code is lowest."""

    start: int
    nbytes: int
    width: int
    bits: int
    at: int = 0

    @property
    def shifts(self) -> range:
        return range(0, 8, self.bits)

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class Own:
    """The steps, or the offsets, of a block's groups as codes of their own: unit * levels[code]."""

    levels: range
    unit: Tensor
    """float32 [blocks, 1]."""
    codes: Tensor
    """uint8 [blocks, groups]."""


Scales = Callable[["Tensor"], "tuple[Tensor, Tensor | None]"]
"""uint8 [blocks, bytes] to step and offset, float32 [blocks, groups] each."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A type's codes and scales. Level i is spelt by the bits i ^ flip, and in sign and magnitude if `fold` is set."""

    planes: tuple[Plane, ...]
    levels: Sequence[int]
    flip: int = 0
    fold: int = 0
    """Mask of the magnitude below a sign bit; negative magnitudes ascend backwards."""
    halves: tuple[int, ...] = ()
    """Where the float16 step of a block is, and then its offset, in types whose blocks have no other scales."""
    own: tuple[Callable[[Tensor], tuple[Own, ...]], Callable[..., None]] | None = None
    """In types whose groups have codes for them: from blocks, steps and then offsets; and codes into blocks."""
    scales: Scales | None = None
    """In the others."""


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """scales 0-15: MMMMSSSS for 16 columns each; d 80-81, dmin 82-83. value = d * S * code - dmin * M"""
    scales = blocks[:, :16]
    return _half(blocks, 80) * (scales & 15).float(), -(_half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """scales 96-107, 6 bits for 16 columns each, less 32; d 108-109.

    Low 4 bits of scale i in byte i % 8, the low half first; high 2 bits in byte 8 + i % 4, the lowest pair first.
    """
    scales = _gather(blocks, (Plane(96, 8, 8, 4), Plane(104, 4, 4, 2, at=4)))
    return _half(blocks, 108) * (scales.float() - 32), None


def _q4_k(blocks: Tensor) -> tuple[Own, ...]:
    """d 0-1, dmin 2-3, scales 4-15: 6 bits of S and of M for 32 columns each. value = d * S * code - dmin * M

    byte 4 + i:   S(i+4) bits 5-4 | S(i)            i = 0 ... 3
    byte 8 + i:   M(i+4) bits 5-4 | M(i)
    byte 12 + i:  M(i+4) bits 3-0 | S(i+4) bits 3-0
    """
    from torch import cat

    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = cat((first & 63, rest & 15 | first >> 2 & 48), 1)
    minima = cat((second & 63, rest >> 4 | second >> 2 & 48), 1)
    return Own(range(64), _half(blocks, 0), scales), Own(range(64), -_half(blocks, 2), minima)


def _to_q4_k(blocks: Tensor, scales: Tensor, minima: Tensor) -> None:
    blocks[:, 4:8] = scales[:, :4] | (scales[:, 4:] & 48) << 2
    blocks[:, 8:12] = minima[:, :4] | (minima[:, 4:] & 48) << 2
    blocks[:, 12:16] = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4


def _q6_k(blocks: Tensor) -> tuple[Own, ...]:
    """scales 192-207: int8 for 16 columns each; d 208-209."""
    return (Own(range(-128, 128), _half(blocks, 208), blocks[:, 192:208] ^ 128),)


def _to_q6_k(blocks: Tensor, scales: Tensor) -> None:
    blocks[:, 192:208] = scales ^ 128


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """d 0-1; scales of 32 columns each, 6 bits, less 32: the high 2 bits in 2-3, the low 4 in 4-7, lowest bits first."""
    scales = _gather(blocks, (Plane(4, 4, 1, 4), Plane(2, 2, 1, 2, at=4)))
    return _half(blocks, 0) * (scales.float() - 32), None


def _e8m0(blocks: Tensor) -> tuple[Tensor, Tensor | None]:
    """e 0: half of 2 ** (e - 127), by the bits of a float32 (ggml_e8m0_to_fp32_half); below e = 2 it is subnormal."""
    import torch

    e = blocks[:, :1].to(torch.int32)
    return torch.where(e < 2, (e + 1) << 21, (e - 1) << 23).view(torch.float32), None


# kvalues_iq4nl
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# kvalues_mxfp4, twice the e2m1 numbers: their bits are sign and magnitude
E2M1 = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)

# Without a grid: the ternary TQ1_0 and TQ2_0, whose bytes can spell what is no ternary number
LAYOUTS = {
    # bytes:  d 0-1 | codes 2-17
    "Q4_0": Layout((Plane(2, 16, 16, 4),), range(-8, 8), halves=(0,)),
    # d 0-1 | m 2-3 | codes 4-19
    "Q4_1": Layout((Plane(4, 16, 16, 4),), range(16), halves=(0, 2)),
    # d 0-1 | bit 4 of the codes in order 2-5 | bits 3-0 6-21
    "Q5_0": Layout((Plane(6, 16, 16, 4), Plane(2, 4, 1, 1, at=4)), range(-16, 16), halves=(0,)),
    # d 0-1 | m 2-3 | bit 4 of the codes in order 4-7 | bits 3-0 8-23
    "Q5_1": Layout((Plane(8, 16, 16, 4), Plane(4, 4, 1, 1, at=4)), range(32), halves=(0, 2)),
    # d 0-1 | int8 2-33
    "Q8_0": Layout((Plane(2, 32, 32, 8),), range(-128, 128), flip=128, halves=(0,)),
    # scales 0-15 | codes 16-79 | d, dmin 80-83
    "Q2_K": Layout((Plane(16, 64, 32, 2),), range(4), scales=_q2_k),
    # bit 2 of the codes 0-31 | bits 1-0 32-95 | scales 96-107 | d 108-109
    "Q3_K": Layout((Plane(32, 64, 32, 2), Plane(0, 32, 32, 1, at=2)), range(-4, 4), scales=_q3_k),
    # d, dmin 0-3 | scales 4-15 | codes 16-143
    "Q4_K": Layout((Plane(16, 128, 32, 4),), range(16), own=(_q4_k, _to_q4_k)),
    # d, dmin 0-3 | scales 4-15 | bit 4 of the codes 16-47 | bits 3-0 48-175
    "Q5_K": Layout((Plane(48, 128, 32, 4), Plane(16, 32, 32, 1, at=4)), range(32), own=(_q4_k, _to_q4_k)),
    # bits 3-0 of the codes 0-127 | bits 5-4 128-191 | scales 192-207 | d 208-209
    "Q6_K": Layout((Plane(0, 128, 64, 4), Plane(128, 64, 32, 2, at=4)), range(-32, 32), own=(_q6_k, _to_q6_k)),
    # d 0-1 | codes 2-17
    "IQ4_NL": Layout((Plane(2, 16, 16, 4),), IQ4, halves=(0,)),
    # d 0-1 | scales 2-7 | codes 8-135
    "IQ4_XS": Layout((Plane(8, 128, 16, 4),), IQ4, scales=_iq4_xs),
    # e 0 | codes 1-16
    "MXFP4": Layout((Plane(1, 16, 16, 4),), E2M1, scales=_e8m0, flip=8, fold=7),
}


def unpack(layout: Layout, blocks: Tensor, columns: int) -> Grid:
    """The grid of rows of `columns`, from their stored blocks (uint8 [blocks, bytes])."""
    import torch

    codes = _gather(blocks, layout.planes)
    if layout.fold:
        _fold(codes, layout.fold)
    if layout.flip:
        codes.bitwise_xor_(layout.flip)
    rows = codes.numel() // columns
    found = _scales(layout, blocks, rows)
    if len(found) == 1:
        found.append((torch.full_like(found[0][0], -0.0), None))
    (step, scales), (offset, shifts) = found
    levels = torch.tensor(layout.levels, dtype=torch.float32, device=blocks.device)
    return Grid(levels, step, offset, codes.view(rows, columns), isinstance(layout.levels, range), scales, shifts)


def _scales(layout: Layout, blocks: Tensor, rows: int) -> list[tuple[Tensor, Grid | torch.dtype | None]]:
    """Steps, and then offsets where there are any: float32 [rows, groups], and how each is stored if it is by itself."""
    import torch

    if layout.own:
        grids = [_own_grid(found, rows) for found in layout.own[0](blocks)]
        return [(grid.values(), grid) for grid in grids]
    if layout.halves:
        return [(_half(blocks, at).view(rows, -1), torch.float16) for at in layout.halves]
    assert layout.scales
    return [(values.reshape(rows, -1), None) for values in layout.scales(blocks) if values is not None]


def _own_grid(found: Own, rows: int) -> Grid:
    import torch

    levels = torch.tensor(found.levels, dtype=torch.float32, device=found.codes.device)
    unit = found.unit.reshape(rows, -1)
    return Grid(levels, unit, torch.full_like(unit, -0.0), found.codes.reshape(rows, -1), uniform=True)


def pack(layout: Layout, blocks: Tensor, codes: Tensor) -> Tensor:
    """A copy of `blocks` (uint8 [blocks, bytes]) with `codes` (uint8, as many as they hold), and nothing else changed."""
    codes = codes.reshape(len(blocks), -1)
    if layout.flip:
        codes = codes ^ layout.flip
    if layout.fold:
        _fold(codes, layout.fold)
    stored = blocks.clone()
    for plane in layout.planes:
        pieces = codes.view(len(blocks), -1, len(plane.shifts), plane.width).unbind(2)
        packed = stored.narrow(1, plane.start, plane.nbytes).zero_().view(len(blocks), -1, plane.width)
        for piece, shift in zip(pieces, plane.shifts, strict=True):
            packed |= ((piece >> plane.at) & plane.mask) << shift
    return stored


def rescale(layout: Layout, blocks: Tensor, grid: Grid) -> Tensor:
    """A copy of `blocks` (uint8 [blocks, bytes]) with the grid's scales, and nothing else changed."""
    import torch

    stored = blocks.clone()
    for at, values in zip(layout.halves, (grid.step, grid.offset), strict=False):
        stored[:, at : at + 2] = values.reshape(-1, 1).to(torch.float16).view(torch.uint8)
    if layout.own:
        found = (how.codes.reshape(len(blocks), -1) for how in (grid.scales, grid.shifts) if isinstance(how, Grid))
        layout.own[1](stored, *found)
    return stored


def _gather(blocks: Tensor, planes: Sequence[Plane]) -> Tensor:
    """uint8 [blocks, codes] from the planes of each block (uint8 [blocks, bytes])."""
    first = planes[0]
    codes = blocks.new_zeros(len(blocks), first.nbytes * len(first.shifts))
    for plane in planes:
        stored = blocks.narrow(1, plane.start, plane.nbytes).reshape(len(blocks), -1, plane.width)
        pieces = codes.view(len(blocks), -1, len(plane.shifts), plane.width).unbind(2)
        for piece, shift in zip(pieces, plane.shifts, strict=True):
            piece |= ((stored >> shift) & plane.mask) << plane.at
    return codes


def _fold(codes: Tensor, magnitude: int) -> None:
    """Turn the magnitudes of negative codes over, in place: one's complement from sign and magnitude, and back."""
    codes.bitwise_xor_((codes >> magnitude.bit_length()) * magnitude)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    import torch

    return blocks[:, at : at + 2].reshape(-1).view(torch.float16).float().view(-1, 1)
