"""Stored weights as initializers: what both sets of operators know of plain and block-quantized matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.onnx.graph import MICROSOFT, Graph
from edgeport.codecs.nbits import Blocks
from edgeport.errors import MissingTensor
from edgeport.tensor import Weight

ACCURACY = 4
"""Of products with 4 and 8 bit matrices: activations are rounded to 8 bits, in blocks."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One or several weights of [rows, columns] below each other: their rows follow each other in the file as well."""

    graph: Graph
    name: str
    weights: tuple[Weight, ...]

    @property
    def rows(self) -> int:
        return sum(weight.rows for weight in self.weights)

    @property
    def columns(self) -> int:
        return self.weights[0].columns

    @property
    def blocks(self) -> Blocks | None:
        """None: the numbers are plain."""
        parameters = self.weights[0].parameters
        return parameters if isinstance(parameters, Blocks) else None

    @property
    def count(self) -> int:
        """Blocks in a row."""
        return self.columns // (self.blocks.size if self.blocks else self.columns)

    def plain(self, kind: str) -> str:
        """The numbers, in the type of the activations."""
        format = self.weights[0].format
        stored = self.view("data", format, [self.rows, self.columns])
        return stored if format == kind else self.graph.cast(stored, kind)

    def view(self, role: str, dtype: str, dims: Sequence[int], suffix: str = "") -> str:
        """One of its parts as an initializer of these dimensions."""
        parts = [weight.parts[role] for weight in self.weights]
        own = parts[0].spec.name.removeprefix(self.weights[0].name)
        return self.graph.stored(self.name + own + suffix, dtype, dims, *parts)

    def scales(self) -> str:
        return self.view("scales", self.blocks.scale if self.blocks else "F32", [self.rows, self.count])

    def quantized_product(self, value: str, bias: str = "", out: str = "") -> str:
        """onnxruntime's product of activations with such a matrix."""
        assert self.blocks
        codes = self.view("codes", "U8", [self.rows, self.count, self.blocks.size * self.blocks.bits // 8])
        inputs = [value, codes, self.scales(), self.zeros(), "", bias]
        while not inputs[-1]:
            inputs.pop()
        return self.graph(
            "MatMulNBits", *inputs, out=out, domain=MICROSOFT, K=self.columns, N=self.rows, bits=self.blocks.bits,
            block_size=self.blocks.size, accuracy_level=ACCURACY,
        )  # fmt: skip

    def quantized_rows(self, ids: str, out: str = "") -> str:
        """onnxruntime's look-up in such a table."""
        assert self.blocks
        codes = self.view("codes", "U8", [self.rows, self.columns * self.blocks.bits // 8], ".rows")
        inputs = [codes, ids, self.scales(), *([] if self.blocks.symmetric else [self.zeros()])]
        return self.graph(
            "GatherBlockQuantized", *inputs, out=out, domain=MICROSOFT, bits=self.blocks.bits, block_size=self.blocks.size,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def zeros(self) -> str:
        """"" where all blocks share one."""
        assert self.blocks
        if self.blocks.symmetric:
            return ""
        return self.view("zeros", "U8", [self.rows, -(-self.count * self.blocks.bits // 8)])


def matrix(graph: Graph, weights: Mapping[str, Weight], modules: Sequence[str], kind: str = "weight") -> Matrix:
    """The matrix (or, by `kind`, the biases) of linear layers. Raises MissingTensor."""
    found = tuple(present(weights, f"{module}.{kind}") for module in modules)
    prefix, _, first = modules[0].rpartition(".")
    names = [first, *(module.rpartition(".")[2] for module in modules[1:])]
    return Matrix(graph, ".".join([*filter(None, [prefix]), "+".join(names), kind]), found)


def present(weights: Mapping[str, Weight], name: str) -> Weight:
    """Raises MissingTensor."""
    if name not in weights:
        raise MissingTensor(f"the model has no tensor {name}, which its config.json calls for")
    return weights[name]
