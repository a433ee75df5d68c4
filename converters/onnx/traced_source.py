"""An ONNX folder with a traced encoder, opened by its graph: its weights under their own names, and its program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.onnx.folder import MODEL, Stored, begin
from converters.onnx.graph import TYPES
from converters.onnx.precisions import PRECISIONS, Settings, read_settings
from converters.onnx.traced import TRACED
from edgeport.codecs import nbits
from edgeport.errors import ConvertError, CorruptCheckpoint
from edgeport.registry import codec
from edgeport.tensor import Weight

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2, "int8": 0.15, "int4": 0.75}
"""Error of an output, as a share of its root mean square."""
ROWS = ".rows"
"""Ends the name of a table's view as rows of bytes."""


@dataclass(frozen=True, slots=True)
class TracedSource(Stored):
    @property
    def tolerance(self) -> float:
        return max(TOLERANCE[name] for name in (self.settings.precision, self.settings.head, self.settings.embedding))

    def outputs(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        import torch

        from edgeport.runtime import open_session

        session = open_session(self.path / MODEL)
        names = [entry.name for entry in session.get_outputs()]
        try:
            found = session.run(names, {name: values.numpy() for name, values in given.items()})
        except Exception as error:  # onnxruntime's own errors have no common base
            raise ConvertError(f"onnxruntime cannot run {MODEL}: {str(error).splitlines()[0]}") from error
        return {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}


def open_traced(path: Path, config: Mapping[str, Any], model: Any, told: Mapping[str, Any]) -> TracedSource:
    """Raises CorruptCheckpoint."""
    try:
        settings = read_settings(json.dumps(told))
        tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_location}
        weights = {}
        for name, tensor in tensors.items():
            bare = name.removesuffix(ROWS)
            if bare not in weights and not bare.endswith((nbits.SCALES, nbits.ZERO_POINTS)):
                weights[bare] = stored(bare, tensor, tensors, settings, told[TRACED])
        places = {name: {entry.key: entry.value for entry in tensor.external_data} for name, tensor in tensors.items()}
        specs = [part.spec for weight in weights.values() for part in weight.parts.values()]
        views = {spec.name: spec.name if spec.name in places else spec.name + ROWS for spec in specs}
        offsets = {spec.name: begin(views[spec.name], places[views[spec.name]], spec.nbytes) for spec in specs}
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise CorruptCheckpoint(
            f"{path / MODEL} is not as this version of edgeport writes it ({type(error).__name__}: {error}); export it anew"
        ) from error
    return TracedSource(path, config, settings, weights, offsets)


def stored(name: str, tensor: Any, tensors: Mapping[str, Any], settings: Settings, table: str) -> Weight:
    """The weight that an initializer belongs to."""
    if name + nbits.SCALES not in tensors:
        format = next(format for format, kind in TYPES.items() if kind == tensor.data_type)
        return codec("plain").layout(name, tuple(tensor.dims), format)
    tied = name == table and {name, name + ROWS} <= tensors.keys()
    blocks = settings.blocks(settings.of("embedding", tied) if name == table else PRECISIONS[settings.precision])
    rows, count = tensors[name + nbits.SCALES].dims
    return nbits.lay_out(name, (rows, count * blocks.size), blocks)
