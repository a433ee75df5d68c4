"""From a patch's tensor names to the model's: tables of prefixes and renames, never string surgery in passing."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Mapping
from typing import Any

from edgeport.tensor import Weight
from edgeport.ties import ends

PEFT_PREFIX = "base_model.model."

TURNED_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
TURNED_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}
"""Linear layers that are stored [in, out] (transformers' Conv1D), by the model's type and their own names."""

TIED_BY_PEFT = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of weights that its `ensure_weight_tying` finds (`EMBEDDING_LAYER_NAMES`); under others it ties nothing."""

ENCODERS = ("albert", "beit", "bert", "deberta", "deit", "dinov2", "distilbert", "electra", "mpnet", "roberta", "vit")
"""What transformers' classes with a task call the encoder that another class is alone."""

# A fine-tune saved by one version of transformers, and a base saved by another or by a sub-model class, spell the
# same weight with these differences (transformers 5: `conversion_mapping`, `_checkpoint_conversion_mapping`).
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^", r""),
    (r"^model\.", r""),
    (r"^", r"model."),
    (r"^language_model\.model\.", r"model.language_model."),
    (r"^model\.language_model\.", r"language_model.model."),
    (r"^language_model\.lm_head\.", r"lm_head."),
    (r"^lm_head\.", r"language_model.lm_head."),
    (r"^model\.language_model\.", r"model."),
    (r"^transformer\.", r""),
    (r"^", r"transformer."),
    (r"\.gamma$", r".weight"),
    (r"\.beta$", r".bias"),
    *((rf"^{prefix}\.", r"") for prefix in ENCODERS),
    *((r"^", rf"{prefix}.") for prefix in ENCODERS),
)
# transformers 5 renames the modules of image encoders as it loads them, and back as it saves them: an adapter has the new
# names and a checkpoint the old ones. Each list is applied as a whole.
ATTENTION = (
    (r"\.attention\.q_proj\.", r".attention.attention.query."),
    (r"\.attention\.k_proj\.", r".attention.attention.key."),
    (r"\.attention\.v_proj\.", r".attention.attention.value."),
    (r"\.attention\.o_proj\.", r".attention.output.dense."),
)
SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ATTENTION,
    (
        *ATTENTION,
        (r"(^|\.)layers\.", r"\1encoder.layer."),
        (r"\.mlp\.fc1\.", r".intermediate.dense."),
        (r"\.mlp\.fc2\.", r".output.dense."),
    ),
)

LOADED: Mapping[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("wte.weight", "word_embeddings.weight"), ((r"^(?!lm_head\.)", r"transformer."),)),
    "decoder.embed_tokens.weight": ((r"^(?!lm_head\.)", r"model."),),
    "language_model.model.embed_tokens.weight": (
        (r"^language_model\.model\.", r"model.language_model."),
        (r"^language_model\.lm_head\.", r"lm_head."),
        (r"^", r"model."),
    ),
}
"""How a class of transformers with a head renames what is stored otherwise, by the embedding's name; the first that fits."""


def is_turned(module: str, config: Mapping[str, Any]) -> bool:
    """Whether it is a linear layer that a model with that config.json stores turned."""
    return config.get("model_type") in TURNED_MODELS and has_turned_name(module)


def has_turned_name(module: str) -> bool:
    return module.rpartition(".")[2] in TURNED_LAYERS


def resolve(name: str, known: Container[str]) -> str | None:
    """The spelling of weight `name` among the base's `known` names, or None."""
    for spelling in SPELLINGS:
        spelled = name
        for pattern, replacement in spelling:
            spelled = re.sub(pattern, replacement, spelled)
        for pattern, replacement in RENAMES:
            candidate = re.sub(pattern, replacement, spelled, count=1)
            if candidate in known:
                return candidate
    return None


def loaded(name: str, known: Collection[str]) -> str:
    """What transformers, and so PEFT, calls the weight `name` of a decoder that is stored under `known` names."""
    model = ends(known)
    for pattern, replacement in LOADED.get(model.embedding, ()) if model else ():
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def find(name: str, weights: Mapping[str, Weight]) -> Weight | None:
    """The weight of that name in any of its spellings; the head of a tied model is its embedding. None without either."""
    known = resolve(name, weights)
    if known is not None:
        return weights[known]
    model = ends(weights)
    return weights[model.embedding].named(model.head) if model and resolve(name, [model.head]) else None
