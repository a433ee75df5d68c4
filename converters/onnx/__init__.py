"""ONNX: a folder with the graph of a decoder, its weights in one file beside it, and what runtimes want to know of it.

`families` says what is computed, `decoder` in which order, `fused` and `portable` by which operators, `precisions` in
which numbers, `graph` how all that is spelled; `genai` describes it to onnxruntime-genai. Here they become a Sink.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converters.onnx import genai, traced
from converters.onnx.decoder import write
from converters.onnx.families import Decoder, family
from converters.onnx.folder import ABOUT, DATA, MODEL, companions
from converters.onnx.fused import Fused
from converters.onnx.graph import Graph
from converters.onnx.installed import check_operators
from converters.onnx.portable import Portable
from converters.onnx.precisions import PRECISIONS, Settings, one_table, settings
from edgeport.checkpoint import read_json
from edgeport.codecs import nbits
from edgeport.encoders import encoder
from edgeport.errors import ConvertError, CorruptCheckpoint, about
from edgeport.registry import codec
from edgeport.seams import FileLayout, Source, Target
from edgeport.tensor import Arrangement, Weight, is_buffer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class OnnxSink:
    """Writes a folder: the model's graph, its weights, and configuration and tokenizer files."""

    source: Source
    target: Target
    decoder: Decoder
    settings: Settings
    tokens: Mapping[str, Any]
    """The special tokens, as `genai.tokens` gives them."""
    folder: bool = True
    importance: Mapping[str, Tensor] | None = None
    notes: Sequence[str] = ()

    def takes(self, name: str) -> bool:
        return not is_buffer(name)

    def place(self, weight: Weight) -> Weight:
        with about(weight.name):
            return placed(weight, self.decoder, self.settings)

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        graph = described(self.decoder, self.settings, {weight.name: weight for weight in weights})
        offsets, size = graph.places()
        model = graph.serialize(DATA, offsets, {ABOUT: self.settings.to_json(self.decoder.positions)})
        check_operators(model)
        return [FileLayout(MODEL, len(model), ((0, model),), {}), FileLayout(DATA, size, (), offsets)]

    def finish(self, staging: Path) -> None:
        """Copy tokenizer files verbatim; write what config.json and genai_config.json have to say of this output."""
        config = companions(self.source, self.target, staging)
        described = genai.config(config, self.tokens, self.decoder, self.settings, MODEL)
        (staging / "genai_config.json").write_text(json.dumps(described, indent=2) + "\n")


def generation(source: Source, target: Target) -> Mapping[str, Any]:
    """generation_config.json, where there is one. Raises CorruptCheckpoint."""
    with TemporaryDirectory() as staging:
        path = {**source.assets(Path(staging)), **target.assets}.get("generation_config.json")
        return read_json(path) if path else {}


def placed(weight: Weight, decoder: Decoder, settings: Settings) -> Weight:
    """How the output stores a weight. Raises UnmappedTensor, CorruptCheckpoint, BlockMismatch."""
    role = decoder.role(weight.name)
    if weight.shape != (expected := decoder.shape(weight.name)):
        raise CorruptCheckpoint(f"it has shape {list(weight.shape)} where config.json says {list(expected)}")
    if role in ("norm", "bias"):
        stored = codec("plain").layout(weight.name, weight.shape, settings.kind)
        return replace(stored, arrangement=Arrangement(shift=decoder.norm_shift)) if role == "norm" else stored
    precision = settings.of(role, decoder.tied)
    if precision.bits:
        return nbits.lay_out(weight.name, weight.shape, settings.blocks(precision))
    stored = codec("plain").layout(weight.name, weight.shape, precision.format)
    return weight if weight == stored else stored


def described(decoder: Decoder, settings: Settings, weights: Mapping[str, Weight]) -> Graph:
    """The graph that computes with these weights. Raises MissingTensor."""
    graph = Graph()
    operators = (Portable if settings.portable else Fused)(graph, decoder, weights, settings.kind)
    write(graph, decoder, operators)
    return graph


def importance(source: Source, target: Target, chosen: Settings) -> dict[str, Tensor] | None:
    """[columns] by weight name, from llama.cpp's file with its own names. Raises ConvertError, SourceError."""
    if target.imatrix is None:
        return None
    if all(PRECISIONS[name].bits != 4 for name in (chosen.precision, chosen.head, chosen.embedding)):
        raise ConvertError(f"--imatrix weighs the errors of int4, and the output is to be {chosen.precision}; leave it off")
    import torch

    from converters.gguf import families, importance_matrix, tensor_names

    names = tensor_names(source, families.family(target.config), target.config)
    return {name: torch.from_numpy(values) for name, values in importance_matrix(target.imatrix, names).items()}


class Onnx:
    name = "onnx"
    reads = True
    writes = True

    def detect(self, path: Path) -> bool:
        return (path / MODEL).is_file()

    def open(self, path: Path) -> Source:
        from converters.onnx.source import open_folder

        return open_folder(path)

    def sink(self, source: Source, target: Target) -> OnnxSink | traced.TracedSink:
        if target.tensor_types or target.max_shard_bytes:
            raise ConvertError("--tensor-type and --max-shard-size are not for --to onnx")
        if target.formats:
            raise ConvertError("no single weight of an ONNX graph is promoted; --output-tensor-type gives the head more bits")
        chosen = settings(target, source)
        if found := encoder(target.config):
            return traced.sink(found, source, target, chosen)
        decoder = family(target.config).decoder(target.config, source.weights)
        if target.token_embedding_type and decoder.tied and chosen.embedding != chosen.head:
            raise ConvertError(one_table(chosen))
        tokens = genai.tokens(target.config, generation(source, target))
        return OnnxSink(source, target, decoder, chosen, tokens, importance=importance(source, target, chosen))


converter = Onnx()
