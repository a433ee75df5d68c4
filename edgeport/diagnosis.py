"""What `edgeport diagnose` tells: will a patch carry over onto a new base?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeport.blocks import read_tensors, sampled
from edgeport.drift import Item, Sums, compared
from edgeport.errors import ShapeMismatch, TargetMissing, about
from edgeport.gate import REFUSED, UNKNOWN, WITHOUT_OLD, Verdict, judge, vocabulary_notes
from edgeport.hub import called
from edgeport.matching import adapted_config, check_order, collect_edits, final_shape, with_ties
from edgeport.registry import codec
from edgeport.run import compute
from edgeport.seams import Patch, Source
from edgeport.settling import settled
from edgeport.steps import Allowed, Rule, cut
from edgeport.survival import Kept, Survival, overall

LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `edgeport diagnose` finds."""

    patches: tuple[str, ...]
    new_base: str
    old_base: str | None
    verdict: Verdict
    weights: Mapping[str, Sums]
    """Of the weights that the patches change."""
    survival: Mapping[str, Kept]
    """Of those of them that are quantized, on a sample of rows: what their format keeps of the patch."""

    @property
    def layers(self) -> dict[str, Sums]:
        found: dict[str, Sums] = {}
        for name, sums in self.weights.items():
            match = LAYER.match(name)
            layer = match[1] if match else name
            found[layer] = found.get(layer, Sums()) + sums
        return dict(sorted(found.items(), key=lambda item: [int(word) if word.isdigit() else -1 for word in item[0].split(".")]))

    def to_json(self) -> dict[str, Any]:
        kept, whole = self.survival, overall(self.survival)
        return {
            "verdict": self.verdict.verdict, "reason": self.verdict.reason, "patches": list(self.patches),
            "new_base": self.new_base, "old_base": self.old_base, "patched": len(self.weights),
            "all": sum(self.weights.values(), Sums()).figures(),
            "survival": {"mean": whole["mean"], "min": whole["min"]} if whole else None,
            "layers": {name: sums.figures() for name, sums in self.layers.items()},
            "weights": {
                name: {**sums.figures(), "kept": kept[name].retention if name in kept else None}
                for name, sums in self.weights.items()
            },
        }  # fmt: skip


def diagnose(new: Source, patches: Sequence[Patch], old: Source | None) -> Diagnosis:
    """Compare every row of every patched weight. A patch that does not fit the new base is a verdict, not an error.

    Raises what makes a file unreadable, or a base, an old base or a patch at odds with itself or the others.
    """
    import torch

    def told(verdict: Verdict, weights: Mapping[str, Sums], kept: Mapping[str, Kept]) -> Diagnosis:
        names = tuple(called(patch.path) for patch in patches)
        return Diagnosis(names, called(new.path), called(old.path) if old else None, verdict, weights, kept)

    try:
        edits = collect_edits(new, patches, None)
    except (TargetMissing, ShapeMismatch) as error:
        return told(Verdict(REFUSED, str(error)), {}, {})
    # what does not fit the old base is a mistake in what was given, as it is to a port
    edits = collect_edits(new, patches, old) if old else edits
    work = with_ties(new, edits)
    check_order(new, edits, patches)
    adapted_config(new, work)
    items = [(name, weight, todo) for name, weight, todo in work if todo]
    with torch.no_grad():
        found = dict(compared(new, old, items, whole=True))
        kept = {item[0]: share for item in items if (share := survival(new, item)) is not None}
    verdict = judge(found, items, vocabulary_notes(new, old)) if old else Verdict(UNKNOWN, WITHOUT_OLD)
    return told(verdict, found, kept)


def survival(new: Source, item: Item) -> Kept | None:
    """What is left of the patch when some rows are stored as the new base stores them, without any calibration.

    None where that is no quantized format, or one that is not written.
    """
    name, weight, edits = item
    written = codec(weight.codec).formats[weight.format] in ("rw", "rp")
    if weight.codec == "plain" or not written or final_shape(weight, edits) != weight.shape:
        return None
    with about(name):
        step = settled(cut(weight, weight, tuple(edits), Allowed(), Rule()), new, Rule())
        applied, found = [edit.load("cpu") for edit in edits], Survival()
        for rows in sampled(weight.rows, step.granule):
            parts = read_tensors(new, weight, rows)
            compute(step, rows, parts, applied, None, None, found)
    return found.kept()
