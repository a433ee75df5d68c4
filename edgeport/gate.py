"""The portability gate: whether a port onto this base can be meant, and what should be heard of it.

PortLLM (arXiv 2410.10870) adds the patch whatever the drift, and that holds up under drift far larger than the patch; so
size alone refuses nothing. What it presupposes is that the new base comes from the old one: matrices of n numbers of two
independent models have a cosine of 0 +- 1 / sqrt(n), and at equal norms a drift of the square root of 2. Only that is
refused; what else is unusual is a warning. For scale: the demo's evolved base has drifted by 0.5 %, and by 0.12 times the
patch in the directions that it reads, and the port there does what refitting does (90.8 % and 91.0 % of 400 questions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

from edgeport.drift import Item, Sums, compared
from edgeport.errors import NotPortable
from edgeport.manifest import sha256
from edgeport.seams import Source
from edgeport.ties import ends
from edgeport.vocabulary import TOKENIZER

if TYPE_CHECKING:
    from edgeport.planning import Plan

UNRELATED = 0.1
"""Median cosine of the patched matrices below which the new base does not come from the old one."""
LOOSE = 0.9
"""Cosine of one matrix below which it is named: most of it has been trained anew."""
HAD = 0.5
"""`along` of all weights above which the new base is said to have the patch already, below minus that to have undone it."""
MUCH = 1.0
"""`read` of all weights above which the new base has changed what the patch reads more than the patch has."""
PASS, WARN, REFUSED, FORCED, UNKNOWN = "pass", "warn", "refused", "forced", "not assessed"
WITHOUT_OLD = "names and shapes fit; without --old-base nothing tells whether the new base comes from the old one"


@dataclass(frozen=True, slots=True)
class Verdict:
    verdict: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def judge(found: Mapping[str, Sums], items: Sequence[Item], notes: Sequence[str]) -> Verdict:
    """The verdict on the sums of some items, and what else there is to be said of the bases."""
    # norms and biases of independent models are alike
    matrices = [name for name, weight, _ in items if len(weight.shape) > 1]
    total = sum(found.values(), Sums()).figures()
    cosines = {name: cosine for name in matrices if (cosine := found[name].figures()["cosine"]) is not None}
    drift = f"the new base has drifted by {total['drift'] or 0:.1%} of the old one's norm in the weights that the patch changes"
    told = had(total["along"] or 0)
    if not cosines:
        what = "changes matrices of zeros alone" if matrices else "changes no matrix"
        untold = f"{drift}, and the patch {what}, where only matrices tell related models from others"
        return Verdict(UNKNOWN, "; ".join([untold, *notes, *filter(None, [told])]))
    if median(cosines.values()) < UNRELATED:
        return Verdict(
            REFUSED,
            f"{drift}, and their median cosine is {median(cosines.values()):.3f}, as between models that have nothing in common: "
            "it does not come from the old base",
        )
    loose = [name for name, cosine in cosines.items() if cosine < LOOSE]
    warnings = list(notes)
    if loose:
        warnings.append(
            f"{len(loose)} of {len(cosines)} matrices have been trained nearly anew (cosine below {LOOSE}: {', '.join(loose[:3])}"
            f"{' ...' if len(loose) > 3 else ''})"
        )
    if told:
        warnings.append(told)
    read = total["read"] or 0
    met = f", and by {read:.2g} times the patch in the directions that it reads" if read else ""
    met += "; that is more than the patch itself, so measure what it still does (edgeport bench)" if read > MUCH else ""
    return Verdict(WARN if warnings or read > MUCH else PASS, "; ".join([drift + met, *warnings]))


def had(along: float) -> str:
    """That the new base has moved along the patch or against it, where it has."""
    if abs(along) <= HAD:
        return ""
    way, seems = ("along", "had it already") if along > 0 else ("against", "undid it")
    return f"the new base has moved {way} the patch by {abs(along):.0%} of it, as if it {seems}"


def gate(plan: Plan, force: bool) -> Verdict:
    """The gate of a port, on a sample of the rows of every patched weight. Raises NotPortable."""
    found = assessed(plan.source, plan.made_on, patched(plan))
    if found.verdict == REFUSED and not force:
        raise NotPortable(f"{found.reason}; give the base that the new one was made from, or --force to port all the same")
    if force and plan.patches:
        return Verdict(FORCED, f"--force went past the gate, which says {found.verdict}: {found.reason}")
    return found


def assessed(new: Source, old: Source | None, items: Sequence[Item]) -> Verdict:
    if not items:
        return Verdict(UNKNOWN, "there is no patch")
    if old is None:
        return Verdict(UNKNOWN, WITHOUT_OLD)
    return judge(dict(compared(new, old, items, whole=False)), items, vocabulary_notes(new, old))


def patched(plan: Plan) -> list[Item]:
    """The weights that the patches change, in the model or in the adapter beside it."""
    steps = (*plan.steps, *(plan.adapter.steps if plan.adapter else ()))
    return list({step.target.name: (step.target.name, step.origin, step.edits) for step in steps if step.edits}.values())


def vocabulary_notes(new: Source, old: Source) -> list[str]:
    """How the new base's vocabulary differs from the old one's, as far as headers and files tell."""
    rows = [source.weights[model.embedding].rows for source in (old, new) if (model := ends(source.weights))]
    if len(set(rows)) > 1:
        return [f"the vocabulary has {rows[1]} rows, and had {rows[0]}"]
    files = [path for source in (old, new) if (path := source.path / TOKENIZER).is_file()]
    if len(files) == 2 and sha256(files[0]) != sha256(files[1]):
        return [f"the {TOKENIZER} of both bases differ: where tokens have other numbers the patch reads other words"]
    return []
