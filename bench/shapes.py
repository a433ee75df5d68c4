"""Models of any size with random weights, written without ever being in memory, and patches that fit them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgeport.checkpoint import safetensors_bytes
from edgeport.tensor import TensorSpec

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama, or of a model that differs from one by its name, head size and norms."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int = 0
    """0: hidden / heads."""
    tied: bool = True
    family: str = "Llama"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [f"{self.family}ForCausalLM"], "model_type": self.family.lower(), "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers, "head_dim": self.head_dim,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": self.tied, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    def matrix(self, module: str) -> tuple[int, int]:
        """[out, in] of one of the seven projections."""
        wide, narrow = self.head_dim * self.heads, self.head_dim * self.kv_heads
        return {
            "q_proj": (wide, self.hidden), "o_proj": (self.hidden, wide),
            "k_proj": (narrow, self.hidden), "v_proj": (narrow, self.hidden),
            "gate_proj": (self.feed_forward, self.hidden), "up_proj": (self.feed_forward, self.hidden),
            "down_proj": (self.hidden, self.feed_forward),
        }[module.rsplit(".", 1)[-1]]  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for module in LINEAR:
                yield f"model.layers.{layer}.{module}.weight", self.matrix(module)
            for norm in self.norms:
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES = {
    "135M": Shape(576, 30, 1536, 49152, 9, 3),
    "1B": Shape(2048, 16, 8192, 49152, 32, 8),
    "1B, embedding 128256 x 4096": Shape(4096, 4, 8192, 128256, 32, 8),
}


def write_model(shape: Shape, folder: Path, tokenizer: Path | None = None) -> Path:
    """A bf16 folder of random weights, with another model's tokenizer files where they are given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    for path in tokenizer.iterdir() if tokenizer else ():
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    write_tensors(folder / "model.safetensors", dict(shape.tensors()), 0.02)
    return folder


def write_patch(shape: Shape, folder: Path, rank: int = 16) -> Path:
    """A PEFT LoRA on all seven projections of every layer, of about 1 % of the weights' norm."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [m.rsplit(".", 1)[-1] for m in LINEAR],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(shape.layers):
        for module in LINEAR:
            rows, columns = shape.matrix(module)
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = (rank, columns)
            tensors[f"{prefix}.lora_B.weight"] = (rows, rank)
    write_tensors(folder / "adapter_model.safetensors", tensors, 0.0071)
    return folder


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], std: float) -> None:
    """Random bf16 tensors, a piece at a time. The same piece of noise serves everywhere: only its size matters here."""
    specs = {name: TensorSpec(name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in shapes.items()}
    header, _ = safetensors_bytes(specs, {"format": "pt"})
    noise = (np.random.default_rng(0).standard_normal(PIECE, dtype=np.float32) * std).view(np.uint32) >> 16
    piece = noise.astype(np.uint16).tobytes()
    with open(path, "wb") as file:
        file.write(header)
        for spec in specs.values():
            for start in range(0, spec.nbytes, len(piece)):
                file.write(piece[: min(len(piece), spec.nbytes - start)])


def describe(shape: Shape) -> str:
    return ", ".join(f"{key} {value}" for key, value in asdict(shape).items())
