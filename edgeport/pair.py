"""Two models of one architecture side by side: which weight is which, and their numbers a block of rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.blocks import decode_rows, finite, known, padded, ranges
from edgeport.errors import MissingTensor, NonFiniteResult, ShapeMismatch, TargetMissing, about
from edgeport.hub import called
from edgeport.patches.names import find
from edgeport.registry import codec
from edgeport.seams import Source
from edgeport.steps import common_granule
from edgeport.tensor import Weight, is_buffer
from edgeport.ties import HEADS, is_end

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Both:
    """One weight as two models have it, under the old one's name. `new` may have more rows: a grown vocabulary."""

    name: str
    old: Weight
    new: Weight

    @property
    def granule(self) -> int:
        """Rows that neither side's format or arrangement lets apart."""
        return common_granule(self.old, self.new)

    @property
    def grown(self) -> bool:
        return self.old.shape != self.new.shape

    @property
    def nbytes(self) -> int:
        return self.old.nbytes + self.new.nbytes


def matched(old: Source, new: Source) -> list[Both]:
    """Every weight of either model beside the other's, in the old one's order; a tied head is the embedding. A table that only
    one of them stores is left out.

    Raises TargetMissing, MissingTensor, ShapeMismatch where they are not of one architecture and size.
    """
    found: dict[str, Both] = {}
    before_all, after_all = ({name: one for name, one in source.weights.items() if not is_buffer(name)} for source in (old, new))
    for name, weight in after_all.items():
        before = find(name, before_all)
        if before is None and is_table(weight):
            continue
        if before is None:
            raise TargetMissing(unlike(new, name, old))
        found[before.name] = paired(before.name, before, weight)
    for name, weight in before_all.items():
        if name in HEADS.values() and name not in found and (embedding := find(name, after_all)):
            found[name] = paired(name, weight, embedding)
        elif name not in found and not is_table(weight):
            raise MissingTensor(unlike(old, name, new))
    return [found[name] for name in dict.fromkeys([*before_all, *found]) if name in found]


def is_table(weight: Weight) -> bool:
    """Whether these are no numbers that a training changes: positions, as BERT's checkpoints had them before transformers 4.31,
    or GPT-2's causal mask and the number that stands for its zeros."""
    mask = re.fullmatch(r"(?:.*\.)?attn\.(?:masked_)?bias", weight.name) and len(weight.shape) in (0, 4)
    return bool(mask) or not codec(weight.codec).formats[weight.format]


def unlike(one: Source, name: str, other: Source) -> str:
    return f"{called(one.path)} has {name}, which {called(other.path)} does not; they are not of one architecture"


def paired(name: str, old: Weight, new: Weight) -> Both:
    grown = is_end(name) and old.shape[1:] == new.shape[1:] and old.shape[0] < new.shape[0]
    if old.shape != new.shape and not grown:
        with about(name):
            raise ShapeMismatch(
                f"it has shape {list(old.shape)} in one model and {list(new.shape)} in the other; "
                "both must be of the same architecture and size"
            )
    return Both(name, old, new)


def blocks(both: Both, old: Source, new: Source, rows: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Rows, and float32 old and new values of them, at most `rows` at a time; zeros where only the new one has rows.

    Raises NonFiniteResult.
    """
    for block in ranges(both.new, rows, both.granule):
        yield block, *block_of(both, old, new, block)


def block_of(both: Both, old: Source, new: Source, rows: range) -> tuple[Tensor, Tensor]:
    """float32 old and new values of some rows, whole granules. Raises NonFiniteResult."""
    before, after = decode_rows(old, both.old, known(both.old, rows)), decode_rows(new, both.new, rows)
    for source, values in ((old, before), (new, after)):
        if not finite(values):
            raise NonFiniteResult(f"{called(source.path)} holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
    return padded(before, rows), after
