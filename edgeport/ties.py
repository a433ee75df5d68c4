"""Embedding and head: which weights of a model they are, and whether its head is its embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.tensor import EMBEDDING, HEAD

INNER_HEAD = f"language_model.{HEAD}"
HEADS = {
    EMBEDDING: HEAD,
    "model.language_model.embed_tokens.weight": HEAD,
    "language_model.model.embed_tokens.weight": INNER_HEAD,
    # with the prefix of transformers' class, and as published without: GPT-2 and its kin; BLOOM and Falcon; OPT
    **{f"{prefix}{name}.weight": HEAD for prefix in ("transformer.", "") for name in ("wte", "word_embeddings")},
    **{f"{prefix}decoder.embed_tokens.weight": HEAD for prefix in ("model.", "")},
}
"""An embedding as it is stored, and the name under which transformers loads a head of its own beside it."""
ENCODER = re.compile(r"(?:model\.)?encoder\.")
INPUTS = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings|shared|embed_in)\.weight")
"""Embeddings of tokens, under whatever names else."""
HEADLESS = re.compile(r"For(?:Sequence|Token)Classification|ForQuestionAnswering")
HEADED = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|ForPreTraining")
"""Classes of transformers, by what they have on top."""
TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "lfm2", "mpt", "opt", "recurrent_gemma", "smollm3", "starcoder2",
}  # fmt: skip
"""Types whose head is the embedding where config.json does not say: transformers 4 leaves out what is the default."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The two weights that a model may tie, under the names that it has, or would have, for them."""

    embedding: str
    head: str


def ends(names: Collection[str]) -> Ends | None:
    """Of a decoder with these weights; None where it is not known how it would store a head."""
    embedding = next((name for name in HEADS if name in names), None)
    if embedding is None or ("decoder." in embedding and any(map(ENCODER.match, names))):
        return None
    return Ends(embedding, next((head for head in (HEAD, INNER_HEAD) if head in names), HEADS[embedding]))


def is_end(name: str) -> bool:
    """Whether a weight of that name has a row for each token of the vocabulary."""
    return name in HEADS or name in HEADS.values()


def names_end(module: str) -> bool:
    """The same of a module, which the last parts of its name may stand for."""
    return any(f".{end}".endswith(f".{module}.weight") for end in (*HEADS, *HEADS.values()))


def is_tied(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a model with these weights and that config.json has its embedding as its head."""
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    if found := ends(names):
        told = config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT)
        return not HEADLESS.search(architecture) and (found.head not in names or bool(told))
    own = any(name in names for name in (HEAD, "embed_out.weight"))
    return HEADED.search(architecture) is not None and bool(config.get("tie_word_embeddings", not own))
