"""What --quant makes of a transformers folder's linear layers, and the quantization_config that tells transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.codecs import awq, bnb4, fp8, gptq, int8, packed
from edgeport.errors import UnsupportedArchitecture
from edgeport.registry import codec
from edgeport.tensor import EMBEDDING, HEAD, Weight

WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
"""Plain formats that no precision is meant for."""
BITSANDBYTES = "bitsandbytes"
METHODS = (BITSANDBYTES, gptq.METHOD, awq.METHOD, packed.METHOD)
"""The values of quant_method whose tensors a codec claims."""
LINEAR = re.compile(r"model\.layers\.\d+\.(?!.*\bexperts\b).+\.weight")
GROUPS = (128, 64, 32)
"""Columns that share a scale, in the order of preference."""
WHOLE = -1
"""The group_size of one group a row."""


@dataclass(frozen=True, slots=True)
class Quant:
    """A number format for the linear layers, as the packages of that format lay it out by default."""

    format: str
    lay_out: Callable[[Weight], Weight]
    config: Mapping[str, Any]
    symmetric: bool | None = None
    """Of a format that comes both ways."""

    def holds(self, weight: Weight) -> bool:
        """Whether the weight is in that format already."""
        return weight.format == self.format and self.symmetric in (None, getattr(weight.parameters, "symmetric", None))


@dataclass(frozen=True, slots=True)
class Model:
    """What a format's defaults may depend on: the type that the model computes in, and the columns of its layers."""

    dtype: str
    columns: Collection[int]

    @property
    def group(self) -> int:
        """The largest usual group that every layer divides into. A model has one group_size."""
        return next((group for group in GROUPS if all(count % group == 0 for count in self.columns)), WHOLE)


def of_bitsandbytes(format: str) -> Callable[[Model], Quant]:
    def make(model: Model) -> Quant:
        def lay_out(weight: Weight) -> Weight:
            if format == int8.FORMAT:
                return codec("int8").layout(weight.name, weight.shape, format)
            return bnb4.lay_out(weight.name, weight.shape, bnb4.new_state(format, model.dtype))

        return Quant(format, lay_out, bitsandbytes_config(format, model.dtype))

    return make


def bitsandbytes_config(format: str, dtype: str) -> dict[str, Any]:
    """What transformers writes into config.json (`BitsAndBytesConfig.to_dict`)."""
    four, (kind, nested) = format in bnb4.FORMATS, bnb4.FORMATS.get(format, ("fp4", False))
    return {
        "_load_in_4bit": four, "_load_in_8bit": not four, "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0, "load_in_4bit": four, "load_in_8bit": not four, "quant_method": BITSANDBYTES,
    }  # fmt: skip


def of_gptq(bits: int) -> Callable[[Model], Quant]:
    def make(model: Model) -> Quant:
        def lay_out(weight: Weight) -> Weight:
            group = weight.columns if model.group == WHOLE else model.group
            return gptq.lay_out(weight.name.removesuffix(".weight"), weight.shape, gptq.Packing(bits, group))

        return Quant(f"GPTQ_{bits}", lay_out, gptq.quantization_config(gptq.Packing(bits, model.group)))

    return make


def of_awq(model: Model) -> Quant:
    def lay_out(weight: Weight) -> Weight:
        group = weight.columns if model.group == WHOLE else model.group
        return awq.lay_out(weight.name.removesuffix(".weight"), weight.shape, awq.Grouping(group))

    return Quant(awq.FORMAT, lay_out, awq.quantization_config(awq.Grouping(model.group)))


def of_packed(bits: int, symmetric: bool) -> Callable[[Model], Quant]:
    def make(model: Model) -> Quant:
        def lay_out(weight: Weight) -> Weight:
            group = weight.columns if model.group == WHOLE else model.group
            how = packed.Scheme(bits, group, symmetric, scales=bnb4.DTYPES[model.dtype])
            return packed.lay_out(weight.name.removesuffix(".weight"), weight.shape, how)

        config = packed.quantization_config(packed.Scheme(bits, model.group, symmetric), model.group)
        return Quant(f"W{bits}A16", lay_out, config, symmetric)

    return make


def of_fp8(model: Model) -> Quant:
    scales = bnb4.DTYPES[model.dtype]
    return Quant("FP8", lambda weight: fp8.of_shape(weight.name, weight.shape, scales), fp8.quantization_config())


QUANTS: Mapping[str, Callable[[Model], Quant]] = {
    "nf4": of_bitsandbytes("NF4"), "nf4-dq": of_bitsandbytes("NF4_DQ"),
    "fp4": of_bitsandbytes("FP4"), "fp4-dq": of_bitsandbytes("FP4_DQ"), "int8": of_bitsandbytes(int8.FORMAT),
    **{f"gptq-{bits}": of_gptq(bits) for bits in gptq.BITS}, "awq-4": of_awq,
    "w4a16": of_packed(4, True), "w4a16-asym": of_packed(4, False), "w8a16": of_packed(8, True), "fp8-dynamic": of_fp8,
}  # fmt: skip
"""By the name that --quant has. dq: double quantization, whose scales are quantized too."""


def choose(name: str, weights: Collection[Weight], dtype: str) -> Quant | None:
    """The quantization of that name for a model with these weights; None where its linear layers are in it already."""
    linear = [weight for weight in weights if is_linear(weight)]
    quant = QUANTS[name](Model(dtype, {weight.columns for weight in linear}))
    return None if linear and all(map(quant.holds, linear)) else quant


def is_linear(weight: Weight) -> bool:
    """Whether transformers quantizes it: the linear layers of the decoder, and not the head. Raises UnsupportedArchitecture.

    Source: transformers `quantizers.base.get_keys_to_not_convert`, `integrations.bitsandbytes.replace_with_bnb_linear`.
    """
    if weight.name in (EMBEDDING, HEAD) or len(weight.shape) < 2 or weight.format in WHOLE_NUMBERS:
        return False
    if len(weight.shape) == 2 and LINEAR.fullmatch(weight.name):
        return True
    raise UnsupportedArchitecture(
        f"{weight.name} {list(weight.shape)} may or may not be a layer that transformers quantizes; edgeport knows that of "
        "decoders with dense layers (model.layers.N....) alone; use --quant bf16"
    )
