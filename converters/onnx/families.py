"""Model families as tables: what a config.json says of the decoder that an ONNX graph has to compute.

A setting that the graph would not follow is refused, not dropped. Source: transformers' modeling files of each family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.rotary import frequencies, rotary_settings
from converters.shapes import ATTENTION, FEED_FORWARD, FINAL_NORM, NORMS, QUERY_KEY_VALUE, Shapes, check_sizes
from edgeport.encoders import ENCODERS
from edgeport.errors import ConvertError, MissingTensor, UnmappedTensor, UnsupportedArchitecture
from edgeport.tensor import EMBEDDING, HEAD

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Config = Mapping[str, Any]
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Decoder(Shapes):
    """What the graph computes."""

    positions: int
    epsilon: float
    frequencies: NDArray[np.float32]
    """[head_dim / 2]: angles from one position to the next."""
    rotary_scale: float
    scale: float
    """Of the product of query and key."""
    windows: tuple[int, ...]
    """Of each layer: how many tokens it attends to, itself included; 0: all."""
    softcap: float
    """Of attention scores: softcap * tanh(score / softcap); 0: none."""
    final_softcap: float
    """Of the logits."""
    embedding_scale: float
    activation: str
    """"silu" or "gelu_pytorch_tanh"."""
    norm_shift: float
    """What is added to the stored weight of a norm."""
    tied: bool

    def has_bias(self, module: str) -> bool:
        """Of a linear layer by its full name."""
        return module.split(".", 3)[-1] in self.biased

    def role(self, name: str) -> str:
        """ "linear", "norm", "bias", "embedding" or "head". Raises UnmappedTensor for a weight that has no place."""
        if name in (EMBEDDING, HEAD):
            return "embedding" if name == EMBEDDING else "head"
        if name == f"{FINAL_NORM}.weight":
            return "norm"
        found = LAYER.fullmatch(name)
        if not found or int(found[1]) >= self.layers or f"{found[2]}.{found[3]}" not in self.layer_weights:
            raise UnmappedTensor(f"the ONNX graph of this model has no place for the tensor {name}")
        return "bias" if found[3] == "bias" else "norm" if found[2].endswith("norm") else "linear"


@dataclass(frozen=True, slots=True)
class Family:
    """What one family's configs have in common."""

    name: str
    """model_type."""
    architecture: str
    activation: str = "silu"
    always_biased: tuple[str, ...] = ()
    attention_bias: bool = False
    """Whether config.json's attention_bias is followed, and mlp_bias below."""
    mlp_bias: bool = False
    query_key_norm: bool = False
    sandwich: bool = False
    layer_types: bool = False
    """Whether config.json's layer_types is followed."""
    windows: Callable[[Config, int], bool] = lambda config, layer: False
    """Whether a layer's attention is cut off at sliding_window, where no layer_types say."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """What config.json may leave out."""

    def decoder(self, config: Config, names: Container[str]) -> Decoder:
        """Of a model that has weights of these names: a head that is stored is one of its own, whatever config.json says.

        Raises UnsupportedArchitecture, ConvertError, MissingTensor.
        """
        # null is a value too: a Mistral whose sliding_window is null has none, whatever the default
        given = {name: value for name, value in {**dict(self.defaults), **config}.items() if value is not None}
        try:
            hidden, heads, layers = (given[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
            head_dim, positions = given.get("head_dim", hidden // heads), given["max_position_embeddings"]
            check_sizes(given, head_dim, given.get("num_key_value_heads", heads))
            angles, rotary_scale = frequencies(rotary_settings(given), head_dim, positions)
            # before anything is made for each layer that config.json promises
            if (last := f"model.layers.{layers - 1}.{NORMS[0]}.weight") not in names:
                raise MissingTensor(f"the model has no tensor {last}, which config.json calls for")
            self.refuse(given, layers)
            gemma = self.sandwich
            return Decoder(
                hidden, given["intermediate_size"], layers, heads, given.get("num_key_value_heads", heads), head_dim,
                given["vocab_size"],
                biased=frozenset(
                    (*self.always_biased, *ATTENTION * bool(given.get("attention_bias") and self.attention_bias),
                     *FEED_FORWARD * bool(given.get("mlp_bias") and self.mlp_bias))
                ),
                query_key_norm=self.query_key_norm, sandwich=self.sandwich,
                positions=positions, epsilon=float(given["rms_norm_eps"]), frequencies=angles, rotary_scale=rotary_scale,
                scale=float(given.get("query_pre_attn_scalar", head_dim)) ** -0.5,
                windows=tuple(self.window(given, layer) for layer in range(layers)),
                softcap=float(given.get("attn_logit_softcapping", 0)) if gemma else 0.0,
                final_softcap=float(given.get("final_logit_softcapping", 0)) if gemma else 0.0,
                embedding_scale=hidden**0.5 if gemma else 1.0, activation=self.activation, norm_shift=float(gemma),
                tied=bool(given.get("tie_word_embeddings", gemma)) and HEAD not in names,
            )  # fmt: skip
        except KeyError as error:
            raise ConvertError(f"config.json says nothing of {error.args[0]}, which the graph of {self.name} needs") from error
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ConvertError(
                f"config.json holds a value of another kind than transformers writes ({type(error).__name__}: {error})"
            ) from error

    def window(self, config: Config, layer: int) -> int:
        kinds = config.get("layer_types") if self.layer_types else None
        sliding = kinds[layer] == "sliding_attention" if kinds else self.windows(config, layer)
        return int(config.get("sliding_window", 0)) if sliding else 0

    def refuse(self, config: Config, layers: int) -> None:
        """Raises UnsupportedArchitecture for settings that change the model and have no place in the graph."""
        refused = [
            name for name, known in (("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias))
            if config.get(name) and not known
        ]  # fmt: skip
        # Gemma's first configs have a hidden_act that its code does not read
        key = "hidden_activation" if self.sandwich else "hidden_act"
        if config.get(key, self.activation) != self.activation:
            refused.append(f"{key} {config[key]!r}")
        kinds = config.get("layer_types") if self.layer_types else None
        if kinds and (len(kinds) != layers or not {*kinds} <= {"full_attention", "sliding_attention"}):
            refused.append("layer_types")
        refused += ["use_bidirectional_attention"] if config.get("use_bidirectional_attention") else []
        if refused:
            raise UnsupportedArchitecture(f"the ONNX graph of {self.name} does not compute: {', '.join(refused)}")


def _beyond_max_window_layers(config: Config, layer: int) -> bool:
    return bool(config.get("use_sliding_window")) and layer >= config.get("max_window_layers", 28)


_QWEN = (("max_position_embeddings", 32768), ("rms_norm_eps", 1e-6), ("sliding_window", 4096))
FAMILIES = (
    Family("llama", "LlamaForCausalLM", attention_bias=True, mlp_bias=True,
           defaults=(("max_position_embeddings", 2048), ("rms_norm_eps", 1e-6))),
    # transformers' AutoConfig takes a Mistral with layer_types for a Ministral, which reads them
    Family("mistral", "MistralForCausalLM", layer_types=True, windows=lambda config, layer: True,
           defaults=(("max_position_embeddings", 131072), ("rms_norm_eps", 1e-6), ("num_key_value_heads", 8),
                     ("sliding_window", 4096))),
    Family("gemma2", "Gemma2ForCausalLM", "gelu_pytorch_tanh", sandwich=True, attention_bias=True, layer_types=True,
           windows=lambda config, layer: layer % 2 == 0,
           defaults=(("max_position_embeddings", 8192), ("rms_norm_eps", 1e-6), ("head_dim", 256),
                     ("num_key_value_heads", 4), ("query_pre_attn_scalar", 256), ("sliding_window", 4096),
                     ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))),
    Family("qwen2", "Qwen2ForCausalLM", always_biased=QUERY_KEY_VALUE, layer_types=True, windows=_beyond_max_window_layers,
           defaults=_QWEN),
    Family("qwen3", "Qwen3ForCausalLM", attention_bias=True, query_key_norm=True, layer_types=True,
           windows=_beyond_max_window_layers, defaults=(*_QWEN, ("head_dim", 128))),
)  # fmt: skip


def family(config: Config) -> Family:
    """The family of a config.json. Raises UnsupportedArchitecture."""
    told = config.get("architectures")
    classes = told if isinstance(told, list) else ()
    for entry in FAMILIES:
        if entry.architecture in classes or (not classes and config.get("model_type") == entry.name):
            return entry
    named = ", ".join(map(str, classes)) or config.get("model_type") or "a config.json without architectures"
    known = f"{', '.join(entry.architecture for entry in FAMILIES)}, and encoders of type {', '.join(ENCODERS)}"
    raise UnsupportedArchitecture(f"there is no ONNX graph for {named}; supported: {known}")
