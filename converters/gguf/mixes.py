"""Which ggml type each tensor of a GGUF gets under a file type such as Q4_K_M: the choices of llama-quantize.

A file type is a default for most tensors and better types for those that suffer most. The tables below were written
from llama.cpp's src/llama-quant.cpp (as bundled with llama-cpp-python 0.3.36) and are tested against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from converters.gguf.header import TYPES
from edgeport.errors import ConvertError, DecodeOnly, UnknownName
from edgeport.registry import miss


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice of types depends on besides names and shapes. `n_head` and `n_head_kv`: of the first layer."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @classmethod
    def of(cls, value: Callable[[str], Any]) -> Facts:
        """From a GGUF's metadata: `value` is the lookup of a key, such as `Header.value`."""
        arch = str(value("general.architecture"))
        keys = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
        layers, heads, groups, experts = (_first(value(f"{arch}.{key}")) for key in keys)
        return cls(arch, layers or 0, heads or 0, heads or 0 if groups is None else groups, experts or 0)

    @property
    def gqa(self) -> int:
        """Query heads that share a key and value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """What llama.cpp calls LLM_TYPE_70B, whatever its size: it knows models by their number of layers."""
        if self.arch == "llama":
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return (self.arch, self.n_layer) in {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


def _first(value: Any) -> Any:
    return (value[0] if value else 0) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place: the `index`-th of its kind, of `count`."""

    index: int
    count: int
    gqa: int
    imatrix: bool


Condition = Callable[[Place], bool]
Choices = tuple[tuple[str, Condition], ...]
"""Types and when they apply; the first that does is taken, and without any the mix's default."""


def _always(place: Place) -> bool:
    return True


def _more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = place.count // 8
    outer = place.index < eighth or place.index >= 7 * place.count // 8
    return outer or (place.index - eighth) % 3 == 2


def _first_eighth(place: Place) -> bool:
    return place.index < place.count // 8


def _first_sixteenth(place: Place) -> bool:
    return place.index < place.count // 16


def _first_eighth_weighted(place: Place) -> bool:
    return place.imatrix and _first_eighth(place)


def _first_eighth_unweighted(place: Place) -> bool:
    return not place.imatrix and _first_eighth(place)


def _first_two(place: Place) -> bool:
    return place.index < 2


def _first_four(place: Place) -> bool:
    return place.index < 4


def _grouped(place: Place) -> bool:
    return place.gqa >= 4


@dataclass(frozen=True, slots=True)
class Mix:
    """A file type. `value`, `down`, `attention`: choices for attn_v (or what holds it), ffn_down and attn_output.

    `embedding`: of token_embd where an output.weight stands apart from it. `experts`: attn_output's type in models
    of eight experts, which know no other choice for it.
    """

    default: str
    value: Choices = ()
    down: Choices = ()
    attention: Choices = ()
    embedding: str | None = None
    experts: str | None = None


MIXES = {
    "F32": Mix("F32"),
    "F16": Mix("F16"),
    "BF16": Mix("BF16"),
    "Q4_0": Mix("Q4_0", down=(("Q4_1", _first_eighth_weighted),)),
    "Q4_1": Mix("Q4_1"),
    "Q5_0": Mix("Q5_0", down=(("Q5_1", _first_eighth_weighted),)),
    "Q5_1": Mix("Q5_1"),
    "Q8_0": Mix("Q8_0"),
    "Q2_K": Mix(
        "Q2_K",
        value=(("Q4_K", _grouped), ("Q3_K", _always)),
        down=(("Q3_K", _always),),
        attention=(("Q3_K", _always),),
        experts="Q5_K",
    ),
    "Q2_K_S": Mix("Q2_K", value=(("Q4_K", _grouped),), down=(("Q4_K", _first_eighth),)),
    "Q3_K_S": Mix("Q3_K", experts="Q5_K"),
    "Q3_K_M": Mix(
        "Q3_K",
        value=(("Q5_K", _first_two), ("Q4_K", _always)),
        down=(("Q5_K", _first_sixteenth), ("Q4_K", _always)),
        attention=(("Q4_K", _always),),
        experts="Q5_K",
    ),
    "Q3_K_L": Mix(
        "Q3_K", value=(("Q5_K", _always),), down=(("Q5_K", _always),), attention=(("Q5_K", _always),)
    ),
    "Q4_K_S": Mix("Q4_K", value=(("Q5_K", _first_four),), down=(("Q5_K", _first_eighth),), experts="Q5_K"),
    "Q4_K_M": Mix("Q4_K", value=(("Q6_K", _more_bits),), down=(("Q6_K", _more_bits),), experts="Q5_K"),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", value=(("Q6_K", _more_bits),), down=(("Q6_K", _more_bits),)),
    "Q6_K": Mix("Q6_K"),
    "IQ4_NL": Mix(
        "IQ4_NL", value=(("Q5_K", _grouped),), down=(("Q5_K", _first_eighth_unweighted),), experts="Q5_K"
    ),
    "IQ4_XS": Mix(
        "IQ4_XS", value=(("Q5_K", _grouped),), down=(("Q5_K", _first_eighth_unweighted),), experts="Q5_K"
    ),
    "TQ1_0": Mix("TQ1_0", embedding="Q4_K"),
    "TQ2_0": Mix("TQ2_0", embedding="Q4_K"),
    "MXFP4_MOE": Mix("MXFP4"),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FALCON = {
    "Q2_K": replace(MIXES["Q2_K"], attention=()),
    "Q3_K_M": replace(
        MIXES["Q3_K_M"], down=(("Q5_K", _first_sixteenth), ("Q4_K", _more_bits)), attention=(), experts=None
    ),
    "Q3_K_L": replace(MIXES["Q3_K_L"], down=(("Q4_K", _always),), attention=(("Q4_K", _always),)),
    "Q4_K_S": replace(MIXES["Q4_K_S"], down=()),
    "Q4_K_M": replace(MIXES["Q4_K_M"], down=(("Q6_K", _first_sixteenth), ("Q5_K", _more_bits))),
}
"""Mixes that differ for Falcon, whose output.weight moreover is always Q8_0."""

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25,
    "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip
"""`enum llama_ftype`: what `general.file_type` says."""

FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""For rows that do not divide into blocks of 256; where those of 32 do not fit either, the type is F16."""

TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
KINDS = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_output.weight": "attention",
    "ffn_down": "down",
}
"""What a name has to contain, in the order of asking."""

KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight",
    "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight",
    "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd",
    "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)  # fmt: skip
"""Parts of the names of matrices that are small, or that rounding harms out of proportion."""
KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


def file_type(name: str) -> str:
    """The file type that a user's word means: any case, and llama-quantize's aliases. Raises UnknownName."""
    known = ALIASES.get(name.upper(), name.upper())
    if known not in MIXES:
        raise UnknownName(miss([*MIXES, *ALIASES], name, "GGUF file type"))
    return known


def tensor_type(name: str) -> str:
    """The ggml type that a user's word means, if it can be written. Raises UnknownName, DecodeOnly."""
    known, able = name.upper(), [type for type, block in TYPES.items() if block.can == "rw"]
    if known not in TYPES:
        raise UnknownName(miss(able, name, "ggml type"))
    if known not in able:
        raise DecodeOnly(f"{known} can be read and not written; edgeport writes {', '.join(able)}")
    return known


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether llama-quantize gives the tensor another type at all; vectors, norms and routers keep theirs."""
    return (
        prod(shape[:-1]) > 1
        and name.endswith("weight")
        and name not in KEPT_WHOLE
        and not any(part in name for part in KEPT)
    )


def choose(
    ftype: str,
    tensors: Sequence[tuple[str, Sequence[int]]],
    facts: Facts,
    *,
    tensor_types: Iterable[tuple[str, str]] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    has_imatrix: bool = False,
) -> dict[str, str]:
    """The ggml type of each of `tensors`: (GGUF name, shape in numpy's order), all of the model, in any order.

    What llama-quantize leaves alone is F32, as its converter writes it. `tensor_types`: (regular expression, type)
    pairs, of which the first that is found in a name counts; unlike llama-quantize, one is obeyed under F32, F16
    and BF16 too, and one that is found in no name is an error. Raises UnknownName, DecodeOnly, ConvertError.
    """
    ftype = file_type(ftype)
    names = [name for name, _ in tensors]
    overrides = [(_pattern(pattern), tensor_type(type)) for pattern, type in tensor_types]
    output = tensor_type(output_tensor_type) if output_tensor_type else None
    embedding = tensor_type(token_embedding_type) if token_embedding_type else None
    quantized = [(name, tuple(shape)) for name, shape in tensors if is_quantized(name, shape)]
    for pattern, _ in overrides:
        if not any(pattern.search(name) for name, _ in quantized):
            raise UnknownName(
                f"--tensor-type {pattern.pattern!r} is found in no name of a tensor to be quantized"
            )
    quantized.sort(key=lambda tensor: _order(tensor[0]))
    manual = {
        name: next((type for pattern, type in overrides if pattern.search(name)), None)
        for name, _ in quantized
    }
    places = _places([name for name, _ in quantized if not manual[name]], names, facts, has_imatrix)
    tied = "output.weight" not in names
    chosen = dict.fromkeys(names, "F32")
    for name, shape in quantized:
        own = manual[name]
        if embedding and name in TOKEN_EMBEDDINGS and not (own and name != "token_embd.weight"):
            chosen[name] = embedding
        elif output and name == "output.weight":
            chosen[name] = output
        elif own or TYPES[MIXES[ftype].default].size == 1:
            chosen[name] = _fitting(own or MIXES[ftype].default, shape)
        elif name == "output.weight" or (tied and name in TOKEN_EMBEDDINGS):
            chosen[name] = _fitting(output or _output(ftype, shape, facts), shape)
        else:
            chosen[name] = _fitting(_inner(ftype, name, shape, facts, places.get(name)), shape)
    large = (*TOKEN_EMBEDDINGS, "output.weight")
    starved = [name for name in names if chosen[name] == "Q2_K" and name not in large]
    if ftype == "Q2_K_S" and starved and not has_imatrix:
        raise ConvertError(f"Q2_K_S needs an importance matrix (--imatrix), for {starved[0]} among others")
    return chosen


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise UnknownName(f"--tensor-type {text!r} is no regular expression: {error}") from error


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


def _order(name: str) -> tuple[int, bytes]:
    """llama.cpp's order of tensors: by layer, then by name."""
    return _layer(name), name.encode()


def _kind(name: str) -> str | None:
    return next((kind for part, kind in KINDS.items() if part in name), None)


def _places(
    counted: Sequence[str], names: Sequence[str], facts: Facts, has_imatrix: bool
) -> dict[str, tuple[str, Place]]:
    """Kind and place of the tensors that llama-quantize has a rule for.

    It numbers those that no override took, in its order; and ffn_down by its layer where there are experts.
    """
    counts = {"value": sum(_kind(name) == "value" for name in names), "down": facts.n_layer}
    seen: dict[str, int] = {}
    places = {}
    for name in counted:
        if kind := _kind(name):
            index = seen.get(kind, 0)
            seen[kind] = index + 1
            if kind == "down" and facts.n_expert > 1:
                index = _layer(name)
            places[name] = kind, Place(index, counts.get(kind, 0), facts.gqa, has_imatrix)
    return places


def _output(ftype: str, shape: Sequence[int], facts: Facts) -> str:
    """The type of output.weight, or of the embedding that stands for it."""
    default = MIXES[ftype].default
    if ftype == "MXFP4_MOE" or facts.arch == "falcon" or default == "Q8_0" or shape[-1] % TYPES[default].size:
        return "Q8_0"
    return "Q6_K"


def _inner(ftype: str, name: str, shape: Sequence[int], facts: Facts, place: tuple[str, Place] | None) -> str:
    """The type of a tensor that is not the output's, by its kind's rules."""
    mix = (FALCON if facts.arch == "falcon" else MIXES).get(ftype, MIXES[ftype])
    if ftype == "MXFP4_MOE":
        return mix.default if prod(shape[:-2]) > 1 else "Q8_0"
    if name in TOKEN_EMBEDDINGS:
        return mix.embedding or mix.default
    if place is None:
        return mix.default
    kind, at = place
    eight = facts.n_expert == 8
    if eight and kind in ("value", "key"):
        return "Q8_0"
    if eight and kind == "attention":
        return mix.experts or mix.default
    choices = {"value": mix.value, "down": mix.down, "attention": mix.attention}.get(kind, ())
    chosen = next((type for type, applies in choices if applies(at)), mix.default)
    if kind == "value" and facts.is_70b and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _fitting(type: str, shape: Sequence[int]) -> str:
    """The type, or the one that llama-quantize falls back to where rows do not divide into its blocks."""
    for candidate in (type, FALLBACKS.get(type, type)):
        if shape[-1] % TYPES[candidate].size == 0:
            return candidate
    return "F16"
