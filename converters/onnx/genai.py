"""`genai_config.json`: what onnxruntime-genai needs to generate with the graph.

Source: onnxruntime-genai `builders/base.py: make_genai_config`, https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.onnx.decoder import IDS, LOGITS, MASK, PAST, PRESENT
from converters.onnx.families import Decoder
from converters.onnx.precisions import Settings

SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def config(
    model: Mapping[str, Any], generation: Mapping[str, Any], decoder: Decoder, settings: Settings, file: str
) -> dict[str, Any]:
    """`model`: config.json; `generation`: generation_config.json, which goes first where both name a token."""
    tokens = {
        f"{name}_token_id": value
        for name in ("bos", "eos", "pad")
        if (value := generation.get(f"{name}_token_id", model.get(f"{name}_token_id"))) is not None
    }
    states = ("key", "value")
    ends = tokens.get("eos_token_id", 0)
    tokens.setdefault("pad_token_id", ends[0] if isinstance(ends, list) else ends)
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
