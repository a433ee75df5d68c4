"""What ONNX outputs are held against: transformers' logits, also with the numbers that a file stores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from bench.onnx_models import random_model
from edgeport.runtime import Runner

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, biases": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 32},
    "smollm": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96, "head_dim": 32,
               "tie_word_embeddings": True, "rope_theta": 1e5},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window, yarn": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                            "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip
LENGTH, FIRST, SECOND = 34, 9, 5
"""A text, its two chunks, and twenty tokens one by one."""

Families = Callable[[str], tuple[Path, Any]]
"""The fixture `families`."""


def build(name: str) -> Any:
    """A random model of a family."""
    return random_model({**SMALL, **FAMILIES[name]})


def tokens(batch: int = 1) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 320, (batch, LENGTH))


def expected(model: Any, weights: dict[str, torch.Tensor] | None = None, batch: int = 1) -> NDArray[np.float32]:
    """transformers' logits, with other weights in place of the model's own."""
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights or {}, torch.from_numpy(tokens(batch))).logits
    return np.asarray(logits.numpy())


def found(output: Path, batch: int = 1, provider: str = "cpu") -> NDArray[np.float32]:
    """Ours, in two chunks and token by token."""
    runner, text = Runner(output, provider=provider, threads=1), tokens(batch)
    edges = [0, FIRST, *range(FIRST + SECOND, LENGTH + 1)]
    return np.concatenate([runner.step(text[:, start:stop]) for start, stop in pairwise(edges)], axis=1)


def error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def stored_weights(output: Path, model: Any, bits: int, head_bits: int | None = None) -> dict[str, torch.Tensor]:
    """What the file holds, under transformers' names: by onnx's own reader, and unpacked in plain numpy."""
    stored = onnx.load(output / "model.onnx")
    portable = not any(node.domain for node in stored.graph.node)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}
    weights: dict[str, torch.Tensor] = {}
    head = "lm_head" if any("lm_head" in name for name in arrays) else "embed_tokens"  # of a tied model one table is both
    for name, values in arrays.items():
        name = name.removesuffix(".rows")
        if name.endswith((".scales", ".zero_points")) or name.startswith("constant") or name in weights:
            continue
        wide = (head_bits or bits) if head in name else bits
        if f"{name}.scales" in arrays:
            values = unpacked(values, arrays[f"{name}.scales"], arrays.get(f"{name}.zero_points"), wide, portable)
        prefix, joined, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        begin = 0
        for module in joined.split("+"):
            full = f"{prefix}.{module}.{kind}".removeprefix(".")
            rows = model.get_parameter(full).shape[0]
            shift = model.config.model_type == "gemma2" and module.endswith("norm")
            weights[full] = torch.from_numpy(values[begin : begin + rows].astype(np.float32)) - float(shift)
            begin += rows
        assert begin == len(values)
    return weights


def unpacked(codes: Any, scales: NDArray[np.float32], zeros: Any, bits: int, signed: bool) -> NDArray[np.float32]:
    """(code - zero) * scale, [rows, columns]."""
    if codes.dtype == np.uint8:
        codes = halves(codes) if bits == 4 else codes.reshape(len(codes), -1)
        codes = codes ^ (1 << (bits - 1)) if signed else codes
        middle = 1 << (bits - 1)
    else:
        middle = 0  # onnx's reader has signed numbers
    columns = codes.shape[1] // scales.shape[1]
    if zeros is not None:
        zeros = halves(zeros) if bits == 4 else zeros
        middle = zeros[:, : scales.shape[1]].astype(np.float32).repeat(columns, axis=1)
    return np.asarray((codes.astype(np.float32) - middle) * scales.repeat(columns, axis=1))


def halves(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
