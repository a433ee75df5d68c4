"""Unquantized numbers: one stored tensor a weight, in a type that torch has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from edgeport.errors import DecodeOnly, NonFiniteResult
from edgeport.seams import Peek
from edgeport.tensor import OnePart, Part, TensorSpec, Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors name: bytes an element, the torch type, what can be done with it ("" = copied only)
TYPES = {
    "F64": (8, "float64", "rw"),
    "F32": (4, "float32", "rw"),
    "F16": (2, "float16", "rw"),
    "BF16": (2, "bfloat16", "rw"),
    "F8_E4M3": (1, "float8_e4m3fn", ""),
    "F8_E5M2": (1, "float8_e5m2", ""),
    "I64": (8, "int64", ""),
    "I32": (4, "int32", ""),
    "I16": (2, "int16", ""),
    "I8": (1, "int8", ""),
    "U8": (1, "uint8", ""),
    "BOOL": (1, "bool", ""),
}


@cache
def byte_count(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; one number for all of a shape, since a model has thousands of tensors in a dozen shapes."""
    return prod(shape) * TYPES[format][0]


def torch_type(format: str) -> torch.dtype:
    """The torch type that a plain format's bytes are."""
    import torch

    return getattr(torch, TYPES[format][1])  # type: ignore[no-any-return]


class Plain:
    name = "plain"
    formats: Mapping[str, str] = {format: can for format, (_, _, can) in TYPES.items()}
    scratch = 0.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        for spec in specs.values():
            if spec.dtype in TYPES:
                yield self.stored_as(spec)

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        return self.stored_as(TensorSpec(name, format, shape, byte_count(format, shape)))

    def stored_as(self, spec: TensorSpec) -> Weight:
        stride = byte_count(spec.dtype, spec.shape[-1:])
        return Weight(spec.name, spec.shape, self.name, spec.dtype, OnePart("data", Part(spec, stride)))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        if self.formats[weight.format] != "rw":
            raise DecodeOnly(
                f"{weight.format} numbers can be copied and not computed with; "
                "edgeport computes with F64, F32, F16 and BF16"
            )
        values = parts["data"].view(torch_type(weight.format))
        # without columns there are no bytes to tell how many rows these are, and none is looked at
        return (values.view(-1, weight.columns) if weight.columns else values.view(0, 0)).float()

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        import torch

        stored = matrix.to(torch_type(weight.format))
        if weight.format == "F16" and not bool(stored.isfinite().all()):
            raise NonFiniteResult(
                f"a value of {matrix.abs().max().item():.4g} does not fit F16, whose largest number is 65504; "
                "use --quant bf16 or f32"
            )
        return {"data": stored.contiguous().view(torch.uint8).view(-1)}


codec = Plain()
