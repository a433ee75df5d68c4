"""Model families as tables: what llama.cpp calls a transformers model's settings and tensors, and the way back.

The names are those that llama.cpp's convert_hf_to_gguf writes (its `conversion` folder), tensor names by way of
gguf-py's own map. A setting that llama.cpp would ignore is refused, not dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import index
from typing import TYPE_CHECKING, Any

from converters.gguf.keyvalues import KV, kv
from converters.rotary import LLAMA3_DEFAULTS, check_positive, is_positive, llama3_factors, rotary_settings
from converters.shapes import ATTENTION, FEED_FORWARD, QUERY_KEY_VALUE, Shapes, check_sizes
from edgeport.errors import ConvertError, CorruptCheckpoint, UnmappedTensor, UnsupportedArchitecture, need
from edgeport.tensor import AS_IS, Arrangement

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Metadata key after the architecture's name, config.json key, GGUF type.
SETTINGS = (
    ("block_count", "num_hidden_layers", "UINT32"),
    ("context_length", "max_position_embeddings", "UINT32"),
    ("embedding_length", "hidden_size", "UINT32"),
    ("feed_forward_length", "intermediate_size", "UINT32"),
    ("attention.head_count", "num_attention_heads", "UINT32"),
    ("attention.head_count_kv", "num_key_value_heads", "UINT32"),
    ("attention.key_length", "head_dim", "UINT32"),
    ("attention.value_length", "head_dim", "UINT32"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", "FLOAT32"),
    ("vocab_size", "vocab_size", "UINT32"),
)
GEMMA2_SETTINGS = (
    ("attn_logit_softcapping", "attn_logit_softcapping", "FLOAT32"),
    ("final_logit_softcapping", "final_logit_softcapping", "FLOAT32"),
    ("attention.sliding_window", "sliding_window", "UINT32"),
)
KNOWN_SCALING = ("type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
"""Settings under rope.scaling that `config` has a word for, or that nothing is computed from.

llama.cpp does not read yarn's betas for any family here, whatever a GGUF says of them: the folder has none, which means 32 and 1
there as well.
"""
TOKENS = {
    name: f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id" for name in ("bos", "eos", "eot", "eom", "pad")
}
"""Where a GGUF keeps the numbers of special tokens."""
YARN_CONTEXT = "rope.scaling.original_context_length"

# transformers' names of the tensors of all families; gguf-py's map says which of them an architecture has.
TENSORS = (
    "model.embed_tokens",
    "model.norm",
    "lm_head",
    *(
        "model.layers.{}." + name
        for name in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
)

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of llama.cpp, and the transformers models that it runs.

    `permuted`: rows of q and k go in interleaved pairs. `norm_shift`: what llama.cpp wants added to norm weights.
    """

    arch: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    activation: str = "silu"
    settings: tuple[tuple[str, str, str], ...] = SETTINGS
    permuted: bool = False
    norm_shift: float = 0.0
    biased: tuple[str, ...] = ()
    """config.json's switches for bias terms that llama.cpp has."""
    always_biased: tuple[str, ...] = ()
    """Linear layers of a decoder layer that have bias terms whatever config.json says."""
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    defaults: tuple[tuple[str, Any], ...] = ()
    """What this family's config.json may leave out."""
    query_key_norm: bool = False
    sandwich: bool = False
    """As in `Shapes`."""

    def metadata(self, config: Mapping[str, Any]) -> dict[str, KV]:
        """`general.architecture` and everything under the architecture's name.

        Raises UnsupportedArchitecture where llama.cpp would compute something else, ConvertError where config.json
        lacks a setting.
        """
        config = self.full(config)
        check_positive(rotary_settings(config))
        self._check(config)
        metadata = {"general.architecture": kv("STRING", self.arch)}
        for key, name, kind in self.settings:
            if (value := config.get(name)) is None:
                raise ConvertError(f"config.json says nothing of {name}, which a GGUF of {self.arch} needs")
            metadata[f"{self.arch}.{key}"] = kv(kind, value)
        rope = rotary_settings(config)
        metadata[f"{self.arch}.rope.dimension_count"] = kv("UINT32", config["head_dim"])
        metadata[f"{self.arch}.rope.freq_base"] = kv("FLOAT32", rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            metadata[f"{self.arch}.rope.scaling.type"] = kv("STRING", rope["rope_type"])
            metadata[f"{self.arch}.rope.scaling.factor"] = kv("FLOAT32", rope["factor"])
        if rope["rope_type"] == "yarn":
            context = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
            metadata[f"{self.arch}.{YARN_CONTEXT}"] = kv("UINT32", context)
        return metadata

    def config(self, metadata: Mapping[str, Any], rope_freqs: NDArray[np.float32] | None = None) -> dict[str, Any]:
        """config.json of a GGUF, from its metadata (name to value) and its `rope_freqs.weight` where it has one.

        Whether embedding and head are tied, and have biases, is in the list of tensors: the caller adds
        `tie_word_embeddings` and what `biases` says. Raises ConvertError, UnmappedTensor.
        """
        under = {key.removeprefix(f"{self.arch}."): value for key, value in metadata.items()}
        # Of the families with one architecture, the first is what a GGUF of it is read as.
        read_as = family_of(self.arch)
        config: dict[str, Any] = {"architectures": [read_as.classes[0]], "model_type": read_as.model_types[0]}
        config["hidden_act" if self.activation == "silu" else "hidden_activation"] = self.activation
        for key, name, kind in self.settings:
            if key in under:
                value = _one(key, under[key])
                config[name] = _shortest(value) if kind == "FLOAT32" else index(value)
        if "vocab_size" not in config and "tokenizer.ggml.tokens" in metadata:
            config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
        # llama.cpp's own rule; the defaults of a transformers class are of no account here.
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        if "head_dim" not in config and config.get("num_attention_heads") and config.get("hidden_size"):
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        missing = sorted({name for _, name, _ in self.settings if config.get(name) is None})
        if missing:
            raise ConvertError(f"the GGUF's metadata does not give {', '.join(missing)}")
        if self.arch == "gemma2":
            config["query_pre_attn_scalar"] = _gemma2_scalar(config)
        config["rope_theta"] = theta = _shortest(under.get("rope.freq_base", 10000.0))
        if not is_positive(theta):
            raise CorruptCheckpoint(f"the GGUF's metadata has a rope.freq_base of {theta}, where a positive number was expected")
        unknown = {key for key in under if key.startswith("rope.scaling.") and key.rpartition(".")[2] not in KNOWN_SCALING}
        other = sorted(key for key in unknown if under[key] != 1.0)
        if other or under.get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
            raise UnsupportedArchitecture(f"{', '.join(other) or 'rope.dimension_count'} of the GGUF has no counterpart here")
        # llama.cpp's own defaults, and the name of files from 2023
        factor = under.get("rope.scaling.factor") or under.get("rope.scale_linear") or 1.0
        scaling = under.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
        if rope_freqs is not None:
            config["rope_scaling"] = llama3_scaling(rope_freqs, config["head_dim"], theta)
        elif scaling in ("linear", "yarn"):
            config["rope_scaling"] = {"rope_type": scaling, "factor": _shortest(factor)}
            if scaling == "yarn" and YARN_CONTEXT in under:
                config["rope_scaling"]["original_max_position_embeddings"] = index(under[YARN_CONTEXT])
        elif scaling != "none":
            raise UnsupportedArchitecture(f"rope scaling {scaling!r} of the GGUF has no counterpart here")
        ids = {name: index(metadata[key]) for name, key in TOKENS.items() if key in metadata}
        config |= {f"{name}_token_id": ids.get(name) for name in ("bos", "pad")}
        # llama.cpp stops at each of these; transformers' own folders of such models have a list (Llama 3 Instruct's)
        ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
        config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
        return config

    def biases(self, gguf_names: Container[str]) -> dict[str, bool]:
        """config.json's bias switches, as the GGUF's tensor names tell."""
        signs = {"attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"), "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}
        return {
            switch: any(f"blk.0.{module}.bias" in gguf_names for module in signs[switch])
            for switch in family_of(self.arch).biased
        }

    def check(self, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], teller: str = "config.json") -> None:
        """Hold the shapes of all weights against the config.json that `teller` gave. Raises SourceError, ConvertError."""
        full = self.full(config)
        head_dim, kv_heads = full["head_dim"], full["num_key_value_heads"]
        check_sizes(full, head_dim, kv_heads, teller)
        shapes = Shapes(
            full["hidden_size"], full["intermediate_size"], full["num_hidden_layers"], full["num_attention_heads"], kv_heads,
            head_dim, full["vocab_size"], frozenset((*ATTENTION, *FEED_FORWARD)), self.query_key_norm, self.sandwich,
        )  # fmt: skip
        shapes.check(found, bool(full.get("tie_word_embeddings")), teller)

    def tensor(self, hf_name: str, config: Mapping[str, Any]) -> tuple[str, Arrangement]:
        """The GGUF name of a transformers tensor, and how its values lie there. Raises UnmappedTensor."""
        template, layer, suffix = _take_apart(hf_name, r"(model\.layers\.)(\d+)(\..+)")
        target = _names(self.arch).get(template)
        if target is None or not suffix or (layer is not None and int(layer) >= config["num_hidden_layers"]):
            raise UnmappedTensor(f"a GGUF of {self.arch} has no place for the tensor {hf_name}")
        if suffix == ".bias" and template.split(".", 3)[-1] not in self.with_bias(config):
            raise UnmappedTensor(
                f"config.json does not call for the tensor {hf_name}, which transformers leaves out and llama.cpp would add"
            )
        return target.format(layer) + suffix, self._arrangement(template, suffix, config)

    def with_bias(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The linear layers of a decoder layer that have bias terms."""
        switched = ATTENTION * bool(config.get("attention_bias")) + FEED_FORWARD * bool(config.get("mlp_bias"))
        return self.always_biased + switched

    def hf_name(self, gguf_name: str) -> str:
        """The transformers name of a GGUF tensor. Raises UnmappedTensor."""
        template, layer, suffix = _take_apart(gguf_name, r"(blk\.)(\d+)(\..+)")
        for name, target in _names(self.arch).items():
            if target == template and suffix:
                return name.format(layer) + suffix
        raise UnmappedTensor(f"transformers has no place for the tensor {gguf_name} of a GGUF of {self.arch}")

    def constants(self, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Tensors that a GGUF needs and a checkpoint has not."""
        rope = rotary_settings(config)
        if rope["rope_type"] != "llama3":
            return {}
        return {ROPE_FREQS: llama3_factors(rope, self.full(config)["head_dim"])}

    def _arrangement(self, template: str, suffix: str, config: Mapping[str, Any]) -> Arrangement:
        full = self.full(config)
        heads = {"q_proj": full["num_attention_heads"], "k_proj": full["num_key_value_heads"]}
        module = template.rpartition(".")[2]
        if self.permuted and module in heads:
            return Arrangement(heads=heads[module])
        if self.norm_shift and module.endswith("norm") and suffix == ".weight":
            return Arrangement(shift=self.norm_shift)
        return AS_IS

    def full(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with what transformers fills in."""
        # null is a value too, and not the default: as many heads of keys as of queries
        full = {name: value for name, value in {**dict(self.defaults), **config}.items() if value is not None}
        if "num_attention_heads" in full and "hidden_size" in full:
            full.setdefault("num_key_value_heads", full["num_attention_heads"])
            # no heads at all are for `check` to refuse
            full.setdefault("head_dim", full["hidden_size"] // (full["num_attention_heads"] or 1))
        return full

    def _check(self, config: Mapping[str, Any]) -> None:
        """Raises UnsupportedArchitecture for settings that llama.cpp has no word for."""
        refused = [name for name in ("attention_bias", "mlp_bias") if config.get(name) and name not in self.biased]
        rope = rotary_settings(config)
        if rope["rope_type"] not in self.rope_types:
            refused.append(f"rope_type {rope['rope_type']!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            refused.append("partial_rotary_factor")
        refused += [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
        if rope["rope_type"] == "yarn":
            # llama.cpp scales attention by this formula, and has no setting for corrections that are not rounded.
            usual = 0.1 * math.log(rope["factor"]) + 1.0
            if not math.isclose(rope.get("attention_factor", usual), usual) or not rope.get("truncate", True):
                refused.append("attention_factor or truncate of yarn")
            if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
                refused.append("beta_fast or beta_slow of yarn")
        for name in ("hidden_act", "hidden_activation"):
            if name in config and config[name] != self.activation and name != self._unused():
                refused.append(f"{name} {config[name]!r}")
        layers = config.get("num_hidden_layers", 0)
        if self.arch == "gemma2":
            alternate = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
            if config.get("layer_types", alternate) != alternate:
                refused.append("layer_types")
            if config.get("query_pre_attn_scalar") != _gemma2_scalar(config):
                refused.append(f"query_pre_attn_scalar {config.get('query_pre_attn_scalar')}")
            if config.get("use_bidirectional_attention"):
                refused.append("use_bidirectional_attention")
        elif self.arch != "llama" and config.get("use_sliding_window"):
            # layer_types, where they are there, leave max_window_layers without a say
            kinds = config.get("layer_types")
            if "sliding_attention" in kinds if kinds else config.get("max_window_layers", 28) < layers:
                refused.append("use_sliding_window")
        if refused:
            raise UnsupportedArchitecture(f"llama.cpp's {self.arch} does not compute: {', '.join(refused)}")

    def _unused(self) -> str:
        """Gemma's first configs have a hidden_act that its code does not read."""
        return "hidden_act" if self.arch == "gemma2" else ""


_LLAMA = Family(
    "llama",
    ("LlamaForCausalLM",),
    ("llama",),
    permuted=True,
    biased=("attention_bias", "mlp_bias"),
    rope_types=("default", "linear", "yarn", "llama3"),
    defaults=(("max_position_embeddings", 2048), ("rms_norm_eps", 1e-6)),
)

_QWEN_DEFAULTS = (("max_position_embeddings", 32768), ("rms_norm_eps", 1e-6), ("num_key_value_heads", 32))

FAMILIES = (
    _LLAMA,
    # Mistral's sliding window is not among a "llama" GGUF's settings: beyond the window llama.cpp attends to all.
    replace(
        _LLAMA,
        classes=("MistralForCausalLM",),
        model_types=("mistral",),
        biased=(),
        defaults=(("max_position_embeddings", 131072), ("rms_norm_eps", 1e-6), ("num_key_value_heads", 8)),
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        ("gemma2",),
        activation="gelu_pytorch_tanh",
        settings=SETTINGS + GEMMA2_SETTINGS,
        norm_shift=1.0,
        rope_types=("default", "linear"),
        defaults=(
            ("max_position_embeddings", 8192),
            ("rms_norm_eps", 1e-6),
            ("head_dim", 256),
            ("num_key_value_heads", 4),
            ("query_pre_attn_scalar", 256),
            ("tie_word_embeddings", True),
        ),
        sandwich=True,
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), defaults=_QWEN_DEFAULTS, always_biased=QUERY_KEY_VALUE),
    Family("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), defaults=(*_QWEN_DEFAULTS, ("head_dim", 128)), query_key_norm=True),
)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnsupportedArchitecture."""
    classes = tuple(config.get("architectures") or ())
    for entry in FAMILIES:
        if set(classes) & set(entry.classes) or (not classes and config.get("model_type") in entry.model_types):
            return entry
    known = ", ".join(name for entry in FAMILIES for name in entry.classes)
    raise UnsupportedArchitecture(
        f"no GGUF table for {', '.join(classes) or config.get('model_type') or 'a config.json without architectures'};"
        f" supported: {known}"
    )


def family_of(arch: str) -> Family:
    """The family of a GGUF's `general.architecture`. Raises UnsupportedArchitecture."""
    for entry in FAMILIES:
        if entry.arch == arch:
            return entry
    known = ", ".join(sorted({entry.arch for entry in FAMILIES}))
    raise UnsupportedArchitecture(f"no table for a GGUF of architecture {arch!r}; supported: {known}")


def llama3_scaling(factors: NDArray[np.float32], head_dim: int, theta: float) -> dict[str, Any]:
    """The `rope_scaling` whose `llama3_factors` these are. Raises UnmappedTensor where no known one is."""
    import numpy as np

    # The lowest frequencies are divided by the whole factor, so it can be read off the end.
    factor = _shortest(float(factors[-1]))
    rope: dict[str, Any] = {"rope_type": "llama3", "factor": factor, **LLAMA3_DEFAULTS}
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Between the frequencies that stay and those, the formula can be solved for the length of the original context.
    between = np.flatnonzero((factors > 1) & (factors < factor))
    if len(between):
        smooth = (1 / factors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        wavelengths = 2 * math.pi * theta ** (2 * between / head_dim)
        rope["original_max_position_embeddings"] = round(float(np.median(wavelengths * (smooth * (high - low) + low))))
    expected = llama3_factors({**rope, "rope_theta": theta}, head_dim)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UnmappedTensor(
            f"{ROPE_FREQS} holds factors that are not Llama 3's formula with a factor of {factor:g}:"
            " transformers has no setting for them"
        )
    return rope


def _gemma2_scalar(config: Mapping[str, Any]) -> int:
    """llama.cpp's attention scale, which it takes from the layer count (src/models/gemma2.cpp): 46 layers are 27B."""
    if config["num_hidden_layers"] == 46:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


@lru_cache
def _names(arch: str) -> dict[str, str]:
    """transformers name to GGUF name, both without suffix and with {} for the layer."""
    gguf = need("gguf", "gguf")
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, 1)
    found = {template: names.get_name(template.format(0)) for template in TENSORS}
    return {template: name.replace("blk.0.", "blk.{}.") for template, name in found.items() if name}


def _take_apart(name: str, pattern: str) -> tuple[str, str | None, str]:
    """(name with {} for the layer and without suffix, layer, suffix); the suffix is empty where it is not known."""
    stem, dot, last = name.rpartition(".")
    suffix = dot + last if last in ("weight", "bias") else ""
    if match := re.fullmatch(pattern, stem):
        return f"{match[1]}{{}}{match[3]}", match[2], suffix
    return stem, None, suffix


def _one(key: str, value: Any) -> Any:
    """A setting that may stand once for each layer. Raises UnsupportedArchitecture where the layers differ."""
    if not isinstance(value, list):
        return value
    if not value or any(other != value[0] for other in value):
        raise UnsupportedArchitecture(f"{key} of the GGUF differs from layer to layer, which no family here does")
    return value[0]


def _shortest(value: float) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06. Raises TypeError."""
    import numpy as np

    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} where a number was expected")
    return float(str(np.float32(value)))
