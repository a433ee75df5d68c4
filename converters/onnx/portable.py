"""ONNX's own operators alone, for every runtime that has opset 21: the same model, spelled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from converters.onnx.decoder import IDS, MASK, PAST, PRESENT
from converters.onnx.families import Decoder
from converters.onnx.graph import Graph
from converters.onnx.matrices import Matrix, matrix
from converters.shapes import QUERY_KEY_VALUE
from edgeport.codecs.nbits import Blocks
from edgeport.tensor import EMBEDDING, Weight

LEAST = -3e38
"""What a score becomes that is not attended to: finite, so that a row without any has no NaN."""


@dataclass
class Portable:
    graph: Graph
    decoder: Decoder
    weights: Mapping[str, Weight]
    kind: str = "F32"
    rotary: tuple[str, str] = ("", "")
    """Cosine and sine [batch, 1, length, head_dim / 2] of the input's positions."""
    masks: dict[int, str] = field(default_factory=dict)
    """What is added to scores [batch, 1, 1, length, total], by the length of the window."""

    def begin(self) -> None:
        """Positions are counted over the mask, so that a batch may be padded on either side."""
        graph, decoder = self.graph, self.decoder
        zero, one = graph.constant(0, "int64"), graph.constant(1, "int64")
        first, second = graph.constant([0], "int64"), graph.constant([1], "int64")
        length, total = (graph("Shape", name, start=1, end=2) for name in (IDS, MASK))
        past = graph("Sub", total, length)
        counted = graph("Max", graph("Sub", graph("CumSum", MASK, one), one), zero)
        current = graph("Slice", counted, past, total, second)
        positions = graph("Unsqueeze", graph.cast(current, "F32"), graph.constant([1, 3], "int64"))
        angles = graph("Mul", positions, graph.constant(decoder.frequencies, "float32"))
        scale = graph.constant(decoder.rotary_scale, "float32")
        cosine, sine = (graph("Mul", graph(function, angles), scale) for function in ("Cos", "Sin"))
        self.rotary = cosine, sine
        # by place in the cache: from query back to key
        keys = graph("Range", zero, graph("Squeeze", total, first), one)
        distance = graph("Sub", graph("Unsqueeze", graph("Slice", keys, past, total), second), graph("Unsqueeze", keys, first))
        causal = graph("GreaterOrEqual", distance, zero)
        present = graph("Unsqueeze", graph("Cast", MASK, to=9), graph.constant([1, 2, 3], "int64"))
        for window in sorted(set(decoder.windows)):
            near = graph("And", causal, graph("Less", distance, graph.constant(window, "int64"))) if window else causal
            seen = graph("And", present, near)
            self.masks[window] = graph("Where", seen, graph.number(0, self.kind), graph.number(LEAST, self.kind))

    def embed(self) -> str:
        graph, table = self.graph, matrix(self.graph, self.weights, [EMBEDDING.removesuffix(".weight")])
        blocks = table.blocks
        if blocks is None:
            format = table.weights[0].format
            rows = graph("Gather", table.view("data", format, [table.rows, table.columns]), IDS)
            return rows if format == self.kind else graph.cast(rows, self.kind)
        codes = self.signed_codes(table, blocks)
        grouped = graph("Reshape", codes, graph.constant([0, 0, table.count, blocks.size], "int64"))
        scales = graph("Unsqueeze", graph("Gather", table.scales(), IDS), graph.constant([3], "int64"))
        return graph("Reshape", graph("Mul", grouped, scales), graph.constant([0, 0, table.columns], "int64"))

    def signed_codes(self, table: Matrix, blocks: Blocks) -> str:
        """float32 [batch, length, columns]: the codes of the input's rows. Few runtimes can look up rows of 4 bits."""
        graph = self.graph
        if blocks.bits == 8:
            return graph.cast(graph("Gather", table.view("codes", "I8", [table.rows, table.columns], ".rows"), IDS), "F32")
        bytes_ = graph("Gather", table.view("codes", "U8", [table.rows, table.columns // 2], ".rows"), IDS)
        low = graph("BitwiseAnd", bytes_, graph.constant(15, "uint8"))
        high = graph("BitShift", bytes_, graph.constant(4, "uint8"), direction="RIGHT")
        last = graph.constant([3], "int64")
        pairs = graph("Concat", graph("Unsqueeze", low, last), graph("Unsqueeze", high, last), axis=3)
        turned = graph("BitwiseXor", pairs, graph.constant(blocks.middle, "uint8"))
        return graph("Sub", graph.cast(turned, "F32"), graph.constant(blocks.middle, "float32"))

    def linear(self, value: str, modules: Sequence[str], out: str = "") -> str:
        graph, layers = self.graph, matrix(self.graph, self.weights, modules)
        blocks = layers.blocks
        if blocks is None:
            numbers = layers.plain(self.kind)
        else:
            codes = layers.view("codes", "I4" if blocks.bits == 4 else "I8", [layers.rows, layers.columns])
            numbers = graph("DequantizeLinear", codes, layers.scales(), axis=1, block_size=blocks.size)
        inputs = [graph("Reshape", value, graph.constant([-1, layers.columns], "int64")), numbers]
        if self.decoder.has_bias(modules[0]):
            inputs.append(matrix(graph, self.weights, modules, "bias").view("data", self.kind, [layers.rows]))
        # Gemm has the matrix as transformers stores it, where MatMul would need it turned
        product = graph("Gemm", *inputs, transB=1)
        lengths = graph("Concat", graph("Shape", IDS), graph.constant([layers.rows], "int64"), axis=0)
        return graph("Reshape", product, lengths, out=out)

    def norm(self, value: str, module: str) -> str:
        graph, stored = self.graph, matrix(self.graph, self.weights, [module])
        squares = graph("ReduceMean", graph("Mul", value, value), graph.constant([-1], "int64"))
        size = graph("Sqrt", graph("Add", squares, graph.constant(self.decoder.epsilon, "float32")))
        return graph("Mul", graph("Div", value, size), stored.view("data", self.kind, [stored.columns]))

    def add_norm(self, value: str, change: str, module: str) -> tuple[str, str]:
        both = self.graph("Add", value, change)
        return self.norm(both, module), both

    def attend(self, value: str, layer: int, prefix: str) -> str:
        graph, decoder = self.graph, self.decoder
        sizes = np.array([decoder.heads, decoder.kv_heads, decoder.kv_heads]) * decoder.head_dim
        names = [prefix + "self_attn." + name for name in ("query", "key", "value")]
        packed = self.linear(value, [prefix + name for name in QUERY_KEY_VALUE])
        graph("Split", packed, graph.constant(sizes, "int64"), out=names, axis=-1)
        query, key, values = (self.by_head(name) for name in names)
        if decoder.query_key_norm:
            query, key = (self.norm(which, f"{prefix}self_attn.{name}_norm") for which, name in ((query, "q"), (key, "k")))
        past = [PAST.format(layer, which) for which in ("key", "value")]
        present = [PRESENT.format(layer, which) for which in ("key", "value")]
        graph("Concat", past[0], self.rotated(key), out=present[0], axis=2)
        graph("Concat", past[1], values, out=present[1], axis=2)
        # the query heads that share a key head in a dimension of their own: [batch, kv_heads, group, length, head_dim]
        shape = graph.constant([0, decoder.kv_heads, decoder.heads // decoder.kv_heads, -1, decoder.head_dim], "int64")
        grouped = graph("Reshape", self.rotated(query), shape)
        scaled = graph("Mul", grouped, graph.constant(decoder.scale, "float32"))
        turned = graph("Unsqueeze", graph("Transpose", present[0], perm=[0, 1, 3, 2]), graph.constant([2], "int64"))
        scores = graph("MatMul", scaled, turned)
        if decoder.softcap:
            cap = graph.constant(decoder.softcap, "float32")
            scores = graph("Mul", graph("Tanh", graph("Div", scores, cap)), cap)
        shares = graph("Softmax", graph("Add", scores, self.masks[decoder.windows[layer]]), axis=-1)
        mixed = graph("MatMul", shares, graph("Unsqueeze", present[1], graph.constant([2], "int64")))
        heads = graph("Reshape", mixed, graph.constant([0, decoder.heads, -1, decoder.head_dim], "int64"))
        flat = graph("Transpose", heads, perm=[0, 2, 1, 3])
        return graph("Reshape", flat, graph.constant([0, 0, decoder.heads * decoder.head_dim], "int64"))

    def by_head(self, value: str) -> str:
        """[batch, heads, length, head_dim]"""
        shape = self.graph.constant([0, 0, -1, self.decoder.head_dim], "int64")
        return self.graph("Transpose", self.graph("Reshape", value, shape), perm=[0, 2, 1, 3])

    def rotated(self, value: str) -> str:
        """Each pair of a head's two halves turned by its angle."""
        graph, (cosine, sine) = self.graph, self.rotary
        halves = [f"{value}.first", f"{value}.second"]
        graph("Split", value, out=halves, axis=-1, num_outputs=2)
        first, second = halves
        turned = [
            graph("Sub", graph("Mul", first, cosine), graph("Mul", second, sine)),
            graph("Add", graph("Mul", second, cosine), graph("Mul", first, sine)),
        ]
        return graph("Concat", *turned, axis=-1)

    def activate(self, value: str) -> str:
        if self.decoder.activation == "silu":
            return self.graph("Mul", value, self.graph("Sigmoid", value))
        return self.graph("Gelu", value, approximate="tanh")
