"""onnxruntime's block-quantized matrices (MatMulNBits): 4 or 8 bits a weight, value = (code - zero) * scale.

    X:              uint8 [rows, blocks, block_size * bits / 8]; of 4 bits, code 2i in the low half of byte i
    X.scales:       float32 or float16 [rows, blocks], of either sign
    X.zero_points:  uint8 [rows, blocks]; of 4 bits two a byte, each row filled up; absent: 2 ** (bits - 1) everywhere

A block is `block_size` consecutive columns. Signed codes (for ONNX's own DequantizeLinear, whose zero is 0 if absent) are
the same with the highest bit turned. Source: onnxruntime docs/ContribOperators.md, core/mlas/lib/q4_dq.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import BlockMismatch, NonFiniteResult, UnknownName
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"NBITS4": (4, True), "NBITS4_ZP": (4, False), "NBITS8": (8, True), "NBITS8_ZP": (8, False)}
"""Format name to bits, and whether all blocks share the zero in the middle."""
BLOCK_SIZES = (16, 32, 64, 128)
SCALES, ZERO_POINTS = ".scales", ".zero_points"


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a weight's blocks are stored. `scale`: the type of the scales, by its safetensors name."""

    bits: int
    symmetric: bool
    size: int = 32
    scale: str = "F32"
    signed: bool = False

    @property
    def format(self) -> str:
        return next(name for name, kind in FORMATS.items() if kind == (self.bits, self.symmetric))

    @property
    def middle(self) -> int:
        """The code of zero where blocks have none of their own."""
        return 1 << (self.bits - 1)


def blocks_of(weight: Weight) -> Blocks:
    return cast(Blocks, weight.parameters)


class NBits:
    name = "nbits"
    formats: Mapping[str, str] = dict.fromkeys(FORMATS, "rw")
    grids = frozenset(FORMATS)
    # float32 quotients and their codes; scales of blocks of 16
    scratch = 8.0
    grid_scratch = 3.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Nothing: no HF folder stores these."""
        return ()

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """In blocks of 32 with float32 scales. Raises BlockMismatch."""
        return lay_out(name, shape, Blocks(*FORMATS[format]))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        return self.grid(weight, parts).values()

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """To nearest. Symmetric: the value of largest magnitude becomes the lowest code, as in ggml's Q4_0, whose blocks
        therefore come through unchanged. Else the range with 0 in it is spread over all codes. Raises NonFiniteResult."""
        import torch

        how = blocks_of(weight)
        values = matrix.reshape(-1, how.size)
        if how.symmetric:
            low, high = values.amin(1), values.amax(1)
            scales = torch.where(high > -low, high, low).div_(-how.middle)
        else:
            low, high = values.amin(1).clamp_(max=0), values.amax(1).clamp_(min=0)
            scales = (high - low).div_((1 << how.bits) - 1)
        stored = scales.to(torch_type(how.scale))
        scales = stored.float()
        if not bool(scales.isfinite().all()):
            raise NonFiniteResult(f"a scale does not fit {how.scale}; use --quant bf16 or f32")
        inverse = scales.reciprocal().nan_to_num_(0.0, 0.0, 0.0)  # of a block of zeros
        zeros = torch.full_like(scales, how.middle) if how.symmetric else (low * inverse).neg_().round_()
        zeros.clamp_(0, (1 << how.bits) - 1)
        codes = (values * inverse.unsqueeze(1)).add_(zeros.unsqueeze(1)).round_().clamp_(0, (1 << how.bits) - 1).to(torch.uint8)
        parts = {"codes": _stored(codes.view(-1), how), "scales": stored.view(torch.uint8)}
        return parts if how.symmetric else parts | {"zeros": _paired(zeros.to(torch.uint8).view(len(matrix), -1), how.bits)}

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        import torch

        how = blocks_of(weight)
        per_row = weight.columns // how.size
        step = parts["scales"].view(torch_type(how.scale)).float().view(-1, per_row)
        codes = _codes(parts["codes"], how).view(-1, weight.columns)
        levels = torch.arange(1 << how.bits, dtype=torch.float32, device=step.device)
        if how.symmetric:
            return Grid(levels - how.middle, step, torch.full_like(step, -0.0), codes, uniform=True)
        zeros = _unpacked(parts["zeros"], how.bits).view(len(step), -1)[:, :per_row]
        return Grid(levels, step, zeros.float().mul_(step).neg_(), codes, uniform=True)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": _stored(codes.reshape(-1), blocks_of(weight))}


codec = NBits()


def lay_out(name: str, shape: tuple[int, ...], how: Blocks) -> Weight:
    """How a weight in such blocks is stored. Raises BlockMismatch, UnknownName."""
    if how.size not in BLOCK_SIZES:
        raise UnknownName(f"there are no blocks of {how.size} (known: {', '.join(map(str, BLOCK_SIZES))})")
    rows, columns = prod(shape[:-1]), shape[-1] if shape else 1
    if columns % how.size:
        fits = [str(size) for size in BLOCK_SIZES if columns % size == 0]
        remedy = f"give --block-size {' or '.join(fits)}" if fits else "give --quant fp16 or fp32"
        raise BlockMismatch(f"rows of {columns} columns do not divide into blocks of {how.size}; {remedy}")
    count = columns // how.size
    item = TYPES[how.scale][0]

    def part(suffix: str, dtype: str, per_row: int, item: int) -> Part:
        return Part(TensorSpec(name + suffix, dtype, (rows, per_row), rows * per_row * item), per_row * item)

    parts = {"codes": part("", "U8", columns * how.bits // 8, 1), "scales": part(SCALES, how.scale, count, item)}
    if not how.symmetric:
        parts["zeros"] = part(ZERO_POINTS, "U8", -(-count * how.bits // 8), 1)
    return Weight(name, shape, codec.name, how.format, parts, parameters=how)


def _stored(codes: Tensor, how: Blocks) -> Tensor:
    """uint8 [n] codes to their bytes."""
    if how.signed:
        codes = codes ^ how.middle
    return _paired(codes.view(1, -1), how.bits)


def _codes(stored: Tensor, how: Blocks) -> Tensor:
    """The inverse of `_stored`."""
    codes = _unpacked(stored, how.bits)
    return codes.bitwise_xor_(how.middle) if how.signed else codes


def _paired(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] to bytes [rows * ceil(n * bits / 8)]: the first of two in the low half, a row's odd one alone."""
    import torch

    if bits == 8:
        return codes.reshape(-1)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.reshape(-1, 2).unbind(1)
    return (high << 4).bitwise_or_(low)


def _unpacked(stored: Tensor, bits: int) -> Tensor:
    """uint8 [n] to one code a byte, on memory of its own."""
    import torch

    return stored.clone() if bits == 8 else torch.stack([stored & 15, stored >> 4], dim=1).view(-1)
