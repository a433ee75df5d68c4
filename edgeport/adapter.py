"""A low-rank patch beside an output, as planned: all of the patch, next to a base that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeport.errors import ConvertError, UnsupportedPatch, about
from edgeport.seams import Adapting, Edit, Factors, FileLayout, LowRankEdit, Sink
from edgeport.steps import Allowed, Step, cut
from edgeport.tensor import EMBEDDING, Weight

SIDECAR = "sidecar"
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
        # beside a step with the edits' own factors: theirs put together, and what is stored of them
        pairs = zip(self.steps, self.factors, strict=True)
        return max(step.peak_bytes + 2 * (one.up.nbytes + one.down.nbytes) for step, one in pairs)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "path": self.name, "alpha": self.alpha,
            "rank": sorted({one.rank for one in self.factors}), "bytes": sum(file.size for file in self.files),
        }  # fmt: skip


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


def laid_out(kind: str, sink: Sink, patched: Patched, ranks: Mapping[str, int]) -> Adapter:
    if not isinstance(sink, Adapting):
        raise ConvertError("the output's container has no form for an adapter beside it; write --to hf or gguf")
    if not ranks:
        raise UnsupportedPatch("the patch changes no weight, so there is nothing to put beside the model")
    factors = []
    for name, rank in ranks.items():
        with about(name):
            factors.append(sink.factors(patched[name][0].named(name), rank))
    alpha = max(ranks.values())
    name, files = sink.adapter(factors, alpha)
    return Adapter(kind, name, alpha, tuple(factors), tuple(files))


def surveyed(adapter: Adapter, patched: Patched, placed: Mapping[str, Weight], allowed: Allowed) -> Adapter:
    """The adapter with its steps, on the CPU. `placed`: how the output stores each weight. Raises BudgetTooSmall."""
    steps = []
    for one in adapter.factors:
        origin, edits = patched[one.target]
        # a tied head is stored as the embedding
        stored = placed.get(one.target) or placed[EMBEDDING].named(one.target)
        steps.append(cut(origin, stored, tuple(edits), replace(allowed, vram=None, cuda=False)))
    return replace(adapter, steps=tuple(steps))
