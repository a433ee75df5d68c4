"""Weights as a run sees them: parts written and read a block of rows at a time, and the memory that codecs take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgeport.blocks import ranges
from edgeport.seams import Codec, Finishing
from edgeport.tensor import Part, Weight


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def in_lines(part: Part, data: torch.Tensor, rows: range, granule: int) -> torch.Tensor:
    """The bytes of some rows, [lines, bytes], on the memory of a whole part (uint8, flat)."""
    return data.view(part.lines, part.pitch)[:, slice(*part.span(rows, granule))]


def streamed(codec: Codec, weight: Weight, matrix: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """Every part as the run makes it: a block of rows at a time, tables once, the rest when all is seen."""
    poison = partial(torch.full, fill_value=7, dtype=torch.uint8, device=matrix.device)
    parts = {role: poison((part.spec.nbytes,)) for role, part in weight.parts.items()}
    later: dict[str, list[torch.Tensor]] = {}
    for some in ranges(weight, rows, min(weight.granule, weight.rows)):
        for role, data in codec.encode(weight, matrix[some.start : some.stop], None).items():
            assert data.dtype == torch.uint8
            if role in parts:
                part = weight.parts[role]
                in_lines(part, parts[role], some, weight.granule).copy_(data.view(part.lines, -1))
            else:
                later.setdefault(role, []).append(data.cpu())
    if later:
        assert isinstance(codec, Finishing)
        finished = codec.finish(weight, {role: torch.cat(data) for role, data in later.items()})
        parts |= {role: data.to(matrix.device) for role, data in finished.items()}
    return parts


def blocks_of(weight: Weight, parts: Mapping[str, torch.Tensor], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Stored bytes of some rows at a time, as they are read from a file."""
    for some in ranges(weight, rows, min(weight.granule, weight.rows)):
        yield {
            role: in_lines(part, parts[role], some, weight.granule).reshape(-1) for role, part in weight.parts.items()
        }


class Live(TorchDispatchMode):
    """The most bytes that tensors made in its block have taken at once."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.sizes: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.inputs:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.sizes = {key: (ref, size) for key, (ref, size) in self.sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.sizes.values()))
        return result
