"""What `--quant` and its companions can ask of an ONNX output, and how far its logits may then be from the model's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from edgeport.codecs.nbits import BLOCK_SIZES, Blocks
from edgeport.codecs.plain import TYPES
from edgeport.errors import ConvertError, UnknownName
from edgeport.registry import miss
from edgeport.seams import Source, Target
from edgeport.tensor import is_buffer


@dataclass(frozen=True, slots=True)
class Precision:
    name: str
    tolerance: float
    """Mean KL to the model, in nats, above which `verify --against` fails."""
    format: str = ""
    """The plain type of the matrices."""
    bits: int = 0
    """Of block-quantized matrices."""


# bench/results/onnx-logits.txt has what was measured
PRECISIONS = {
    each.name: each
    for each in (
        Precision("fp32", 1e-6, "F32"),
        Precision("fp16", 1e-4, "F16"),
        Precision("bf16", 1e-3, "BF16"),
        Precision("int8", 0.03, bits=8),
        Precision("int4", 0.75, bits=4),
    )
}
SYNONYMS = {"f32": "fp32", "f16": "fp16"}
AS_STORED = {"F64": "fp32", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""The default: the widest type that the source has; a quantized source becomes int8."""
PROVIDERS = {"cpu": "F32", "cuda": "F16"}
"""Execution provider to the type of activations: onnxruntime's fused attention has no float32 on CUDA, and most of its
CPU operators have nothing but float32."""
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """All that decides how a given model is written, by names that its metadata keeps."""

    precision: str
    head: str
    embedding: str
    block_size: int
    symmetric: bool
    portable: bool
    provider: str
    kind: str
    """The type of activations, norms and biases."""

    def of(self, role: str, tied: bool) -> Precision:
        """The precision of a "linear", "head" or "embedding" weight."""
        name = {"linear": self.precision, "head": self.head, "embedding": self.head if tied else self.embedding}[role]
        return PRECISIONS[name]

    def blocks(self, precision: Precision) -> Blocks:
        return Blocks(precision.bits, self.symmetric, self.block_size, self.kind, signed=self.portable)

    def to_json(self, positions: int) -> str:
        """What the model's metadata says; a runner wants to know how long a text may be."""
        return json.dumps(asdict(self) | {"positions": positions})


def precision(name: str) -> str:
    """Raises UnknownName."""
    known = SYNONYMS.get(name.lower(), name.lower())
    if known not in PRECISIONS:
        raise UnknownName(miss([*PRECISIONS], name, "--quant of an ONNX output"))
    return known


def settings(target: Target, source: Source) -> Settings:
    """Raises UnknownName, ConvertError for options that do not go together."""
    formats = {weight.format for name, weight in source.weights.items() if not is_buffer(name)}
    widest = next((name for format, name in AS_STORED.items() if format in formats), "int8")
    main = precision(target.quant or (widest if formats <= set(TYPES) else "int8"))
    head = precision(target.output_tensor_type or main)
    embedding = precision(target.token_embedding_type or main)
    provider = target.execution_provider or "cpu"
    if provider not in PROVIDERS:
        raise UnknownName(miss([*PROVIDERS], provider, "execution provider"))
    if target.block_size is not None and target.block_size not in BLOCK_SIZES:
        raise UnknownName(f"--block-size {target.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    quantized = any(PRECISIONS[name].bits for name in (main, head, embedding))
    if not quantized and (target.block_size or target.asymmetric):
        raise ConvertError(f"--block-size and --asymmetric are for int4 and int8, and the output is to be {main}")
    if target.portable and (target.asymmetric or provider != "cpu"):
        raise ConvertError("--portable has symmetric blocks and float32 activations alone; leave out --asymmetric and cuda")
    if provider == "cuda" and main == "fp32":
        raise ConvertError("onnxruntime's fused attention computes in fp16 and bf16 on CUDA, not in fp32; give --quant fp16")
    kind = "BF16" if provider == "cuda" and main == "bf16" else PROVIDERS[provider]
    size = target.block_size or BLOCK_SIZE
    return Settings(main, head, embedding, size, not target.asymmetric, target.portable, provider, kind)


def one_table(chosen: Settings) -> str:
    """What is wrong with two types for a head that is the embedding."""
    return (
        f"the head of this model is its embedding, and both are to be {chosen.head}; leave off --token-embedding-type, "
        f"or give --output-tensor-type {chosen.embedding} for both"
    )


def read_settings(text: str) -> Settings:
    """Settings as `to_json` wrote them. Raises TypeError, ValueError."""
    told: dict[str, Any] = json.loads(text)
    return Settings(**{name: value for name, value in told.items() if name in {each.name for each in fields(Settings)}})
