"""GPTQ: 2, 3, 4 or 8 bits a weight, one scale and zero for each output channel and group of input channels.

A layer of [out, in] weights is stored turned, so that a row of the weight is a column of each tensor:

    X.qweight:  int32 [in * bits / 32, out], codes packed along the input
    X.qzeros:   int32 [groups, out * bits / 32], zeros packed along the output; format "gptq" (v1) stores them less 1
    X.scales:   float16 [groups, out]
    X.g_idx:    int32 [in], the group of each input channel: in their order, or, with act-order, in any
    X.bias:     the layer's own, or [out] zeros, which AutoGPTQ gave to layers that have none

    weight[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o])

Source: GPTQModel 7.7 `nn_modules.qlinear.PackableQuantLinear` (pack_block, dequantize_weight), `utils.model`
(convert_gptq_v1_to_v2_format_module), `quantization.quantizer.Quantizer.find_params` (https://arxiv.org/abs/2210.17323).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs.affine import (
    WORD,
    Affine,
    checked,
    extremes,
    flipped,
    in_order,
    layers,
    nearest,
    need_multiple,
    pack,
    rows_of,
    to_lines,
    told_group,
    turned,
    turned_layer,
    unpack,
    words,
)
from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import AmbiguousFormat, about
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "gptq"
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
"""The values of checkpoint_format: how zeros are stored."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
WITHOUT_BIAS = ("llama", "mistral")
"""Values of model_type whose layers have no biases unless config.json says so."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How one weight is quantized. `group`: input channels a group. `act_order`: whether g_idx is not in order."""

    bits: int
    group: int
    symmetric: bool = True
    version: int = 1
    act_order: bool = False
    indexed: bool = True
    """Whether there is a g_idx."""
    scales: str = "F16"

    @property
    def format(self) -> str:
        return f"GPTQ_{self.bits}" + ("_ACT_ORDER" if self.act_order else "")

    @property
    def text(self) -> str:
        return f"{self.format} with groups of {self.group}"


def packing_of(weight: Weight) -> Packing:
    return cast(Packing, weight.parameters)


class Gptq:
    name = "gptq"
    # a weight in act-order keeps its groups, and so can be patched and not made anew
    formats: Mapping[str, str] = {f"GPTQ_{bits}": "rw" for bits in BITS} | {f"GPTQ_{bits}_ACT_ORDER": "rp" for bits in BITS}
    grids = frozenset(formats)
    scratch = 2.5
    # with act-order a step and an offset for every weight
    grid_scratch = 12.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises AmbiguousFormat for a kind that is not read; CorruptCheckpoint where tensors and config disagree."""
        told = config.get("quantization_config") or {}
        if told.get("quant_method") != METHOD:
            return
        told_packing(told)
        biased = config.get("model_type") not in WITHOUT_BIAS or config.get("attention_bias") or config.get("mlp_bias")
        for layer in layers(specs, PARTS):
            with about(f"{layer}.weight"):
                weight, bias = self._claimed(layer, specs, {**told, **override(told, layer)}, peek), specs.get(f"{layer}.bias")
                if bias and not biased and not any(peek(bias.name)):
                    weight = replace(weight, parts={**weight.parts, "bias": Part(bias, 0)})
                yield weight

    def _claimed(self, layer: str, specs: Mapping[str, TensorSpec], told: Mapping[str, Any], peek: Peek) -> Weight:
        (bits, version), group = told_packing(told), told_group(told)
        (packed, scales), index = turned_layer(layer, specs), specs.get(f"{layer}.g_idx")
        shape = (packed.shape[1], packed.shape[0] * WORD // bits)
        group = shape[1] if group == -1 else group
        how = Packing(bits, group, bool(told.get("sym", True)), version, False, index is not None, scales.dtype)
        weight = checked(lay_out(layer, shape, how), specs, f"{how.text} (as quantization_config says)")
        if index is None or in_order(peek(index.name), group, -(-shape[1] // group)):
            return weight
        how = replace(how, act_order=True)
        return replace(weight, format=how.format, parameters=how)

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """As GPTQModel does unless told otherwise: symmetric, in groups of 128. Raises BlockMismatch."""
        return lay_out(name.removesuffix(".weight"), shape, Packing(int(format.split("_")[1]), 128))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        return read(weight, parts).values()

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Rounded to nearest under the scales of GPTQModel's `Quantizer.find_params`.

        A group without a negative (or positive) value reaches to 0, and one of zeros to 1 on either side.
        """
        import torch

        how = packing_of(weight)
        low, high = extremes(matrix, how.group)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        largest = (1 << how.bits) - 1
        steps = low.new_tensor(largest)  # CUDA multiplies by a number's reciprocal, which rounds otherwise
        if how.symmetric:
            scale = torch.maximum(-low, high).mul_(2)
            scale = torch.where(scale == 0, 2.0, scale).div_(steps)
            zero = torch.full_like(scale, (largest + 1) / 2)
        else:
            scale = torch.where(high == low, 2.0, high - low).div_(steps)
            zero = torch.where(high == low, (largest + 1) / 2, (-low / scale).round_())
        stored_scale = scale.to(torch_type(how.scales))
        found = nearest(matrix, stored_scale.float(), zero, how.group, how.bits)
        stored = {"qweight": to_lines(words(found.codes, how.bits)), "scales": to_lines(stored_scale)}
        stored["qzeros"] = pack_zeros(zero.to(torch.uint8), how)
        if how.indexed:
            stored["g_idx"] = (torch.arange(weight.columns, dtype=torch.int32) // how.group).view(torch.uint8)
        if "bias" in weight.parts:
            stored["bias"] = torch.zeros(weight.parts["bias"].spec.nbytes, dtype=torch.uint8)
        return stored

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        return read(weight, parts).grid(packing_of(weight).bits, packing_of(weight).scales)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "qweight": to_lines(words(codes, packing_of(weight).bits))}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        return {**parts, "scales": to_lines(grid.step.to(torch_type(packing_of(weight).scales)))}


codec = Gptq()


def told_packing(told: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and version from a quantization_config. Raises AmbiguousFormat."""
    bits, word = told.get("bits"), told.get("pack_dtype", "int32")
    marlin = "marlin" if told.get("is_marlin_format") else None
    format = told.get("checkpoint_format") or told.get("format") or marlin or "gptq"
    named = isinstance(format, str) and format in VERSIONS
    if type(bits) is not int or bits not in BITS or not named or word != "int32":
        raise AmbiguousFormat(
            f"quantization_config says {bits!r} bits, format {format!r}, packed in {word}; edgeport reads "
            f"{', '.join(map(str, BITS))} bits of {' and '.join(VERSIONS)}, packed in int32"
        )
    return bits, VERSIONS[format]


def override(told: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """What `dynamic` says otherwise of one layer: the first of its regular expressions that matches.

    Source: GPTQModel `quantization.config.dynamic_get`. Raises AmbiguousFormat.
    """
    dynamic = told.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise AmbiguousFormat("dynamic in quantization_config is no table of layers")
    for pattern, values in dynamic.items():
        try:
            matches = re.match(pattern.removeprefix("+:"), layer)
        except re.error as error:
            raise AmbiguousFormat(f"{pattern!r} in quantization_config is no regular expression ({error})") from error
        if matches and isinstance(values, Mapping):
            return values
    return {}


def lay_out(layer: str, shape: tuple[int, ...], how: Packing) -> Weight:
    """How a weight with these parameters is stored. Raises BlockMismatch."""
    rows, columns = shape
    granule, groups = rows_of(how.bits), -(-columns // how.group)
    need_multiple("rows", rows, granule, how.format)
    need_multiple("columns", columns, granule, how.format)
    lines, item = columns * how.bits // WORD, TYPES[how.scales][0]
    packed = TensorSpec(f"{layer}.qweight", "I32", (lines, rows), 4 * lines * rows)
    zeros = TensorSpec(f"{layer}.qzeros", "I32", (groups, rows * how.bits // WORD), groups * rows * how.bits // 8)
    scales = TensorSpec(f"{layer}.scales", how.scales, (groups, rows), groups * rows * item)
    parts = {
        "qweight": Part(packed, 4 * granule, lines), "qzeros": Part(zeros, granule * how.bits // 8, groups),
        "scales": Part(scales, item * granule, groups),
    }  # fmt: skip
    if how.indexed:
        parts["g_idx"] = Part(TensorSpec(f"{layer}.g_idx", "I32", (columns,), 4 * columns), 0)
    return Weight(f"{layer}.weight", shape, codec.name, how.format, parts, granule, parameters=how)


def read(weight: Weight, parts: Mapping[str, Tensor]) -> Affine:
    import torch

    how = packing_of(weight)
    packed, scales = weight.parts["qweight"], weight.parts["scales"]
    codes = unpack(turned(parts["qweight"], packed.lines, torch.int32).view(torch.uint8), how.bits, weight.columns)
    scale = turned(parts["scales"], scales.lines, torch_type(how.scales)).float()
    index = parts["g_idx"].view(torch.int32) if how.act_order else None
    return Affine(codes, scale, read_zeros(parts["qzeros"], scales.lines, len(codes), how).float(), how.group, index)


def read_zeros(stored: Tensor, groups: int, rows: int, how: Packing) -> Tensor:
    """uint8 [rows, groups]. Version 1 adds 1 to whole words, as GPTQModel does: the carry undoes what storing borrowed."""
    import torch

    if how.version == 1 and 8 % how.bits == 0:
        stored = (stored.view(torch.int32) + ones(how.bits)).view(torch.uint8)
    zeros = unpack(stored.view(groups, -1), how.bits, rows).t()
    return (zeros + 1) & 7 if how.version == 1 and 8 % how.bits else zeros


def pack_zeros(zeros: Tensor, how: Packing) -> Tensor:
    """uint8 [rows, groups] to uint8 [bytes]: the inverse of `read_zeros`."""
    import torch

    if how.version == 1 and 8 % how.bits:
        zeros = (zeros - 1) & 7
    stored = pack(flipped(zeros), how.bits).view(-1)
    if how.version == 1 and 8 % how.bits == 0:
        stored = (stored.view(torch.int32) - ones(how.bits)).view(torch.uint8)
    return stored


def ones(bits: int) -> int:
    """A word of ones, at so many bits each."""
    return sum(1 << place for place in range(0, WORD, bits))


def quantization_config(how: Packing) -> dict[str, Any]:
    """What GPTQModel writes into config.json (`QuantizeConfig.to_dict`)."""
    from edgeport import __version__

    return {
        "bits": how.bits, "checkpoint_format": "gptq" if how.version == 1 else "gptq_v2", "desc_act": how.act_order,
        "group_size": how.group, "lm_head": False, "meta": {"quantizer": [f"edgeport:{__version__}"]}, "pack_dtype": "int32",
        "quant_method": METHOD, "sym": how.symmetric,
    }  # fmt: skip
