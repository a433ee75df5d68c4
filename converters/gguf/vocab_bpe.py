"""A byte-level BPE tokenizer.json as llama.cpp's "gpt2" vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.gguf.keyvalues import KV, kv
from converters.gguf.pretokenizers import recognise
from edgeport.errors import ConvertError, UnsupportedArchitecture

# NFC is Qwen's. llama.cpp does not normalise, so text that is not NFC already (a letter and its accent apart) may
# come out in other tokens than transformers gives; every tool that writes a Qwen GGUF shares this.
NORMALIZERS = (None, "NFC")


def flags(tokenizer: Mapping[str, Any]) -> dict[str, KV]:
    """`tokenizer.ggml.*` but for the tokens themselves. Raises UnsupportedArchitecture, ConvertError."""
    model = tokenizer["model"]
    normalizer = tokenizer.get("normalizer")
    if (normalizer and normalizer["type"]) not in NORMALIZERS:
        raise UnsupportedArchitecture(f"llama.cpp cannot normalise text as tokenizer.json asks: {normalizer}")
    if not model.get("merges"):
        raise ConvertError("tokenizer.json has no merges, without which llama.cpp cannot put its tokens together")
    odd = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)}
    if odd:
        raise UnsupportedArchitecture(f"llama.cpp's BPE does not know these settings of tokenizer.json: {odd}")
    return {
        "tokenizer.ggml.model": kv("STRING", "gpt2"),
        "tokenizer.ggml.pre": kv("STRING", recognise(tokenizer.get("pre_tokenizer"), bool(model.get("ignore_merges")))),
        "tokenizer.ggml.merges": kv("ARRAY", [_line(pair) for pair in model["merges"]]),
        "tokenizer.ggml.add_space_prefix": kv("BOOL", False),
    }


def _line(pair: str | list[str]) -> str:
    """One merge as llama.cpp reads it: a space between the two, so a space within is spelled as its byte-level letter."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)
