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
from edgeport.errors import BlockMismatch, CodecError, NonFiniteResult, UnknownName
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"NBITS4": (4, True), "NBITS4_ZP": (4, False), "NBITS8": (8, True), "NBITS8_ZP": (8, False)}
"""Format name to bits, and whether all blocks share the zero in the middle."""
BLOCK_SIZES = (16, 32, 64, 128)
SCALES, ZERO_POINTS = ".scales", ".zero_points"
SPREADS = {True: (1.0, 0.94, 1.06, 0.88, 1.12), False: (1.0, 0.93, 0.86, 0.79, 0.72)}
"""Scales that a search tries, as shares of the one that the block's extremes give, for blocks symmetric or not."""
ROUNDING_ERROR = 1e-5
"""Share by which one error has to be less than another to be taken for less."""
PIECES = 4
"""Into how many pieces a block of rows is cut for the search, so that its temporaries stay small."""


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
        """To nearest, on the grid that the extremes of a block give. Symmetric: the value of largest magnitude becomes the
        lowest code, as in ggml's Q4_0, whose blocks therefore come through unchanged. Else the range with 0 in it is spread
        over all codes. Of 4 bits, the scale is searched where `weights_of` can say what an error matters.
        Raises NonFiniteResult, CodecError.
        """
        import torch

        how = blocks_of(weight)
        found = [
            searched(values, weights_of(values, importance, how), how)
            for values in torch.split(matrix, max(-(-len(matrix) // PIECES), 1))
        ]
        scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
        stored = scales.to(torch_type(how.scale))
        scales = stored.float()
        if not bool(scales.isfinite().all()):
            raise NonFiniteResult(f"a scale does not fit {how.scale}; use --quant bf16 or f32")
        codes = coded(matrix.reshape(-1, how.size), scales, zeros, how).to(torch.uint8)
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
            levels, offset = levels - how.middle, torch.full_like(step, -0.0)
        else:
            offset = _unpacked(parts["zeros"], how.bits).view(len(step), -1)[:, :per_row].float().mul_(step).neg_()
        return Grid(levels, step, offset, codes, uniform=True, scales=torch_type(how.scale))

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": _stored(codes.reshape(-1), blocks_of(weight))}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        import torch

        return {**parts, "scales": grid.step.reshape(-1).to(torch_type(blocks_of(weight).scale)).view(torch.uint8)}


codec = NBits()


def extremes(values: Tensor, how: Blocks) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block of float32 `values` [blocks, size], from its extremes."""
    import torch

    if how.symmetric:
        low, high = values.amin(1), values.amax(1)
        scales = torch.where(high > -low, high, low).div_(-how.middle)
        return scales, torch.full_like(scales, how.middle)
    low, high = values.amin(1).clamp_(max=0), values.amax(1).clamp_(min=0)
    # by a tensor: CUDA multiplies by a number's reciprocal, which rounds otherwise
    scales = (high - low).div_(low.new_tensor((1 << how.bits) - 1))
    return scales, zero_points(low, scales, how)


def zero_points(low: Tensor, scales: Tensor, how: Blocks) -> Tensor:
    """The codes of 0 where `low` is to have code 0."""
    return (low * inverted(scales)).neg_().round_().clamp_(0, (1 << how.bits) - 1)


def inverted(scales: Tensor) -> Tensor:
    """1 / scale; 0 of a block of zeros."""
    return scales.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def coded(values: Tensor, scales: Tensor, zeros: Tensor, how: Blocks) -> Tensor:
    """The nearest codes, as float32 [blocks, size]."""
    codes = (values * inverted(scales).unsqueeze(1)).add_(zeros.unsqueeze(1))
    return codes.round_().clamp_(0, (1 << how.bits) - 1)


def weights_of(values: Tensor, importance: Tensor | None, how: Blocks) -> Tensor | None:
    """What the square of an error matters, for each of float32 `values` [rows, columns]; None: not worth a search.

    With importance as ggml weighs it (`quantize_row_q4_0_impl`), else by the value's own square, where blocks have zero
    points: symmetric ones gain nothing by that on a real model (bench/results/four-bits.txt). Raises CodecError.
    """
    if importance is not None and importance.shape != values.shape[1:]:
        raise CodecError(f"importance has shape {tuple(importance.shape)}, where rows have {values.shape[1]} columns")
    if how.bits != 4 or (importance is None and how.symmetric):
        return None
    squares = values.square()
    if importance is None:
        return squares
    return squares.add_(squares.mean(1, keepdim=True)).sqrt_().mul_(importance.to(values.device, values.dtype))


def searched(values: Tensor, weights: Tensor | None, how: Blocks) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block of float32 `values` [rows, columns]: of some spreads of the codes the one whose
    weighted squared error is least, each with the scale that is best for its codes.

    For codes c relative to the zero point that scale is sum(w v c) / sum(w c^2), and it takes sum(w v c)^2 / sum(w c^2)
    off the error. What lies on a grid keeps it, to the bit. Source: ggml-quants.c `make_qx_quants`.
    """
    import torch

    values = values.reshape(-1, how.size)
    first, zeros = extremes(values, how)
    if weights is None:
        return first, zeros
    weights = weights.view(-1, how.size)
    low = values.amin(1).clamp_(max=0)
    best = torch.zeros_like(first)
    scales = first.clone()
    for spread in SPREADS[how.symmetric]:
        tried = first * spread
        middle = zeros if how.symmetric else zero_points(low, tried, how)
        codes = coded(values, tried, middle, how).sub_(middle.unsqueeze(1))
        weighted = codes * weights
        square, product = (weighted * codes).sum(1), (weighted * values).sum(1)
        if spread == 1:
            best, chosen = 2 * tried * product - tried.square() * square, middle.clone()
        gain = (product.square() / square).nan_to_num_(0.0)
        better = gain > best * (1 + ROUNDING_ERROR)
        best = torch.where(better, gain, best)
        scales = torch.where(better, product / square, scales)
        chosen = torch.where(better, middle, chosen)
    return scales, chosen


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
    if count % 2 and how.bits == 4 and not how.symmetric and how.scale != "F32":
        raise BlockMismatch(
            f"rows of {columns} columns are {count} blocks of {how.size}, and onnxruntime's CUDA kernels misread the zero points "
            "of an odd number; give another --block-size, or leave out --asymmetric"
        )
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
