"""A decoder of the Llama kind with its cache, written once for every set of operators that can express it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from converters.onnx.families import Decoder
from converters.onnx.graph import Graph
from converters.shapes import FEED_FORWARD, FINAL_NORM
from edgeport.tensor import EMBEDDING, HEAD

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


class Operators(Protocol):
    """How a graph is spelled. Values are [batch, length, features] unless said otherwise."""

    kind: str
    """The type of activations, by its safetensors name."""

    def begin(self) -> None:
        """What all layers share: positions, masks."""
        ...

    def embed(self) -> str:
        """The embeddings of the input."""
        ...

    def linear(self, value: str, modules: Sequence[str], out: str = "") -> str:
        """The outputs of linear layers with the same input, one after the other in the last dimension."""
        ...

    def norm(self, value: str, module: str) -> str:
        """The root-mean-square norm over the last dimension."""
        ...

    def add_norm(self, value: str, change: str, module: str) -> tuple[str, str]:
        """norm(value + change), and value + change."""
        ...

    def attend(self, value: str, layer: int, prefix: str) -> str:
        """Attention without its output projection, over the past and `value`; names the layer's past and present."""
        ...

    def activate(self, value: str) -> str: ...


def write(graph: Graph, decoder: Decoder, operators: Operators) -> None:
    """The whole graph, inputs to outputs."""
    graph.input(IDS, "I64", ["batch", "length"])
    graph.input(MASK, "I64", ["batch", "total"])
    declare_cache(graph, decoder, operators.kind)
    operators.begin()
    state = operators.embed()
    if decoder.embedding_scale != 1:
        state = graph("Mul", state, graph.number(decoder.embedding_scale, operators.kind))
    change = ""
    for layer in range(decoder.layers):
        prefix = f"model.layers.{layer}."
        inner, state = entered(operators, state, change, f"{prefix}input_layernorm")
        change = operators.linear(operators.attend(inner, layer, prefix), [f"{prefix}self_attn.o_proj"])
        before = "post_attention_layernorm"
        if decoder.sandwich:
            change, before = operators.norm(change, f"{prefix}post_attention_layernorm"), "pre_feedforward_layernorm"
        inner, state = operators.add_norm(state, change, prefix + before)
        change = feed_forward(graph, decoder, operators, inner, prefix)
        if decoder.sandwich:
            change = operators.norm(change, f"{prefix}post_feedforward_layernorm")
    final, _ = entered(operators, state, change, FINAL_NORM)
    finish(graph, decoder, operators, final)


def declare_cache(graph: Graph, decoder: Decoder, kind: str) -> None:
    for layer in range(decoder.layers):
        for which in ("key", "value"):
            graph.input(PAST.format(layer, which), kind, ["batch", decoder.kv_heads, "past", decoder.head_dim])
    graph.output(LOGITS, "F32", ["batch", "length", decoder.vocabulary])
    for layer in range(decoder.layers):
        for which in ("key", "value"):
            graph.output(PRESENT.format(layer, which), kind, ["batch", decoder.kv_heads, "total", decoder.head_dim])


def entered(operators: Operators, state: str, change: str, module: str) -> tuple[str, str]:
    """The norm of the state with the last change added, where there is one, and that sum."""
    return operators.add_norm(state, change, module) if change else (operators.norm(state, module), state)


def feed_forward(graph: Graph, decoder: Decoder, operators: Operators, value: str, prefix: str) -> str:
    gate, up, down = (prefix + name for name in FEED_FORWARD)
    both = operators.linear(value, [gate, up])
    halves = [f"{prefix}mlp.gate", f"{prefix}mlp.up"]
    graph("Split", both, out=halves, axis=-1, num_outputs=2)
    return operators.linear(graph("Mul", operators.activate(halves[0]), halves[1]), [down])


def finish(graph: Graph, decoder: Decoder, operators: Operators, value: str) -> None:
    """The head, its soft cap, and float32."""
    cap, half = decoder.final_softcap, operators.kind != "F32"
    module = (EMBEDDING if decoder.tied else HEAD).removesuffix(".weight")
    logits = operators.linear(value, [module], out="" if cap or half else LOGITS)
    if half:
        logits = graph.cast(logits, "F32", out="" if cap else LOGITS)
    if cap:
        scale = graph.number(cap, "F32")
        graph("Mul", graph("Tanh", graph("Div", logits, scale)), scale, out=LOGITS)

