"""compressed-tensors' packed whole numbers (format "pack-quantized"): W4A16 and W8A16, with or without zero points.

    X.weight_packed:      int32 [out, in * bits / 32], codes packed along a row, less their sign: -8 to 7 are 0 to 15
    X.weight_scale:       the model's type [out, groups]
    X.weight_zero_point:  int32 [out * bits / 32, groups], packed along the output, likewise; absent where symmetric
    X.weight_shape:       int64 [2]
    X.weight_g_idx:       int32 [in], the group of each column, as releases of 2024 and 2025 stored act-order

    weight[o, i] = (code[o, i] - zero[o, group of i]) * scale[o, group of i]

Source: compressed-tensors 0.20 `compressors.pack_quantized`, `quantization.utils.helpers.calculate_qparams`,
`quantization.lifecycle.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs.affine import (
    SCALES,
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
    to_lines,
    unpack,
    words,
)
from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import AmbiguousFormat, CorruptCheckpoint, about
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "compressed-tensors"
BITS = (4, 8)
PARTS = ("weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is quantized. `group`: columns a group. `act_order`: whether there is a g_idx that is not in order."""

    bits: int
    group: int
    symmetric: bool = True
    act_order: bool = False
    scales: str = "BF16"
    indexed: bool = False
    """Whether there is a g_idx."""

    @property
    def format(self) -> str:
        return f"W{self.bits}A16" + ("_ACT_ORDER" if self.act_order else "")


def scheme_of(weight: Weight) -> Scheme:
    return cast(Scheme, weight.parameters)


class Packed:
    name = "packed"
    formats: Mapping[str, str] = {f"W{bits}A16": "rw" for bits in BITS} | {f"W{bits}A16_ACT_ORDER": "rp" for bits in BITS}
    grids = frozenset(formats)
    scratch = 2.0
    # with act-order a step and an offset for every weight
    grid_scratch = 12.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises AmbiguousFormat for a kind that is not read; CorruptCheckpoint where tensors and config disagree."""
        told = config.get("quantization_config") or {}
        if told.get("quant_method") != METHOD:
            return
        known = told_schemes(told)
        for layer in layers(specs, PARTS):
            with about(f"{layer}.weight"):
                yield self._claimed(layer, specs, known, peek)

    def _claimed(self, layer: str, specs: Mapping[str, TensorSpec], known: set[tuple[str, int, int]], peek: Peek) -> Weight:
        packed, scale, size, index = (specs.get(f"{layer}.weight_{part}") for part in ("packed", "scale", "shape", "g_idx"))
        if packed is None or size is None or scale is None or len(scale.shape) != 2 or scale.dtype not in SCALES:
            raise CorruptCheckpoint(
                f"{layer} lacks a weight_packed, a weight_shape, or a weight_scale of two dimensions in one of "
                f"{', '.join(SCALES)}"
            )
        shape = read_shape(size, peek)
        bits = next((bits for bits in BITS if packed.shape == (shape[0], words_of(shape[1], bits))), 0)
        group = 0 if shape[1] % max(scale.shape[1], 1) else shape[1] // scale.shape[1]
        told = ("int", bits, -1 if scale.shape[1] == 1 else group)
        if told not in known and ("int", bits, group) not in known:
            raise CorruptCheckpoint(
                f"weight_shape {list(shape)}, weight_packed {list(packed.shape)} and weight_scale {list(scale.shape)} are in no "
                "scheme that quantization_config has"
            )
        symmetric = f"{layer}.weight_zero_point" not in specs
        ordered = index is None or in_order(peek(index.name), group, scale.shape[1])
        how = Scheme(bits, group, symmetric, not ordered, scale.dtype, index is not None)
        return checked(lay_out(layer, shape, how, size.dtype), specs, f"{how.format} with groups of {group}")

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """As the preset of that name has it: symmetric, in groups of 128. Raises BlockMismatch."""
        return lay_out(name.removesuffix(".weight"), shape, Scheme(int(format[1]), 128))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        return read(weight, parts).values()

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Rounded to nearest under the scales of `calculate_qparams`: both ends and zero are in every group's range."""
        import torch

        how = scheme_of(weight)
        low, high = extremes(matrix, how.group)
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        largest = (1 << how.bits) - 1
        steps = low.new_tensor(largest)  # CUDA multiplies by a number's reciprocal, which rounds otherwise
        scale = torch.maximum(-low, high) / (steps / 2) if how.symmetric else (high - low) / steps
        dtype = torch_type(how.scales)
        stored_scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale).to(dtype)
        zero = torch.full_like(scale, 1 << how.bits - 1)
        if not how.symmetric:
            zero = (-low / scale).nan_to_num_(0.0).clamp_(0, largest).round_()
        found = nearest(matrix, stored_scale.float(), zero, how.group, how.bits)
        stored = {"packed": pack(found.codes, how.bits).view(-1), "scale": stored_scale.view(-1).view(torch.uint8)}
        if not how.symmetric:
            stored["zero_point"] = to_lines(words(flipped(zero.to(torch.uint8)), how.bits))
        if how.indexed:
            stored["g_idx"] = (torch.arange(weight.columns, dtype=torch.int32) // how.group).view(torch.uint8)
        size = torch.tensor(weight.shape, dtype=torch_type(weight.parts["shape"].spec.dtype))
        return stored | {"shape": size.view(torch.uint8)}

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        return read(weight, parts).grid(scheme_of(weight).bits, scheme_of(weight).scales)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "packed": pack(codes, scheme_of(weight).bits).view(-1)}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        import torch

        return {**parts, "scale": grid.step.to(torch_type(scheme_of(weight).scales)).view(-1).view(torch.uint8)}


codec = Packed()


def told_schemes(told: Mapping[str, Any]) -> set[tuple[str, int, int]]:
    """Type, bits and group size (-1: a whole row or more) of each scheme in a quantization_config. Raises AmbiguousFormat."""
    groups = told.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise AmbiguousFormat("quantization_config has no config_groups; load and save the model with compressed-tensors first")
    sparse = told.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise AmbiguousFormat(f"sparsity_config says {sparse}, and edgeport reads weights with all their zeros alone")
    if turned := told.get("transform_config"):
        kinds = ", ".join(turned.get("config_groups") or turned) if isinstance(turned, Mapping) else str(turned)
        raise AmbiguousFormat(f"transform_config says that the weights are rotated ({kinds}), and edgeport knows no rotations")
    found = set()
    for name, scheme in groups.items():
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping):
            raise AmbiguousFormat(f"{name} of quantization_config does not say how weights are quantized")
        kind, bits, group = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("group_size")
        strategy = weights.get("strategy") or ("group" if group not in (None, -1) else "channel")
        layout = scheme.get("format") or told.get("format")
        read_as = {"int": ("pack-quantized",), "float": ("float-quantized", "naive-quantized")}.get(str(kind), ())
        able = (kind == "int" and bits in BITS and strategy in ("group", "channel")) or (
            kind == "float" and bits == 8 and strategy in ("tensor", "channel")
        )
        if not able or layout not in read_as:
            raise AmbiguousFormat(
                f"{name} of quantization_config is {kind} of {bits!r} bits by {strategy}, {layout}; edgeport reads int of 4 or 8 "
                "bits by group or channel, pack-quantized, and float of 8 bits by channel or tensor, float-quantized"
            )
        found.add((kind, bits, group if strategy == "group" and type(group) is int else -1))
    return found


def read_shape(size: TensorSpec, peek: Peek) -> tuple[int, int]:
    """What a weight_shape says. Raises CorruptCheckpoint."""
    import numpy as np

    if size.dtype not in ("I64", "I32") or size.shape != (2,):
        raise CorruptCheckpoint(f"{size.name} is {size.dtype} {list(size.shape)}, where two whole numbers were expected")
    rows, columns = np.frombuffer(peek(size.name), np.dtype(TYPES[size.dtype][1]).newbyteorder("<")).tolist()
    if not (0 < rows < 1 << 48 and 0 < columns < 1 << 48):
        raise CorruptCheckpoint(f"{size.name} says the impossible shape [{rows}, {columns}]")
    return rows, columns


def words_of(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def lay_out(layer: str, shape: tuple[int, ...], how: Scheme, sizes: str = "I64") -> Weight:
    """How a weight with these parameters is stored. Raises BlockMismatch."""
    rows, columns = shape
    need_multiple("columns", columns, how.group, f"{how.format} with groups of {how.group}")
    groups, item, width = columns // how.group, TYPES[how.scales][0], words_of(columns, how.bits)
    granule = 1 if how.symmetric else WORD // how.bits

    def spec(role: str, dtype: str, *shape: int) -> TensorSpec:
        size = TYPES[dtype][0]
        for length in shape:
            size *= length
        return TensorSpec(f"{layer}.weight_{role}", dtype, shape, size)

    parts = {
        "packed": Part(spec("packed", "I32", rows, width), 4 * width * granule),
        "scale": Part(spec("scale", how.scales, rows, groups), item * groups * granule),
        "shape": Part(spec("shape", sizes, 2), 0),
    }
    if not how.symmetric:
        parts["zero_point"] = Part(spec("zero_point", "I32", words_of(rows, how.bits), groups), 4 * groups)
    if how.indexed:
        parts["g_idx"] = Part(spec("g_idx", "I32", columns), 0)
    return Weight(f"{layer}.weight", shape, codec.name, how.format, parts, granule, parameters=how)


def read(weight: Weight, parts: Mapping[str, Tensor]) -> Affine:
    import torch

    how = scheme_of(weight)
    row_bytes = 4 * words_of(weight.columns, how.bits)
    codes = unpack(parts["packed"].view(-1, row_bytes), how.bits, weight.columns)
    scale = parts["scale"].view(torch_type(how.scales)).view(len(codes), -1).float()
    zero = torch.full_like(scale, 1 << how.bits - 1)
    if not how.symmetric:
        zeros = flipped(parts["zero_point"].view(torch.int32).view(-1, scale.shape[1]))
        zero = unpack(zeros.view(torch.uint8), how.bits, len(codes)).t().float()
    index = parts["g_idx"].view(torch.int32) if how.act_order else None
    return Affine(codes, scale, zero, how.group, index)


def quantization_config(how: Scheme, group: int) -> dict[str, Any]:
    """What compressed-tensors writes into config.json for the presets W4A16, W8A16 and W4A16_ASYM. `group` -1: a whole row."""
    weights: dict[str, Any] = {"num_bits": how.bits, "type": "int", "symmetric": how.symmetric, "dynamic": False}
    weights |= {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    return in_config(weights, None, "pack-quantized")


def in_config(weights: Mapping[str, Any], activations: Mapping[str, Any] | None, layout: str) -> dict[str, Any]:
    """A quantization_config of one scheme for all linear layers but the head (`QuantizationConfig.to_dict`)."""
    scheme = {
        "targets": ["Linear"], "weights": dict(weights), "input_activations": activations, "output_activations": None,
        "format": layout,
    }  # fmt: skip
    return {
        "config_groups": {"group_0": scheme}, "format": layout, "global_compression_ratio": None, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quant_method": METHOD, "quantization_status": "compressed",
    }  # fmt: skip
