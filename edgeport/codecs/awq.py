"""AWQ: 4 bits a weight, one scale and zero for each output channel and group of input channels.

A layer of [out, in] weights is stored turned (version "gemm"), so that a row of the weight is a column of each tensor:

    X.qweight:  int32 [in, out / 8], eight rows of the weight a word, from the lowest bits: 0 2 4 6 1 3 5 7
    X.qzeros:   int32 [groups, out / 8], zeros in the same order
    X.scales:   float16 [groups, out]

    weight[o, i] = (code[i, o] - zero[i / group, o]) * scales[i / group, o]

Source: AutoAWQ 0.2.9 `utils.packing_utils` (dequantize_gemm), `modules.linear.gemm.WQLinear_GEMM.from_linear`,
`quantize.quantizer.AwqQuantizer.pseudo_quantize_tensor` (https://arxiv.org/abs/2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs.affine import (
    Affine,
    checked,
    extremes,
    layers,
    nearest,
    need_multiple,
    to_lines,
    told_group,
    turned,
    turned_layer,
)
from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import AmbiguousFormat, about
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "awq"
BITS = 4
FORMAT = "AWQ_4"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The rows of eight, in the order of their bits in a word."""
PARTS = ("qweight", "qzeros", "scales")
LEAST_SPREAD = 1e-5


@dataclass(frozen=True, slots=True)
class Grouping:
    """How one weight is quantized. `group`: input channels a group."""

    group: int
    scales: str = "F16"

    @property
    def text(self) -> str:
        return f"{FORMAT} with groups of {self.group}"


def grouping_of(weight: Weight) -> Grouping:
    return cast(Grouping, weight.parameters)


class Awq:
    name = "awq"
    formats: Mapping[str, str] = {FORMAT: "rw"}
    grids = frozenset(formats)
    scratch = 2.0
    grid_scratch = 2.0
    # https://arxiv.org/abs/2306.00978, section 3.2
    caution = (
        "AWQ as a rule scales a model's columns, and what stands before them the other way: a patch made on weights without "
        "those scales is off by them; edgeport diagnose --old-base shows by how much"
    )

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises AmbiguousFormat for a kind that is not read; CorruptCheckpoint where tensors and config disagree."""
        told = config.get("quantization_config") or {}
        if told.get("quant_method") != METHOD:
            return
        version, group = str(told.get("version") or told.get("format") or "gemm").lower(), told_group(told)
        if told.get("bits") != BITS or version != "gemm":
            raise AmbiguousFormat(
                f"quantization_config says {told.get('bits')!r} bits, version {version!r}; edgeport reads 4 bits, version 'gemm'"
            )
        for layer in layers(specs, PARTS):
            with about(f"{layer}.weight"):
                packed, scales = turned_layer(layer, specs)
                shape = (8 * packed.shape[1], packed.shape[0])
                how = Grouping(shape[1] if group == -1 else group, scales.dtype)
                yield checked(lay_out(layer, shape, how), specs, f"{how.text} (as quantization_config says)")

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """In groups of 128. Raises BlockMismatch."""
        return lay_out(name.removesuffix(".weight"), shape, Grouping(128))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        return read(weight, parts).values()

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Rounded to nearest under the scales of AutoAWQ's `pseudo_quantize_tensor`."""
        import torch

        how = grouping_of(weight)
        low, high = extremes(matrix, how.group)
        # by a tensor: CUDA multiplies by a number's reciprocal, which rounds otherwise
        scale = high.sub(low).clamp_(min=LEAST_SPREAD).div_(low.new_tensor(15))
        zero = (low / scale).round_().neg_().clamp_(0, 15)
        stored_scale = scale.to(torch_type(how.scales))
        found = nearest(matrix, stored_scale.float(), zero, how.group, BITS)
        return {
            "qweight": interleave(found.codes), "qzeros": interleave(zero.to(torch.uint8)), "scales": to_lines(stored_scale),
        }  # fmt: skip

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        return read(weight, parts).grid(BITS, grouping_of(weight).scales)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "qweight": interleave(codes)}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        return {**parts, "scales": to_lines(grid.step.to(torch_type(grouping_of(weight).scales)))}


codec = Awq()


def lay_out(layer: str, shape: tuple[int, ...], how: Grouping) -> Weight:
    """How a weight with these parameters is stored. Raises BlockMismatch."""
    rows, columns = shape
    need_multiple("rows", rows, 8, FORMAT)
    need_multiple("columns", columns, how.group, how.text)
    groups, item = columns // how.group, TYPES[how.scales][0]
    packed = TensorSpec(f"{layer}.qweight", "I32", (columns, rows // 8), columns * rows // 2)
    zeros = TensorSpec(f"{layer}.qzeros", "I32", (groups, rows // 8), groups * rows // 2)
    scales = TensorSpec(f"{layer}.scales", how.scales, (groups, rows), groups * rows * item)
    parts = {"qweight": Part(packed, 4, columns), "qzeros": Part(zeros, 4, groups), "scales": Part(scales, 8 * item, groups)}
    return Weight(f"{layer}.weight", shape, codec.name, FORMAT, parts, 8, parameters=how)


def read(weight: Weight, parts: Mapping[str, Tensor]) -> Affine:
    how, groups = grouping_of(weight), weight.parts["scales"].lines
    scale = turned(parts["scales"], groups, torch_type(how.scales)).float()
    codes, zeros = deinterleave(parts["qweight"], weight.columns), deinterleave(parts["qzeros"], groups)
    return Affine(codes, scale, zeros.float(), how.group)


def deinterleave(stored: Tensor, lines: int) -> Tensor:
    """uint8 [bytes] of so many lines to uint8 [rows, lines]."""
    import torch

    words = stored.view(lines, -1, 4).permute(1, 2, 0)
    codes = torch.empty((words.shape[0], 8, lines), dtype=torch.uint8, device=stored.device)
    for place, row in enumerate(ORDER):
        byte = words[:, place // 2]
        codes[:, row] = byte >> 4 if place % 2 else byte & 15
    return codes.view(-1, lines)


def interleave(codes: Tensor) -> Tensor:
    """uint8 [rows, lines] to uint8 [bytes]: the inverse of `deinterleave`."""
    import torch

    rows = codes.t().reshape(codes.shape[1], -1, 8)
    stored = torch.empty((*rows.shape[:2], 4), dtype=torch.uint8, device=codes.device)
    for byte in range(4):
        low, high = ORDER[2 * byte : 2 * byte + 2]
        torch.bitwise_or(rows[:, :, low], rows[:, :, high] << 4, out=stored[:, :, byte])
    return stored.view(-1)


def quantization_config(how: Grouping) -> dict[str, Any]:
    """What AutoAWQ writes into config.json (`AwqConfig.to_transformers_dict`)."""
    return {
        "bits": BITS, "group_size": how.group, "modules_to_not_convert": None, "quant_method": METHOD, "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
