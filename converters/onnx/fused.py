"""onnxruntime's own operators: a layer is four matrix products, one attention and two norms, as fast as it has them.

Source: onnxruntime docs/ContribOperators.md (GroupQueryAttention, MatMulNBits, GatherBlockQuantized ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from converters.onnx.decoder import IDS, MASK, PAST, PRESENT
from converters.onnx.families import Decoder
from converters.onnx.graph import MICROSOFT, Graph
from converters.onnx.matrices import matrix
from converters.shapes import QUERY_KEY_VALUE
from edgeport.errors import UnsupportedArchitecture
from edgeport.tensor import EMBEDDING, Weight

HEAD_MULTIPLE = 16


@dataclass
class Fused:
    graph: Graph
    decoder: Decoder
    weights: Mapping[str, Weight]
    kind: str = "F32"
    shared: list[str] = field(default_factory=list)
    """Of all layers' attention: lengths, total length, cosines, sines."""

    def __post_init__(self) -> None:
        if self.decoder.head_dim % HEAD_MULTIPLE:
            raise UnsupportedArchitecture(
                f"the model has heads of {self.decoder.head_dim} numbers, which onnxruntime's fused attention does not rotate "
                f"(multiples of {HEAD_MULTIPLE} alone); give --portable"
            )

    def begin(self) -> None:
        """Lengths from the mask; cosines and sines of all positions, which onnxruntime computes once, when it loads.

        Grouped-query attention takes padding for the end of a sequence. A mask that begins with some would give wrong
        logits without a word: it gives a length below zero, which the operator refuses.
        """
        graph, decoder = self.graph, self.decoder
        kept = graph("ReduceSum", MASK, graph.constant([1], "int64"), keepdims=0)
        first = graph("Gather", MASK, graph.constant(0, "int64"), axis=1)
        lengths = graph("Cast", graph("Sub", graph("Mul", kept, first), graph.constant(1, "int64")), to=6)
        total = graph("Cast", graph("Gather", graph("Shape", MASK), graph.constant(1, "int64")), to=6)
        ends = (graph.constant(end, "float32") for end in (0, decoder.positions, 1))
        positions = graph("Unsqueeze", graph("Range", *ends), graph.constant([1], "int64"))
        angles = graph("Mul", positions, graph.constant(decoder.frequencies[None], "float32"))
        tables = [graph(function, angles) for function in ("Cos", "Sin")]
        if decoder.rotary_scale != 1:
            tables = [graph("Mul", table, graph.constant(decoder.rotary_scale, "float32")) for table in tables]
        if self.kind != "F32":
            tables = [graph.cast(table, self.kind) for table in tables]
        self.shared = [lengths, total, *tables]

    def embed(self) -> str:
        graph, table = self.graph, matrix(self.graph, self.weights, [EMBEDDING.removesuffix(".weight")])
        if table.blocks is None:
            format = table.weights[0].format
            rows = graph("Gather", table.view("data", format, [table.rows, table.columns]), IDS)
            return rows if format == self.kind else graph.cast(rows, self.kind)
        return table.quantized_rows(IDS)

    def linear(self, value: str, modules: Sequence[str], out: str = "") -> str:
        graph, layers = self.graph, matrix(self.graph, self.weights, modules)
        bias = ""
        if self.decoder.has_bias(modules[0]):
            bias = matrix(graph, self.weights, modules, "bias").view("data", self.kind, [layers.rows])
        if layers.blocks:
            return layers.quantized_product(value, bias, out)
        product = graph("FusedMatMul", value, layers.plain(self.kind), out="" if bias else out, domain=MICROSOFT, transB=1)
        return graph("Add", product, bias, out=out) if bias else product

    def norm(self, value: str, module: str) -> str:
        return self.graph("SimplifiedLayerNormalization", value, self.gain(module), axis=-1, epsilon=self.decoder.epsilon)

    def add_norm(self, value: str, change: str, module: str) -> tuple[str, str]:
        outputs = [f"{module}.out", "", "", f"{module}.sum"]
        inputs = [value, change, self.gain(module)]
        self.graph("SkipSimplifiedLayerNormalization", *inputs, out=outputs, domain=MICROSOFT, epsilon=self.decoder.epsilon)
        return outputs[0], outputs[3]

    def gain(self, module: str) -> str:
        stored = matrix(self.graph, self.weights, [module])
        return stored.view("data", self.kind, [stored.columns])

    def attend(self, value: str, layer: int, prefix: str) -> str:
        decoder, modules = self.decoder, [prefix + name for name in QUERY_KEY_VALUE]
        packed = self.linear(value, modules)
        query, key, values = (packed, "", "") if not decoder.query_key_norm else self.normed_heads(packed, prefix)
        past = [PAST.format(layer, which) for which in ("key", "value")]
        present = [PRESENT.format(layer, which) for which in ("key", "value")]
        return self.graph(
            "GroupQueryAttention", query, key, values, *past, *self.shared, out=[f"{prefix}attention", *present],
            domain=MICROSOFT, num_heads=decoder.heads, kv_num_heads=decoder.kv_heads, scale=decoder.scale, do_rotary=1,
            softcap=decoder.softcap, local_window_size=decoder.windows[layer] or -1,
        )  # fmt: skip

    def normed_heads(self, packed: str, prefix: str) -> tuple[str, str, str]:
        """Query and key with every head normalised, and value."""
        graph, decoder = self.graph, self.decoder
        sizes = np.array([decoder.heads, decoder.kv_heads, decoder.kv_heads]) * decoder.head_dim
        names = [prefix + "self_attn." + name for name in ("query", "key", "value")]
        graph("Split", packed, graph.constant(sizes, "int64"), out=names, axis=-1)
        by_head, flat = graph.constant([0, 0, -1, decoder.head_dim], "int64"), graph.constant([0, 0, -1], "int64")
        normed = [
            graph("Reshape", self.norm(graph("Reshape", name, by_head), f"{prefix}self_attn.{which}_norm"), flat)
            for name, which in zip(names, "qk", strict=False)
        ]
        return normed[0], normed[1], names[2]

    def activate(self, value: str) -> str:
        if self.decoder.activation == "silu":
            return self.graph("Mul", value, self.graph("Sigmoid", value))  # a little faster than QuickGelu
        return self.graph("FastGelu", value, domain=MICROSOFT)
