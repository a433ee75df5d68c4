"""GGUF LoRA as a patch: W + s B A, with s = alpha / rank, under llama.cpp's names and in its order of rows.

What stands in such a file is the GGUF converter's to know; it is asked through the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeport.errors import CorruptCheckpoint, ShapeMismatch, TargetMissing
from edgeport.hub import called
from edgeport.patches.edits import LowRank
from edgeport.patches.names import find
from edgeport.registry import converters
from edgeport.seams import AdapterReader, Edit, LowRankPair, OpenedAdapter, Source
from edgeport.tensor import TensorSpec


@dataclass(frozen=True)
class GgufLora:
    path: Path
    opened: OpenedAdapter
    scale: float
    kind: str = field(default="gguf-lora", init=False)

    @property
    def files(self) -> Sequence[Path]:
        return [self.path]

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.opened.tensors

    @property
    def facts(self) -> Mapping[str, Any]:
        ranks = sorted({spec.shape[0] for name, spec in self.tensors.items() if name.endswith("a") and spec.shape})
        alpha = self.opened.alpha
        modules = sorted({name.rsplit(".", 2)[0].rsplit(".", 1)[-1] for name in self.tensors})
        scalings = [alpha / rank if alpha else 1.0 for rank in ranks if rank]
        return {"rank": ranks, "alpha": alpha, "scaling": scalings, "target_modules": modules, "architecture": self.opened.arch}

    def edits(self, new: Source, old: Source | None) -> Sequence[Edit]:
        return [self.edit(pair, new) for pair in self.opened.pairs(new.config)]

    def edit(self, pair: LowRankPair, new: Source) -> LowRank:
        if (weight := find(pair.target, new.weights)) is None:
            raise TargetMissing(
                f"the patch changes {pair.target}, which {called(new.path)} does not have; is it a model of {self.opened.arch}?"
            )
        down, up = pair.down.shape, pair.up.shape
        if len(down) != 2 or len(up) != 2 or 0 in down:
            raise CorruptCheckpoint(f"the factors of {pair.target} have the shapes {list(down)} and {list(up)}, of no matrices")
        if down[0] != up[1]:
            raise CorruptCheckpoint(f"the factors of {pair.target} are of rank {down[0]} and {up[1]}: they have no product")
        if (up[0], down[1]) != weight.shape:
            raise ShapeMismatch(
                f"the patch was made for {pair.target} of shape {[up[0], down[1]]}; the base has {list(weight.shape)}"
            )
        return LowRank(
            weight.name, weight.shape, pair.down, pair.up, pair.scaling * self.scale, False, False, arrangement=pair.arrangement
        )

    def assets(self) -> Mapping[str, Path]:
        return {}


def readers() -> Sequence[AdapterReader]:
    return [one for one in converters().values() if isinstance(one, AdapterReader)]


class GgufLoraKind:
    name = "gguf-lora"

    def detect(self, path: Path) -> bool:
        return any(reader.is_adapter(path) for reader in readers())

    def open(self, path: Path, scale: float) -> GgufLora:
        reader = next(reader for reader in readers() if reader.is_adapter(path))
        return GgufLora(path, reader.open_adapter(path), scale)


patch_kind = GgufLoraKind()
