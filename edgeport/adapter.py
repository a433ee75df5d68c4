"""A low-rank patch beside an output, as planned: all of a patch next to an untouched base, or what rounding lost of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeport.errors import ConvertError, UnknownName, UnsupportedPatch, about
from edgeport.lowrank import OVERSAMPLING
from edgeport.matching import final_shape, reshaped
from edgeport.seams import Adapting, Edit, Factors, FileLayout, LowRankEdit, Sink
from edgeport.steps import Allowed, Step, cut
from edgeport.tensor import Weight
from edgeport.ties import HEADS

SIDECAR, RESIDUAL = "sidecar", "residual"
Patched = Mapping[str, tuple[Weight, Sequence[Edit]]]
"""By the name of a patched weight: the stored weight, and its edits in order."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a plan writes beside its model."""

    kind: str
    name: str
    """Its file or folder in the output."""
    alpha: int
    factors: tuple[Factors, ...]
    files: tuple[FileLayout, ...]
    steps: tuple[Step, ...] = ()
    """Of each weight in `factors`, the merge of its edits: the blocks in which the patch is compared with what is stored."""

    @property
    def peak_bytes(self) -> int:
        return max(step.peak_bytes + held_bytes(one) for step, one in zip(self.steps, self.factors, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "path": self.name, "alpha": self.alpha,
            "rank": sorted({one.rank for one in self.factors}), "bytes": sum(file.size for file in self.files),
        }  # fmt: skip


def held_bytes(factors: Factors) -> int:
    """Beside a step with its edits' own factors: theirs put together, what is stored of them, the sketch and its vectors."""
    sketch = 8 * (factors.rank + OVERSAMPLING) * factors.down.columns
    return 3 * (factors.up.nbytes + factors.down.nbytes) + 3 * sketch


def plan_sidecar(sink: Sink, patched: Patched) -> Adapter:
    """The adapter that holds all edits.

    Raises ConvertError for a container that has no such form; UnsupportedPatch for what is no low-rank change.
    """
    ranks = {}
    for name, (_, edits) in patched.items():
        low = [edit for edit in edits if isinstance(edit, LowRankEdit)]
        if len(low) < len(edits):
            with about(name):
                raise UnsupportedPatch(
                    "the patch holds whole values for it, which a low-rank adapter cannot; leave off --sidecar to merge them"
                )
        ranks[name] = sum(edit.rank for edit in low)
    return laid_out(SIDECAR, sink, patched, ranks)


def plan_residual(sink: Sink, patched: Patched, placed: Mapping[str, Weight], rank: int) -> Adapter:
    """The adapter that holds, in `rank` directions a weight, what rounding to a quantized format loses.

    Raises UnknownName; ConvertError for a container that has no such form; UnsupportedPatch where nothing is rounded.
    """
    if rank < 1:
        raise UnknownName(f"--residual {rank} is no rank; give a number from 1 on")
    rounded = [placed[name] for name in patched if name in placed and placed[name].codec != "plain" and name not in HEADS]
    if not rounded:
        raise UnsupportedPatch("no patched linear layer is stored in a quantized format, so rounding leaves no residual")
    return laid_out(RESIDUAL, sink, patched, {one.name: min(rank, one.rows, one.columns) for one in rounded})


def laid_out(kind: str, sink: Sink, patched: Patched, ranks: Mapping[str, int]) -> Adapter:
    if not isinstance(sink, Adapting):
        raise ConvertError("the output's container has no form for an adapter beside it; write --to hf or gguf")
    if not ranks:
        raise UnsupportedPatch("the patch changes no weight, so there is nothing to put beside the model")
    factors = []
    for name, rank in ranks.items():
        with about(name):
            origin, edits = patched[name]
            factors.append(sink.factors(reshaped(origin, final_shape(origin, edits)).named(name), rank))
    alpha = max(ranks.values())
    name, files = sink.adapter(factors, alpha)
    return Adapter(kind, name, alpha, tuple(factors), tuple(files))


def surveyed(adapter: Adapter, patched: Patched, placed: Mapping[str, Weight], allowed: Allowed) -> Adapter:
    """The adapter with its steps, on the CPU. `placed`: how the output stores each weight. Raises BudgetTooSmall."""
    steps = []
    for one in adapter.factors:
        origin, edits = patched[one.target]
        # a tied head is stored as the embedding
        stored = placed.get(one.target) or next(placed[name] for name in HEADS if name in placed).named(one.target)
        steps.append(cut(origin, stored, tuple(edits), replace(allowed, vram=None, cuda=False)))
    return replace(adapter, steps=tuple(steps))
