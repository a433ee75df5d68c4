"""An encoder in ONNX: a traced graph whose weights are streamed into the file beside it, in the numbers asked for.

    fp32             the graph as it was traced
    fp16, bf16       matrices are stored so, and go through a Cast, which onnxruntime does once, when it loads
    int8, int4       products become MatMulNBits, the table of tokens GatherBlockQuantized; all else is fp32
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converters.onnx.folder import ABOUT, DATA, MODEL, companions
from converters.onnx.graph import Graph
from converters.onnx.installed import check_operators
from converters.onnx.matrices import Matrix
from converters.onnx.precisions import PRECISIONS, Settings, one_table
from edgeport.aside import ask, here
from edgeport.codecs import nbits
from edgeport.encoders import Encoder
from edgeport.errors import ConvertError, CorruptCheckpoint, MissingExtra, MissingTensor, UnsupportedArchitecture, about, need
from edgeport.hub import called
from edgeport.registry import codec
from edgeport.seams import FileLayout, Source, Target
from edgeport.tensor import Weight

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLIED, LOOKED_UP, OTHERWISE = "multiplied", "looked up", "otherwise"
TRACED = "traced"
"""A key of the model's metadata: what the traced graph's table of tokens is called."""
NAMED = 5
"""Weights that a sentence names."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph without its numbers, its initializers named as the checkpoint's weights."""

    model: Any
    table: str
    """The weight that token ids are looked up in; "" without one."""

    def dims(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that it computes with."""
        return {tensor.name: tuple(tensor.dims) for tensor in self.model.graph.initializer if tensor.data_location}

    def uses(self) -> dict[str, set[str]]:
        """In which ways it uses each weight."""
        products = {name for node in self.model.graph.node if node.op_type == "MatMul" for name in node.input[1:]}
        elsewhere = {name for node in self.model.graph.node for name in node.input[node.op_type == "MatMul" :]} - products
        found: dict[str, set[str]] = {name: set() for name in self.dims()}
        for node in self.model.graph.node:
            for place, name in enumerate(node.input):
                if name in found:
                    turned = is_turned(node) and node.output[0] in products and node.output[0] not in elsewhere
                    rows = node.op_type == "Gather" and place == 0 and attribute(node, "axis", 0) == 0
                    found[name].add(MULTIPLIED if turned else LOOKED_UP if rows else OTHERWISE)
        return found


def is_turned(node: Any) -> bool:
    return node.op_type == "Transpose" and list(attribute(node, "perm", ())) == [1, 0]


def attribute(node: Any, name: str, default: Any) -> Any:
    onnx = need("onnx", "onnx")
    return next((onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def traced(found: Encoder, source: Source) -> Traced:
    """Raises UnsupportedArchitecture, MissingTensor, CorruptCheckpoint, MissingExtra."""
    onnx = need("onnx", "onnx")
    # looked for and not imported, which would take the memory that the process of its own is for
    for module, extra in (("onnxscript", "onnx"), ("transformers", "hf")):
        if find_spec(module) is None:
            raise MissingExtra(f"{module} is not installed: pip install 'edgeport[{extra}]'")
    with TemporaryDirectory() as folder:
        output = Path(folder) / MODEL
        job = {"config": dict(found.config), "names": list(source.weights), "output": str(output)}
        loaded = {"onnxscript", "transformers"} <= sys.modules.keys()
        answer = run_here(job) if loaded else ask("converters.onnx.trace", job, silent)
        if isinstance(answer, str):
            raise UnsupportedArchitecture(f"the graph of {found.architecture} could not be traced: {answer}")
        model = onnx.load(str(output), load_external_data=False)
    if absent := answer["absent"]:
        some = ", ".join(absent[:NAMED]) + (f" and {len(absent) - NAMED} more" if len(absent) > NAMED else "")
        raise MissingTensor(f"{called(source.path)} lacks {some}, which {found.architecture} computes with")
    graph = Traced(model, str(answer["table"]))
    for name, dims in graph.dims().items():
        if source.weights[name].shape != dims:
            with about(name):
                shape = list(source.weights[name].shape)
                raise CorruptCheckpoint(f"it has shape {shape} where config.json says {list(dims)}")
    return graph


def silent(line: str) -> None:
    """For a process that has nothing to tell on the way."""


def run_here(job: dict[str, Any]) -> Any:
    from converters.onnx.trace import main

    return here(lambda: main(job, silent))


@dataclass(frozen=True, slots=True)
class TracedSink:
    """Writes a folder: the encoder's graph, its weights, configuration, tokenizer or processor files."""

    known: Encoder
    source: Source
    target: Target
    traced: Traced
    settings: Settings
    folder: bool = True
    importance: Mapping[str, Tensor] | None = None

    @property
    def notes(self) -> Sequence[str]:
        left = [name for name in self.source.weights if not self.takes(name)]
        named = f"({', '.join(left[:NAMED])} ...)"
        said = [f"{len(left)} weights that the graph does not compute with are left out {named}"] if left else []
        takes, made = self.known.picture, processed(self.source)
        if takes and made and takes != made:
            sizes = [" x ".join(map(str, size)) for size in (takes, made)]
            said.append(f"the graph takes pictures of {sizes[0]}, config.json's image_size, and preprocessor_config.json makes "
                        f"them {sizes[1]}; set the sizes there")  # fmt: skip
        return said

    def takes(self, name: str) -> bool:
        return name in self.traced.dims()

    def place(self, weight: Weight) -> Weight:
        with about(weight.name):
            return placed(weight, self.traced, self.settings)

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        graph = Rewriter(self.traced, {weight.name: weight for weight in weights}).write()
        offsets, size = graph.places()
        told = json.dumps(asdict(self.settings) | {TRACED: self.traced.table})
        model = graph.serialize(DATA, offsets, {ABOUT: told})
        check_operators(model)
        return [FileLayout(MODEL, len(model), ((0, model),), {}), FileLayout(DATA, size, (), offsets)]

    def finish(self, staging: Path) -> None:
        companions(self.source, self.target, staging)


def sink(found: Encoder, source: Source, target: Target, chosen: Settings) -> TracedSink:
    """Raises ConvertError for options that are not for encoders, and what `traced` does."""
    if chosen.provider != "cpu":
        raise ConvertError("an encoder's graph runs on CUDA as on the CPU; leave off --execution-provider")
    if target.imatrix:
        raise ConvertError("llama.cpp's importance matrices are of decoders; leave off --imatrix")
    if chosen.portable and any(PRECISIONS[name].bits for name in (chosen.precision, chosen.head, chosen.embedding)):
        raise ConvertError("an encoder's int4 and int8 take onnxruntime's own operators; give --quant fp16 with --portable")
    graph = traced(found, source)
    check_table(graph, target, chosen)
    return TracedSink(found, source, target, graph, chosen)


def check_table(graph: Traced, target: Target, chosen: Settings) -> None:
    """Raises ConvertError for a type that no weight of the graph would have."""
    uses = graph.uses().get(graph.table, {OTHERWISE})
    tied = OTHERWISE not in uses and MULTIPLIED in uses
    if target.token_embedding_type and OTHERWISE in uses:
        raise ConvertError("this graph has no table of tokens by itself; leave off --token-embedding-type")
    if target.token_embedding_type and tied and chosen.embedding != chosen.head:
        raise ConvertError(one_table(chosen))
    if target.output_tensor_type and not tied:
        raise ConvertError("this encoder has no head that is its embedding as well; leave off --output-tensor-type")


def processed(source: Source) -> tuple[int, int] | None:
    """Height and width of the pictures that the source's preprocessor_config.json makes, where it says them."""
    path = source.path / "preprocessor_config.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_bytes())
        size = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
        height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    except (AttributeError, KeyError, ValueError):  # of a shortest edge, or in an older way: the width is the picture's
        return None
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def placed(weight: Weight, graph: Traced, chosen: Settings) -> Weight:
    """How the output stores a weight. Raises BlockMismatch."""
    uses = graph.uses()[weight.name]
    precision = PRECISIONS[chosen.precision]
    if weight.name == graph.table and OTHERWISE not in uses:
        precision = chosen.of("embedding", MULTIPLIED in uses)
    elif precision.bits and uses != {MULTIPLIED}:
        precision = PRECISIONS["fp32"]
    if precision.bits:
        return nbits.lay_out(weight.name, weight.shape, chosen.blocks(precision))
    stored = codec("plain").layout(weight.name, weight.shape, precision.format if len(weight.shape) > 1 else "F32")
    return weight if weight == stored else stored


class Rewriter:
    """A traced graph with the weights as they are stored."""

    def __init__(self, graph: Traced, weights: Mapping[str, Weight]) -> None:
        self.traced, self.weights = graph, weights
        self.graph = Graph(name="encoder", inputs=list(graph.model.graph.input), outputs=list(graph.model.graph.output))
        self.plain: dict[str, str] = {}
        """Weights of another type than float32, to what they are after their Cast."""
        self.turned: dict[str, Matrix] = {}
        """What a Transpose would give, to the matrix that MatMulNBits takes as it is."""

    def write(self) -> Graph:
        """Raises MissingTensor."""
        for tensor in self.traced.model.graph.initializer:
            if not tensor.data_location:
                self.graph.constants[tensor.name, (), b""] = tensor
            elif (stored := self.matrix(tensor.name)).blocks is None:
                name = stored.view("data", stored.weights[0].format, tensor.dims)
                if stored.weights[0].format != "F32":
                    self.plain[tensor.name] = self.graph.cast(name, "F32")
        for node in self.traced.model.graph.node:
            self.node(node)
        return self.graph

    def matrix(self, name: str) -> Matrix:
        if name not in self.weights:
            raise MissingTensor(f"the model has no tensor {name}, which its graph computes with")
        return Matrix(self.graph, name, (self.weights[name],))

    def node(self, node: Any) -> None:
        first, out = node.input[0] if node.input else "", node.output[0]
        stored = self.matrix(first) if first in self.weights else None
        if stored and stored.blocks and is_turned(node):
            self.turned[out] = stored
        elif stored and stored.blocks:
            stored.quantized_rows(node.input[1], out)
        elif node.op_type == "MatMul" and node.input[1] in self.turned:
            self.turned[node.input[1]].quantized_product(first, out=out)
        else:
            copied = type(node)()
            copied.CopyFrom(node)
            copied.input[:] = [self.plain.get(name, name) for name in node.input]
            self.graph.nodes.append(copied)
