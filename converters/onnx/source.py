"""An ONNX folder that edgeport wrote, opened by its graph: its weights under their own names, and its program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.onnx import described, placed
from converters.onnx.families import family
from converters.onnx.folder import ABOUT, MODEL, Stored, begin
from converters.onnx.precisions import PRECISIONS, read_settings
from converters.onnx.traced import TRACED
from converters.onnx.traced_source import TracedSource, open_traced
from edgeport.checkpoint import read_config
from edgeport.errors import CorruptCheckpoint, NotACheckpoint, need
from edgeport.registry import codec
from edgeport.tensor import EMBEDDING, HEAD, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.runtime import Runner

CHUNK, SINGLE = 64, 16
"""Tokens of a text that are read together, and at its end one by one: the ways in which a cache is used."""


@dataclass(frozen=True, slots=True)
class OnnxSource(Stored):
    @property
    def tolerance(self) -> float:
        """Of its coarsest matrices."""
        names = {self.settings.precision, self.settings.head, self.settings.embedding}
        return max(PRECISIONS[name].tolerance for name in names)

    def execute(self) -> Executed:
        from edgeport.runtime import Runner

        head = self.weights.get(HEAD, self.weights[EMBEDDING])
        return Executed(self, head, Runner(self.path, provider=self.settings.provider))


@dataclass(frozen=True, slots=True)
class Executed:
    """The graph as `edgeport.probe` wants a model."""

    source: OnnxSource
    head: Weight
    runner: Runner

    def hidden(self, tokens: Tensor) -> Tensor:
        """The logits themselves, float32 [batch, length, vocabulary]: a graph gives no others."""
        import torch

        self.runner.reset()
        length = tokens.shape[1]
        together = max(length - SINGLE, 1)
        edges = [*range(0, together, CHUNK), *range(together, length + 1)]
        pieces = [tokens[:, start:stop].numpy() for start, stop in pairwise(edges)]
        logits = torch.cat([torch.from_numpy(self.runner.step(piece)) for piece in pieces], dim=1)
        self.runner.reset()
        return logits

    def logits(self, tokens: Tensor, hidden: Tensor, rows: range) -> Tensor:
        return hidden[..., rows.start : rows.stop]


def open_folder(path: Path) -> OnnxSource | TracedSource:
    """Raises NotACheckpoint for another program's ONNX, CorruptCheckpoint."""
    if not (path / "config.json").is_file():
        raise NotACheckpoint(f"{path} has a {MODEL} and no config.json: it is not an output of edgeport, or not a whole one")
    config, model = read_config(path), read_model(path / MODEL)
    about = {entry.key: entry.value for entry in model.metadata_props}.get(ABOUT)
    if about is None:
        raise NotACheckpoint(
            f"{path / MODEL} was not written by edgeport, which reads ONNX of its own alone; give the model that it was made of"
        )
    try:
        told = json.loads(about)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise CorruptCheckpoint(f"{path / MODEL} is damaged: what it says of itself is not as edgeport writes it; export it anew")
    places = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer}
    if TRACED in told:
        return open_traced(path, config, model, told)
    decoder = family(config).decoder(config, places)
    names = [name for name in decoder.names() if name != HEAD or not decoder.tied]
    try:
        settings = read_settings(about)
        weights = {name: placed(blank(name, decoder.shape(name)), decoder, settings) for name in names}
        offsets: dict[str, int] = {}
        views = described(decoder, settings, weights).views
        for view, (_, _, parts) in views.items():
            at = begin(view, places[view], sum(part.spec.nbytes for part in parts))
            for part in parts:
                offsets[part.spec.name] = at
                at += part.spec.nbytes
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{path / MODEL} is not as this version of edgeport writes it ({type(error).__name__}: {error}); export it anew"
        ) from error
    if left := sorted(name for name, place in places.items() if place and name not in views):
        raise CorruptCheckpoint(
            f"{path / MODEL} computes with {left[0]}{' ...' if len(left) > 1 else ''}, which config.json has no place for"
        )
    return OnnxSource(path, config, settings, weights, offsets)


def blank(name: str, shape: tuple[int, ...]) -> Weight:
    return codec("plain").layout(name, shape, "F32")


def read_model(path: Path) -> Any:
    """The graph without its weights. Raises CorruptCheckpoint, MissingExtra."""
    onnx = need("onnx", "onnx")
    decode_error = need("google.protobuf.message", "onnx").DecodeError
    try:
        return onnx.load(str(path), load_external_data=False)
    except decode_error as error:
        raise CorruptCheckpoint(f"{path.name} is not an ONNX model ({error})") from error
