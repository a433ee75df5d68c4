"""What GPTQ, AWQ and compressed-tensors share: whole-number codes in groups of columns, value = (code - zero) * scale.

Codes are packed as one stream of bits, lowest bit first, in words of 32: at 4 bits

    word:  | code 0 | code 1 | ... | code 7 |      bit 0 of code 0 is the word's lowest

and at 3 bits 32 codes fill three words, some of them across two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from edgeport.codecs.plain import torch_type
from edgeport.errors import AmbiguousFormat, BlockMismatch, CorruptCheckpoint, NonFiniteResult
from edgeport.grid import Grid
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
"""Bits of a word."""
SCALES = ("F16", "BF16", "F32")
"""Types that scales are stored in."""
PIECES = 16
"""A block is unpacked, packed and quantized in so many pieces."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Some rows: uint8 codes [rows, columns], float32 scale and zero [rows, groups]. Groups have `group` columns, the
    last perhaps fewer; or `index` (int32 [columns]) says each column's group, as act-order leaves them."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    index: Tensor | None = None

    @property
    def even(self) -> int:
        """The most consecutive columns that lie in one group wherever they start."""
        return 1 if self.index is not None else gcd(self.group, self.codes.shape[1])

    def spread(self, each: Tensor) -> Tensor:
        """[rows, groups] to [rows, columns / even]."""
        if self.index is not None:
            return each.index_select(1, self.index)
        times = self.group // self.even
        return each if times == 1 else each.repeat_interleave(times, 1)[:, : self.codes.shape[1] // self.even]

    def values(self) -> Tensor:
        """float32 [rows, columns]."""
        import torch

        values = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        size = -(-len(values) // PIECES) or 1
        for first in range(0, len(values), size):
            some = slice(first, first + size)
            grouped = values[some].view(len(values[some]), -1, self.even)
            torch.sub(self.codes[some].view(grouped.shape), self.spread(self.zero[some]).unsqueeze(2), out=grouped)
            grouped.mul_(self.spread(self.scale[some]).unsqueeze(2))
        return values

    def grid(self, bits: int, scales: str) -> Grid:
        """The same values: exactly, where scales are 16-bit or zeros in the middle; else but for the last bit.

        `scales`: the type that they are stored in.
        """
        import torch

        middle = 1 << bits - 1
        levels = torch.arange(-middle, middle, dtype=torch.float32, device=self.codes.device)
        step = self.spread(self.scale)
        offset = self.spread(self.zero).sub(middle).mul_(step).neg_()
        own = torch_type(scales) if self.index is None and self.even == self.group else None
        return Grid(levels, step, offset, self.codes, uniform=True, scales=own)


def extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and largest value of each group of columns, [rows, groups]. A short last group counts zero among its values."""
    from torch.nn.functional import pad

    even = gcd(group, matrix.shape[1])
    bounds = matrix.view(len(matrix), -1, even).aminmax(dim=2)
    missing, times = -matrix.shape[1] % group // even, group // even
    low, high = (pad(bound, (0, missing)).view(len(matrix), -1, times) for bound in bounds)
    return low.amin(2), high.amax(2)


def nearest(matrix: Tensor, scale: Tensor, zero: Tensor, group: int, bits: int) -> Affine:
    """float32 [rows, columns] to the nearest codes under float32 scales and zeros [rows, groups].

    A group whose scale has become 0 holds its zero. Raises NonFiniteResult for a scale that its type cannot hold.
    """
    import torch

    if not bool(scale.isfinite().all()):
        raise NonFiniteResult("a scale does not fit the type that scales are stored in; use --quant bf16")
    found = Affine(torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device), scale, zero, group)
    size = -(-len(matrix) // PIECES) or 1
    for first in range(0, len(matrix), size):
        some = slice(first, first + size)
        grouped = matrix[some].view(len(matrix[some]), -1, found.even)
        codes = (grouped / found.spread(scale[some]).unsqueeze(2)).nan_to_num_(0.0).round_()
        codes.add_(found.spread(zero[some]).unsqueeze(2)).clamp_(0, (1 << bits) - 1)
        found.codes[some] = codes.view(-1, matrix.shape[1]).to(torch.uint8)
    return found


def unpack(stored: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [rows, bytes] to the first `count` codes of each row, uint8 [rows, count]."""
    import torch

    rows, mask = len(stored), (1 << bits) - 1
    codes = torch.empty((rows, -(-stored.shape[1] * 8 // bits)), dtype=torch.uint8, device=stored.device)
    if 8 % bits == 0:
        each = codes.view(rows, stored.shape[1], 8 // bits)
        for place in range(8 // bits):
            torch.bitwise_and(stored >> place * bits, mask, out=each[:, :, place])
    else:
        # eight codes lie in as many bytes as a code has bits
        whole = stored.shape[1] // bits
        bytes_, each = stored[:, : whole * bits].view(rows, whole, bits), codes[:, : whole * 8].view(rows, whole, 8)
        for place in range(8):
            byte, shift = divmod(place * bits, 8)
            code = bytes_[:, :, byte] >> shift
            if shift + bits > 8:
                code |= bytes_[:, :, byte + 1] << 8 - shift
            torch.bitwise_and(code, mask, out=each[:, :, place])
    return codes if codes.shape[1] == count else codes[:, :count].contiguous()


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] to uint8 [rows, bytes], in whole words: the inverse of `unpack`."""
    import torch
    from torch.nn.functional import pad

    rows, missing = len(codes), -codes.shape[1] % (WORD if 8 % bits else WORD // bits)
    codes = pad(codes, (0, missing)) if missing else codes
    if 8 % bits == 0:
        each = codes.view(rows, -1, 8 // bits)
        stored = each[:, :, 0].clone()
        for place in range(1, 8 // bits):
            stored |= each[:, :, place] << place * bits
        return stored
    each = codes.view(rows, -1, 8)
    bytes_ = torch.zeros((rows, each.shape[1], bits), dtype=torch.uint8, device=codes.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        bytes_[:, :, byte] |= each[:, :, place] << shift
        if shift + bits > 8:
            bytes_[:, :, byte + 1] |= each[:, :, place] >> 8 - shift
    return bytes_.view(rows, -1)


def words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] to int32 [rows, words]."""
    import torch

    return pack(codes, bits).view(torch.int32)


def flipped(matrix: Tensor) -> Tensor:
    """The transposed matrix, in memory too."""
    import torch

    # a copy always, since one line alone counts as contiguous with strides that no view as bytes takes
    return matrix.t().clone(memory_format=torch.contiguous_format)


def turned(stored: Tensor, lines: int, dtype: Any) -> Tensor:
    """The bytes of a part in lines (uint8, flat) to [rows, lines] of a type."""
    return flipped(stored.view(dtype).view(lines, -1))


def to_lines(matrix: Tensor) -> Tensor:
    """[rows, lines] to the bytes of a part in lines (uint8, flat): the inverse of `turned`."""
    import torch

    return flipped(matrix).view(-1).view(torch.uint8)


def rows_of(bits: int) -> int:
    """Rows whose zeros fill whole words."""
    return WORD if 8 % bits else WORD // bits


def need_multiple(what: str, count: int, of: int, format: str) -> None:
    """Raises BlockMismatch."""
    if count % of:
        raise BlockMismatch(f"its {count} {what} are no multiple of {of}, as {format} needs them; use --quant bf16")


def layers(specs: Mapping[str, TensorSpec], parts: tuple[str, ...]) -> list[str]:
    """The layers that have at least one of these tensors, in the order of the file."""
    found = (name.rpartition(".") for name in specs)
    return list(dict.fromkeys(layer for layer, _, part in found if part in parts))


def turned_layer(layer: str, specs: Mapping[str, TensorSpec]) -> tuple[TensorSpec, TensorSpec]:
    """A layer's qweight and scales. Raises CorruptCheckpoint."""
    packed, scales = specs.get(f"{layer}.qweight"), specs.get(f"{layer}.scales")
    if packed is None or len(packed.shape) != 2 or scales is None or scales.dtype not in SCALES:
        raise CorruptCheckpoint(f"{layer} lacks a qweight of two dimensions, or scales in one of {', '.join(SCALES)}")
    return packed, scales


def told_group(told: Mapping[str, Any]) -> int:
    """The group_size of a quantization_config; -1: all columns are one. Raises AmbiguousFormat."""
    group = told.get("group_size", 128)
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 31):
        raise AmbiguousFormat(f"quantization_config says group_size {group!r}; a positive number or -1 was expected")
    return group


def in_order(index: bytes, group: int, groups: int) -> bool:
    """Whether a g_idx is in order. Raises CorruptCheckpoint where it names a group that is not there."""
    import numpy as np

    found = np.frombuffer(index, "<i4")
    if found.size and not 0 <= found.min() <= found.max() < groups:
        raise CorruptCheckpoint(f"g_idx names group {found.max() if found.min() >= 0 else found.min()}, and there are {groups}")
    return bool((found == np.arange(found.size) // group).all())


def checked(expected: Weight, specs: Mapping[str, TensorSpec], told: str) -> Weight:
    """The weight over the checkpoint's own specs. Raises CorruptCheckpoint where one is missing or of another shape."""
    parts: dict[str, Part] = {}
    for role, part in expected.parts.items():
        spec = specs.get(part.spec.name)
        if spec is None or (spec.dtype, spec.shape) != (part.spec.dtype, part.spec.shape):
            came = f"{spec.dtype} {list(spec.shape)}" if spec else "missing"
            raise CorruptCheckpoint(
                f"{part.spec.name} is {came}, where {list(expected.shape)} in {told} takes "
                f"{part.spec.dtype} {list(part.spec.shape)}"
            )
        parts[role] = replace(part, spec=spec)
    return replace(expected, parts=parts)
