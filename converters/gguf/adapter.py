"""GGUF LoRA: a low-rank patch as llama.cpp's --lora takes it.

    NAME.lora_a  [rank, columns]    NAME.lora_b  [rows, rank], its rows arranged as those of the tensor NAME
    change = adapter.lora.alpha / rank * lora_b @ lora_a, without alpha lora_b @ lora_a

Source: llama.cpp src/llama-adapter.cpp, convert_lora_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.gguf import families
from converters.gguf.header import MAGIC, Header, StoredTensor, read_header, serialize
from converters.gguf.values import ValueType
from edgeport.checkpoint import Stored
from edgeport.codecs.plain import TYPES
from edgeport.errors import ConvertError, CorruptCheckpoint, TargetMissing, UnmappedTensor, UnsupportedPatch
from edgeport.registry import codec
from edgeport.seams import Factors, FileLayout, LowRankPair
from edgeport.tensor import EMBEDDING, Arrangement, Weight

KIND = "adapter"
INVOCATION = "adapter.alora.invocation_tokens"
DOWN, UP = ".lora_a", ".lora_b"
STEM = ".lora.gguf"


def factors(weight: Weight, name: str, arrangement: Arrangement, rank: int) -> Factors:
    """Of the weight that a GGUF calls `name`. Raises ConvertError for the embedding, whose factors llama.cpp looks up."""
    if weight.name == EMBEDDING:
        raise ConvertError("a low-rank change of the embedding cannot stand in a GGUF adapter; leave off --sidecar to merge it")
    down = stored(name + DOWN, (rank, weight.columns))
    return Factors(weight.name, down, replace(stored(name + UP, (weight.rows, rank)), arrangement=arrangement))


def stored(name: str, shape: tuple[int, ...]) -> Weight:
    return codec("plain").layout(name, shape, "F32")


def layout(name: str, arch: str, parts: Sequence[Factors], alpha: int) -> FileLayout:
    """The file of that name for a model of that architecture."""
    metadata = {
        "general.architecture": (ValueType.STRING, arch),
        "general.type": (ValueType.STRING, KIND),
        "adapter.type": (ValueType.STRING, "lora"),
        "adapter.lora.alpha": (ValueType.FLOAT32, float(alpha)),
    }
    specs = [weight.parts["data"].spec for one in parts for weight in (one.down, one.up)]
    head, offsets, size = serialize(metadata, [(spec.name, spec.shape, spec.dtype, spec.nbytes) for spec in specs])
    return FileLayout(name, size, ((0, head),), offsets)


def is_adapter(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            return False
    return says_adapter(read_header(path))


def says_adapter(head: Header) -> bool:
    return bool(head.value("general.type") == KIND)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter file, opened by its header."""

    path: Path
    arch: str
    alpha: float
    tensors: Mapping[str, Stored]

    def pairs(self, config: Mapping[str, Any]) -> Sequence[LowRankPair]:
        """The pairs under the names of the model with that config.json. Raises CorruptCheckpoint, UnsupportedPatch."""
        family = families.family_of(self.arch)
        if odd := [name for name in self.tensors if not name.endswith((DOWN, UP))]:
            raise UnsupportedPatch(
                f"{self.path.name} holds {odd[0]}, which is no low-rank factor ({DOWN} or {UP}): llama.cpp passes it over, and "
                "edgeport merges whole weights from a PEFT folder alone"
            )
        modules = dict.fromkeys(name.removesuffix(DOWN).removesuffix(UP) for name in self.tensors)
        return [self.pair(name, family, config) for name in modules]

    def pair(self, module: str, family: families.Family, config: Mapping[str, Any]) -> LowRankPair:
        down, up = (self.tensors.get(module + side) for side in (DOWN, UP))
        if down is None or up is None:
            raise CorruptCheckpoint(f"{self.path.name} has only one of the two factors of {module} ({DOWN} and {UP})")
        name = family.hf_name(module)
        if name == EMBEDDING:
            raise UnsupportedPatch(f"{self.path.name} changes the embedding, which edgeport merges from a PEFT folder alone")
        rank = down.shape[0]
        scaling = self.alpha / rank if self.alpha and rank else 1.0
        try:
            _, arrangement = family.tensor(name, config)
        except UnmappedTensor as error:
            raise TargetMissing(f"the patch changes {name}, which the base does not have") from error
        return LowRankPair(name, down, up, scaling, arrangement)


def open_adapter(path: Path) -> StoredAdapter:
    """Raises UnsupportedPatch for what is no LoRA in floating point, or works on a part of the text alone."""
    head = read_header(path)
    kind = head.value("adapter.type")
    if not says_adapter(head) or kind != "lora":
        raise UnsupportedPatch(f"{path.name} is an adapter of type {kind!r}, and edgeport reads 'lora'")
    if INVOCATION in head.kv:
        raise UnsupportedPatch(
            f"{path.name} takes effect only behind certain tokens (aLoRA), which no merged model can do; load it beside the model"
        )
    alpha = head.value("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)):
        raise CorruptCheckpoint(f"{path.name} has the adapter.lora.alpha {alpha!r} where a number was expected")
    tensors = {name: found(path, tensor) for name, tensor in head.tensors.items()}
    return StoredAdapter(path, str(head.value("general.architecture")), float(alpha), tensors)


def found(path: Path, tensor: StoredTensor) -> Stored:
    if TYPES.get(tensor.dtype, (0, "", ""))[2] != "rw":
        raise UnsupportedPatch(f"the patch tensor {tensor.name} is stored as {tensor.dtype}, where F32, F16 or BF16 was expected")
    return Stored(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, path, tensor.offset)
