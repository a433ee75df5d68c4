"""A GGUF, or a split set, as a place for weights: which type each is stored in, and where in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf import adapter, families, header
from converters.gguf.header import serialize
from converters.gguf.source import stored_weight
from converters.gguf.values import Field, ValueType
from edgeport.errors import ConvertError, about
from edgeport.registry import codec_of
from edgeport.seams import Factors, FileLayout, Source, Target
from edgeport.tensor import Part, TensorSpec, Weight, is_buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

FINER = ("Q6_K", "Q8_0", "F16")
"""The types that a promotion gives, as llama-quantize's own mixes do for the tensors that suffer most."""

Entry = tuple[str, tuple[int, ...], str, int]
"""A tensor's name, shape, type and bytes."""


@dataclass(frozen=True)
class GGUFSink:
    """Writes a GGUF, or a split set."""

    source: Source
    target: Target
    family: families.Family
    metadata: Mapping[str, Field | tuple[int, Any]]
    types: Mapping[str, str]
    """ggml type by GGUF tensor name."""
    constants: Mapping[str, tuple[tuple[int, ...], bytes]]
    """float32 tensors that no weight of the model is."""
    matrix: Mapping[str, NDArray[np.float32]] | None
    """The importance matrix, [columns] by weight name."""
    folder: bool = False

    @property
    def notes(self) -> Sequence[str]:
        if "MistralForCausalLM" not in self.family.classes:
            return ()
        window = self.target.config.get("sliding_window", 4096)  # transformers' default; null is none
        if not isinstance(window, int) or window >= self.family.full(self.target.config)["max_position_embeddings"]:
            return ()
        return (f"llama.cpp has no sliding window for {self.family.arch}: it attends to more than the last {window} tokens too",)

    @cached_property
    def importance(self) -> Mapping[str, Tensor] | None:
        if self.matrix is None:
            return None
        import torch

        return {name: torch.from_numpy(values) for name, values in self.matrix.items()}

    def takes(self, name: str) -> bool:
        return not is_buffer(name)

    def place(self, weight: Weight) -> Weight:
        with about(weight.name):
            name, arrangement = self.family.tensor(weight.name, self.target.config)
            format = self.types[name]
            if format == weight.format and name == weight.parts["data"].spec.name:
                # also for types that can only be read: such a weight is copied
                spec = sized(weight.parts["data"], weight)
                return replace(stored_weight(weight.name, spec, arrangement), shape=weight.shape)
            placed = codec_of(format).layout(weight.name, weight.shape, format)
            part = placed.parts["data"]
            return replace(placed, parts={"data": replace(part, spec=replace(part.spec, name=name))}, arrangement=arrangement)

    def finer(self, weight: Weight) -> Sequence[Weight]:
        name = weight.parts["data"].spec.name
        now, columns = header.TYPES[weight.format], weight.columns
        better = [type for type in FINER if (block := header.TYPES[type]).nbytes * now.size > now.nbytes * block.size]
        fitting = [type for type in better if columns % header.TYPES[type].size == 0]
        return [replace(self, types={**self.types, name: type}).place(weight) for type in fitting]

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        entries = [(w.parts["data"].spec.name, w.shape, w.format, w.nbytes) for w in weights]
        entries = [(name, shape, "F32", len(data)) for name, (shape, data) in self.constants.items()] + entries
        groups = [entries]
        if limit := self.target.max_shard_bytes:
            heads = [len(serialize(self.keys(number, 2, len(entries)), [])[0]) for number in range(2)]
            groups = cut(entries, limit, heads)
        layouts = []
        for number, group in enumerate(groups):
            head, offsets, size = serialize(self.keys(number, len(groups), len(entries)), group)
            blobs = ((0, head), *((offsets[name], data) for name, (_, data) in self.constants.items() if name in offsets))
            ranges = {name: offset for name, offset in offsets.items() if name not in self.constants}
            layouts.append(FileLayout(self.name(number, len(groups)), size, blobs, ranges))
        return layouts

    def keys(self, number: int, files: int, tensors: int) -> dict[str, Field | tuple[int, Any]]:
        """The metadata of one of so many files, which hold so many tensors together."""
        keys = dict(self.metadata) if number == 0 else {}
        if files > 1:
            keys["split.no"] = (ValueType.UINT16, number)
            keys["split.count"] = (ValueType.UINT16, files)
            keys["split.tensors.count"] = (ValueType.INT32, tensors)
        return keys

    def factors(self, weight: Weight, rank: int) -> Factors:
        name, arrangement = self.family.tensor(weight.name, self.target.config)
        if name not in self.types:
            raise ConvertError("a GGUF adapter cannot change a head tied to the embedding; leave off --sidecar to merge it")
        return adapter.factors(weight, name, arrangement, rank)

    def adapter(self, factors: Sequence[Factors], alpha: int) -> tuple[str, Sequence[FileLayout]]:
        name = self.target.output.name.removesuffix(".gguf") + adapter.STEM
        return name, [adapter.layout(name, self.family.arch, factors, alpha)]

    def name(self, number: int, count: int) -> str:
        output = self.target.output
        return output.name if count == 1 else f"{output.name.removesuffix('.gguf')}-{number + 1:05}-of-{count:05}.gguf"

    def finish(self, staging: Path) -> None:
        """A GGUF has everything inside."""


def cut(entries: Sequence[Entry], limit: int, heads: Sequence[int]) -> list[list[Entry]]:
    """Tensors in order, a new file where the next would exceed `limit` bytes, of which metadata takes `heads`.

    `heads`: of the first file, and of each later one. A tensor that is larger has a file of its own.
    """
    groups: list[list[Entry]] = [[]]
    filled = heads[0]
    for entry in entries:
        size = serialize({}, [entry])[2]  # with what the head says of it
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = heads[1]
        groups[-1].append(entry)
        filled += size
    return groups


def sized(part: Part, weight: Weight) -> TensorSpec:
    """The part's spec for a weight that may have grown rows."""
    return TensorSpec(part.spec.name, part.spec.dtype, weight.shape, part.stride * weight.rows)
