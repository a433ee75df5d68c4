"""`genai_config.json`: what onnxruntime-genai needs to generate with the graph.

Source: onnxruntime-genai `builders/base.py: make_genai_config`, https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.onnx.decoder import IDS, LOGITS, MASK, PAST, PRESENT
from converters.onnx.families import Decoder
from converters.onnx.precisions import Settings
from edgeport.errors import CorruptCheckpoint

SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def tokens(model: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the special tokens; several may end a text.

    `model`: config.json; `generation`: generation_config.json, which goes first where both name a token.
    Raises CorruptCheckpoint for what is no number.
    """
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for name, told in (("generation_config.json", generation), ("config.json", model)):
            if key in found or (value := told.get(key)) is None:
                continue
            listed = value if key == "eos_token_id" and isinstance(value, list) else [value]
            if not listed or not all(type(token) is int for token in listed):
                raise CorruptCheckpoint(f"{name} says {key} {value!r}, where the number of a token was expected")
            found[key] = value
    ends = found.get("eos_token_id", 0)
    found.setdefault("pad_token_id", ends[0] if isinstance(ends, list) else ends)
    return found


def config(
    model: Mapping[str, Any], tokens: Mapping[str, Any], decoder: Decoder, settings: Settings, file: str
) -> dict[str, Any]:
    """`model`: config.json."""
    states = ("key", "value")
    return {
        "model": {
            **tokens,
            "context_length": decoder.positions,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers(settings)},
                "filename": file,
                "head_size": decoder.head_dim,
                "hidden_size": decoder.hidden,
                "inputs": {"input_ids": IDS, "attention_mask": MASK}
                | {f"past_{which}_names": PAST.format("%d", which) for which in states},
                "outputs": {"logits": LOGITS} | {f"present_{which}_names": PRESENT.format("%d", which) for which in states},
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "type": model.get("model_type", "llama"),
            "vocab_size": decoder.vocabulary,
        },
        # plain operators make a new cache each step, where fused attention can write into one
        "search": SEARCH | {"max_length": decoder.positions, "past_present_share_buffer": not settings.portable},
    }


def providers(settings: Settings) -> list[dict[str, Any]]:
    return [{"cuda": {}}] if settings.provider == "cuda" else []
