"""bitsandbytes' LLM.int8(): a signed byte a weight and one float32 a row, value = code * SCB / 127.

    X.weight:         int8 [rows, columns]
    X.SCB:            float32 [rows], the largest magnitude of each row in float16
    X.weight_format:  uint8, 0: the codes lie row by row

Source: bitsandbytes 0.50 `functional.int8_vectorwise_quant`, `nn.Linear8bitLt` (https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from edgeport.errors import AmbiguousFormat, CorruptCheckpoint, NonFiniteResult
from edgeport.grid import Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "LLM_INT8"
PER_STEP = 7.874015718698502e-3
"""1 / 127 as bitsandbytes has it."""


class Int8:
    name = "int8"
    formats: Mapping[str, str] = {FORMAT: "rw"}
    grids = frozenset(formats)
    # a float16 copy, and its float32 quotients
    scratch = 8.0
    grid_scratch = 2.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises CorruptCheckpoint for scales of another number; AmbiguousFormat for codes in a GPU's own order."""
        for name, spec in specs.items():
            scales = specs.get(_beside(name, "SCB"))
            if spec.dtype != "I8" or scales is None or not name.endswith(".weight"):
                continue
            if (scales.dtype, scales.nbytes) != ("F32", 4 * prod(spec.shape[:-1])):
                came = f"{scales.dtype} {list(scales.shape)}"
                raise CorruptCheckpoint(f"{scales.name} is {came}, where the rows of {name} {list(spec.shape)} take an F32 each")
            order = specs.get(_beside(name, "weight_format"))
            if order is not None and any(peek(order.name)):
                raise AmbiguousFormat(f"{name} is not stored row by row; load and save it with bitsandbytes 0.45 or newer first")
            yield _lay_out(spec, scales, order)

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        rows = prod(shape[:-1])
        scales = TensorSpec(_beside(name, "SCB"), "F32", (rows,), 4 * rows)
        order = TensorSpec(_beside(name, "weight_format"), "U8", (), 1)
        return _lay_out(TensorSpec(name, "I8", shape, prod(shape)), scales, order)

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        return parts["codes"].view(torch.int8).view(-1, weight.columns).float().mul_(_steps(parts))

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Raises NonFiniteResult where a value does not fit float16."""
        import torch

        half = matrix.half()
        scales = half.abs().amax(dim=1).float()
        if not bool(scales.isfinite().all()):
            raise NonFiniteResult("a value does not fit float16, through which int8 goes (largest: 65504); use --quant bf16")
        # a row of zeros would be 0 times infinity
        codes = (half * (127.0 / scales.unsqueeze(1))).round_().nan_to_num_(0.0).to(torch.int8)
        stored = {"codes": codes.view(torch.uint8).view(-1), "scales": scales.view(torch.uint8)}
        return stored | ({"order": torch.zeros(1, dtype=torch.uint8)} if "order" in weight.parts else {})

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        import torch

        step = _steps(parts)
        levels = torch.arange(-128, 128, dtype=torch.float32, device=step.device)
        codes = (parts["codes"] ^ 128).view(-1, weight.columns)
        return Grid(levels, step, torch.full_like(step, -0.0), codes, uniform=True)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": (codes ^ 128).reshape(-1)}


codec = Int8()


def _beside(name: str, what: str) -> str:
    return name.removesuffix("weight") + what


def _lay_out(codes: TensorSpec, scales: TensorSpec, order: TensorSpec | None) -> Weight:
    parts = {"codes": Part(codes, codes.shape[-1]), "scales": Part(scales, 4)}
    if order is not None:
        parts["order"] = Part(order, 0)
    return Weight(codes.name, codes.shape, codec.name, FORMAT, parts)


def _steps(parts: Mapping[str, Tensor]) -> Tensor:
    """float32 [rows, 1] between neighbouring codes."""
    import torch

    return (parts["scales"].view(torch.float32) * PER_STEP).unsqueeze(1)
