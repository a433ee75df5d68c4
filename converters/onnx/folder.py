"""The files of an ONNX output: graph, weights, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.hf import asset_files, copy_assets
from converters.onnx.precisions import Settings
from edgeport.checkpoint import read_range
from edgeport.seams import Source, Target
from edgeport.tensor import TensorSpec, Weight

MODEL, DATA = "model.onnx", "model.onnx.data"
ABOUT = "edgeport"
"""The key of the model's metadata under which its settings stand."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An output as it is read back, whatever made its graph."""

    path: Path
    config: Mapping[str, Any]
    settings: Settings
    weights: Mapping[str, Weight]
    offsets: Mapping[str, int]
    """Of stored tensors in the data file."""
    container: str = "onnx"

    @property
    def files(self) -> Sequence[Path]:
        return [self.path / MODEL, self.path / DATA]

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        offset = self.offsets[spec.name]
        return read_range(self.path / DATA, offset + start, offset + stop)

    def assets(self, staging: Path) -> Mapping[str, Path]:
        return asset_files(self.path)


def begin(name: str, place: Mapping[str, str], nbytes: int) -> int:
    """Where an initializer of so many bytes begins in the data file. Raises KeyError, ValueError."""
    location, offset, length = place["location"], int(place["offset"]), int(place["length"])
    if location != DATA or offset < 0 or length != nbytes:
        raise ValueError(f"{name} is {length} bytes of {location!r} from {offset} on, and should be {nbytes} of {DATA}")
    return offset


def companions(source: Source, target: Target, staging: Path) -> dict[str, Any]:
    """Copy tokenizer and processor files verbatim; write, and return, config.json as it is to be."""
    copy_assets({**source.assets(staging), **target.assets}, staging)
    config = {key: value for key, value in target.config.items() if key != "quantization_config"}
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config
