"""compressed-tensors' 8-bit floats (format "float-quantized"): one scale for each row of the weight, or one for all.

    X.weight:        float8_e4m3fn [out, in]
    X.weight_scale:  the model's type, [out, 1] or [1]
    X.input_scale:   [1], the activations' own scale, where that is not found anew for every token

    weight[o, i] = X.weight[o, i] * weight_scale[o]

Source: compressed-tensors 0.20 `compressors.naive_quantized`, `quantization.utils.helpers.calculate_qparams`;
the number format: https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs.affine import SCALES
from edgeport.codecs.packed import METHOD, in_config, told_schemes
from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import CorruptCheckpoint, NonFiniteResult, about
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
FINITE = 127
"""Magnitudes of either sign: the byte 127 is NaN, and so is 255."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one weight is scaled: by row or as one, and the type of the scales."""

    by_row: bool = True
    scales: str = "BF16"


class Fp8:
    name = "fp8"
    # one scale for all would need the whole weight before its first row, and a stored activation scale is kept
    formats: Mapping[str, str] = {"FP8": "rw", "FP8_STATIC": "rp"}
    grids = frozenset(formats)
    scratch = 4.5
    grid_scratch = 3.5

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises AmbiguousFormat for a kind that is not read; CorruptCheckpoint for scales of another shape."""
        told = config.get("quantization_config") or {}
        if told.get("quant_method") != METHOD or ("float", 8, -1) not in told_schemes(told):
            return
        for name, spec in specs.items():
            if name.endswith(".weight") and spec.dtype == "F8_E4M3":
                with about(name):
                    scale = specs.get(f"{name}_scale")
                    rows = prod(spec.shape[:-1])
                    if scale is None or scale.dtype not in SCALES or scale.shape not in ((rows, 1), (1,), ()):
                        came = f"{scale.dtype} {list(scale.shape)}" if scale else "missing"
                        raise CorruptCheckpoint(
                            f"{name}_scale is {came}, where {list(spec.shape)} takes [{rows}, 1] or [1] in one of "
                            f"{', '.join(SCALES)}"
                        )
                    yield lay_out(spec, scale, specs.get(name.removesuffix("weight") + "input_scale"))

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """With a scale a row, in bfloat16."""
        return of_shape(name, shape, "BF16")

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        return parts["codes"].view(torch.float8_e4m3fn).view(-1, weight.columns).float().mul_(steps_of(weight, parts))

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Rounded to nearest under the scales of `calculate_qparams`. Raises NonFiniteResult."""
        import torch

        dtype = torch_type(cast(Scaling, weight.parameters).scales)
        low, high = matrix.aminmax(dim=1, keepdim=True)
        # by a tensor: CUDA multiplies by a number's reciprocal, which rounds otherwise
        scale = torch.maximum(-low, high).div_(low.new_tensor(LARGEST))
        stored = torch.where(scale == 0, torch.finfo(dtype).eps, scale).to(dtype)
        if not bool(stored.isfinite().all()):
            raise NonFiniteResult("a scale does not fit the type that scales are stored in; use --quant bf16")
        codes = (matrix / stored.float()).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8).view(-1), "scale": stored.view(-1).view(torch.uint8)}

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        import torch

        stored = parts["codes"].view(-1, weight.columns)
        ascending = [*range(127 + FINITE, 127, -1), *range(FINITE)]
        levels = torch.tensor(ascending, dtype=torch.uint8, device=stored.device).view(torch.float8_e4m3fn).float()
        step = steps_of(weight, parts).expand(len(stored), 1).contiguous()
        return Grid(levels, step, torch.full_like(step, -0.0), turned_over(stored), uniform=False)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": turned_back(codes).view(-1)}


codec = Fp8()


def lay_out(codes: TensorSpec, scale: TensorSpec, activations: TensorSpec | None) -> Weight:
    by_row = len(scale.shape) == 2
    parts = {"codes": Part(codes, codes.shape[-1]), "scale": Part(scale, TYPES[scale.dtype][0] if by_row else 0)}
    if activations is not None:
        parts["activations"] = Part(activations, 0)
    format = "FP8" if by_row and activations is None else "FP8_STATIC"
    return Weight(codes.name, codes.shape, codec.name, format, parts, parameters=Scaling(by_row, scale.dtype))


def of_shape(name: str, shape: tuple[int, ...], scales: str) -> Weight:
    """A weight with a scale a row of that type."""
    rows = prod(shape[:-1])
    codes = TensorSpec(name, "F8_E4M3", shape, prod(shape))
    return lay_out(codes, TensorSpec(f"{name}_scale", scales, (rows, 1), rows * TYPES[scales][0]), None)


def steps_of(weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 [rows, 1] or [1, 1]: what a stored 1.0 stands for."""
    return parts["scale"].view(torch_type(cast(Scaling, weight.parameters).scales)).float().view(-1, 1)


def turned_over(stored: Tensor) -> Tensor:
    """Bytes with their sign on top to places in the order of their values: 254 (the least) to 128, then 0 to 126."""
    import torch

    return torch.where(stored < 128, stored + FINITE, 127 + FINITE - stored)


def turned_back(places: Tensor) -> Tensor:
    """The inverse of `turned_over`."""
    import torch

    return torch.where(places >= FINITE, places - FINITE, 127 + FINITE - places)


def quantization_config() -> dict[str, Any]:
    """What compressed-tensors writes into config.json for the preset FP8_DYNAMIC."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    return in_config(weights, {**weights, "strategy": "token", "dynamic": True}, "float-quantized")
