"""Which weights a decoder of the Llama kind has, and in which shapes, as its config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converters.rotary import is_positive
from edgeport.errors import ConvertError, CorruptCheckpoint, MissingTensor, about
from edgeport.tensor import EMBEDDING, HEAD

QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QUERY_KEY_VALUE, "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
FINAL_NORM = "model.norm"
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shapes:
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    biased: frozenset[str]
    """Those linear layers of a decoder layer that have a bias."""
    query_key_norm: bool
    sandwich: bool
    """Whether attention and feed-forward are normalised after as well as before."""

    @property
    def layer_weights(self) -> frozenset[str]:
        """The names of one layer's weights, without `model.layers.N.`."""
        norms = NORMS + ("pre_feedforward_layernorm", "post_feedforward_layernorm") * self.sandwich
        norms += ("self_attn.q_norm", "self_attn.k_norm") * self.query_key_norm
        return frozenset(
            [f"{name}.weight" for name in (*ATTENTION, *FEED_FORWARD, *norms)] + [f"{name}.bias" for name in self.biased]
        )

    def names(self) -> Iterator[str]:
        """Of all weights, with the head."""
        yield EMBEDDING
        own = sorted(self.layer_weights)
        for layer in range(self.layers):
            yield from (f"model.layers.{layer}.{name}" for name in own)
        yield f"{FINAL_NORM}.weight"
        yield HEAD

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the weight `name` has to have."""
        query, narrow, wide = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.feed_forward
        module, _, kind = name.rpartition(".")
        stem = module.rpartition(".")[2]
        rows, columns = {
            "q_proj": (query, self.hidden), "k_proj": (narrow, self.hidden), "v_proj": (narrow, self.hidden),
            "o_proj": (self.hidden, query), "gate_proj": (wide, self.hidden), "up_proj": (wide, self.hidden),
            "down_proj": (self.hidden, wide), "q_norm": (self.head_dim, 0), "k_norm": (self.head_dim, 0),
            "embed_tokens": (self.vocabulary, self.hidden), "lm_head": (self.vocabulary, self.hidden),
        }.get(stem, (self.hidden, 0))  # fmt: skip
        return (rows, columns) if columns and kind == "weight" else (rows,)

    def check(self, found: Mapping[str, tuple[int, ...]], tied: bool, teller: str = "config.json") -> None:
        """Hold the shapes of the weights that there are against these. Raises MissingTensor, CorruptCheckpoint.

        A bias may be missing: every program computes without it then.
        """
        for name in self.names():
            if name not in found and not (name.endswith(".bias") or (tied and name == HEAD)):
                raise MissingTensor(f"the model has no tensor {name}, which {teller} calls for")
            if name in found and found[name] != (expected := self.shape(name)):
                with about(name):
                    raise CorruptCheckpoint(f"it has shape {list(found[name])} where {teller} says {list(expected)}")


def check_sizes(config: Mapping[str, Any], head_dim: Any, kv_heads: Any, teller: str = "config.json") -> None:
    """Raises KeyError, ConvertError for what would give a model that no program loads."""
    sizes = {name: config[name] for name in SIZES} | {"head_dim": head_dim, "num_key_value_heads": kv_heads}
    wrong = [f"{name} {value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    wrong += [] if is_positive(config["rms_norm_eps"]) else [f"rms_norm_eps {config['rms_norm_eps']!r}"]
    if not wrong and (head_dim % 2 or config["num_attention_heads"] % kv_heads):
        wrong = [f"heads of {head_dim} numbers, {config['num_attention_heads']} of queries and {kv_heads} of keys"]
    if wrong:
        raise ConvertError(f"{teller} has {', '.join(wrong)}, of which no model can be made")
