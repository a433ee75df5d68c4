"""Dense differences: W + s (W_tuned - W_old), one float32 tensor a changed weight, as `edgeport extract --full` writes them.

The change of a whole fine-tune in task arithmetic's terms (arXiv 2212.04089). A folder holds `difference.safetensors`,
under the weights' own names, and `edgeport.json`, which says what base it was made on, whether that had embedding and head
tied, and how many rows a vocabulary had that the fine-tune has grown: the rows beyond those are whole values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeport.checkpoint import Stored, open_checkpoint, read_json
from edgeport.errors import CorruptCheckpoint, ShapeMismatch, TargetMissing, UnsupportedPatch
from edgeport.hub import called
from edgeport.patches.edits import Difference
from edgeport.patches.lora import RECORD, TOKENIZER_FILES
from edgeport.patches.names import find
from edgeport.seams import Edit, Source
from edgeport.tensor import TensorSpec, Weight
from edgeport.ties import HEADS

FILE = "difference.safetensors"
KIND = "dense"


@dataclass(frozen=True)
class DensePatch:
    path: Path
    stored: Mapping[str, Stored]
    scale: float
    record: Mapping[str, Any]
    kind: str = KIND

    @property
    def files(self) -> Sequence[Path]:
        return [path for path in (self.path / FILE, self.path / RECORD) if path.is_file()]

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.stored

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"changed": len(self.stored), "base_fingerprint": self.record.get("base_fingerprint"), "grown": self.grown}

    @property
    def grown(self) -> Mapping[str, int]:
        """Rows of the old base's vocabulary, by the weight that has more of them now."""
        found = self.record.get("grown") or {}
        if not isinstance(found, dict) or not all(type(rows) is int for rows in found.values()):
            raise CorruptCheckpoint(f"{RECORD} in {called(self.path)} has a table of grown weights that holds no numbers of rows")
        return found

    def edits(self, new: Source, old: Source | None) -> Sequence[Edit]:
        return [self.edit(stored, new) for stored in self.stored.values()]

    def edit(self, stored: Stored, new: Source) -> Difference:
        weight = self.find(stored.name, new)
        grown = self.grown.get(stored.name)
        before = stored.shape if grown is None else (grown, *stored.shape[1:])
        if weight.shape != before:
            raise ShapeMismatch(f"the patch is for {weight.name} of shape {list(before)}, and the base has {list(weight.shape)}")
        tied = bool(self.record.get("tied", not any(head in self.stored for head in HEADS.values())))
        return Difference(weight.name, stored.shape, stored, weight.rows, self.scale, tied)

    def find(self, name: str, new: Source) -> Weight:
        if weight := find(name, new.weights):
            return weight
        raise TargetMissing(f"the patch changes {name}, which {called(new.path)} does not have; is it of the same architecture?")

    def assets(self) -> Mapping[str, Path]:
        return {name: self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()}


class DenseKind:
    name = KIND

    def detect(self, path: Path) -> bool:
        return (path / FILE).is_file()

    def open(self, path: Path, scale: float) -> DensePatch:
        stored = open_checkpoint(path / FILE)
        if not stored:
            raise CorruptCheckpoint(f"{FILE} in {called(path)} holds no tensors")
        for name, place in stored.items():
            if place.dtype not in ("F64", "F32", "F16", "BF16"):
                raise UnsupportedPatch(f"the patch tensor {name} is of type {place.dtype}, and not of floating point")
        record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
        return DensePatch(path, stored, scale, record)


patch_kind = DenseKind()
