"""Plans, receipts and diagnoses as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeport.gate import WARN
from edgeport.memory import in_words
from edgeport.report import table

if TYPE_CHECKING:
    from edgeport.diagnosis import Diagnosis
    from edgeport.effect import Effect
    from edgeport.extraction import Extraction, ExtractionPlan
    from edgeport.manifest import Receipt
    from edgeport.planning import Plan


def plan_text(plan: Plan) -> str:
    actions = [step.action for step in plan.steps]
    rows = [
        ["weights", ", ".join(f"{actions.count(action)} to {action}" for action in ("patch", "recode", "copy"))],
        ["read", in_words(plan.bytes_in)],
        ["write", f"{in_words(plan.bytes_out)} in {len(plan.files)} file(s) to {plan.target.output}"],
        ["peak RAM", f"{in_words(plan.peak_ram_bytes)} ({in_words(plan.peak_above_import_bytes)} of it for blocks and headers)"],
        *guide(plan.calibration),
        ["peak VRAM", in_words(plan.peak_vram_bytes)],
        ["disk", in_words(plan.disk_bytes)],
        ["time", f"about {duration(plan.seconds)} on one core, by usual rates"],
    ]
    return table(["plan", ""], rows) + "".join(f"\nnote: {note}" for note in plan.notes)


def guide(calibration: Mapping[str, Any] | None) -> list[list[str]]:
    """The line of the text that guides the rounding, if there is one."""
    if not calibration:
        return []
    return [["rounding's text", f"{calibration['tokens']} tokens; {in_words(calibration['peak_ram_bytes'])} in a process beside"]]


def duration(seconds: float) -> str:
    """In the unit that suits it: "2 min"."""
    for count, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * count:
            return f"{seconds / count:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def receipt_text(receipt: Receipt) -> str:
    facts = receipt.to_json()
    rows = [
        ["output", f"{receipt.output} ({in_words(receipt.bytes_out)})"],
        ["weights", f"{facts['weights']}: {facts['patched']} patched, {facts['copied']} copied byte for byte"],
        ["time", f"{receipt.seconds:.1f} s"],
        ["peak RAM", f"{in_words(receipt.peak_ram_bytes)} ({in_words(receipt.peak_above_import_bytes)} above import)"],
        *guide(receipt.calibration),
    ]
    if receipt.coverage["tensors"]:
        gate = facts["gate"]
        rows.append(["gate", gate["verdict"] + f": {gate['reason']}" * (gate["verdict"] == WARN)])
        rows.append(["patch tensors", f"{receipt.coverage['consumed']} of {receipt.coverage['tensors']} merged"])
    if promoted := receipt.method.get("promoted"):
        names = f"{', '.join(list(promoted)[:3])}{' ...' if len(promoted) > 3 else ''}"
        rows.append(["promoted", f"{len(promoted)} weights: {names}"])
    if receipt.adapter:
        kept = f"{receipt.adapter['path']} ({in_words(receipt.adapter['bytes'])}), beside the model and part of it"
        rows.append(["adapter", kept])
    if survival := receipt.survival:
        rows.append(["patch kept", f"{survival['mean']:.1%} in all, least {survival['min']:.1%} ({survival['worst']})"])
    if effect := receipt.probe:
        rows.append(["probe", effect_text(effect)])
    elif survival:
        rows.append(["probe", f"not run: {receipt.probe_skipped}"])
    return table(["written", ""], rows)


def weights_text(receipt: Receipt) -> str:
    """A line for each weight that was not merely copied."""
    rows = [
        [
            fact.weight, fact.action + " beside" * fact.beside, fact.origin, fact.stored, fact.rounding or "-",
            *map(decimal, (fact.change, fact.retention, fact.error)),
        ]
        for fact in receipt.facts if fact.action != "copy" or fact.beside
    ]  # fmt: skip
    return table(["weight", "action", "from", "to", "rounding", "change", "kept", "error"], rows)


def decimal(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.4f}"


def effect_text(effect: Effect) -> str:
    kept = "the patch changes nothing here" if effect.kept is None else (
        f"{effect.kept:.1%} +- {effect.kept_error:.1%} of the patch's effect kept"
    )
    perplexity = ", ".join(f"{name} {value:.2f}" for name, value in effect.perplexity.items())
    return (
        f"{kept}; KL to the exact port {effect.kl:.3g} nats (the patch: {effect.patch_kl:.3g}); perplexity {perplexity}; "
        f"{effect.tokens} tokens, {effect.seconds:.1f} s, {in_words(effect.peak_ram_bytes)}"
    )


def extraction_plan_text(plan: ExtractionPlan) -> str:
    forms = [change.form for change in plan.changes]
    rows = [
        ["weights, if changed", ", ".join(f"{forms.count(form)} as {form}" for form in dict.fromkeys(forms))],
        ["read", f"{in_words(plan.bytes_in)}, some of it more than once"],
        ["write", f"at most {in_words(plan.bytes_out)} to {plan.output}"],
        ["peak RAM", f"{in_words(plan.peak_ram_bytes)} ({in_words(plan.peak_above_import_bytes)} of it for blocks and sketches)"],
        ["disk", in_words(plan.disk_bytes)],
    ]
    return table(["plan", ""], rows)


def extraction_text(done: Extraction) -> str:
    facts = done.to_json()
    ranks = f", rank {' to '.join(map(str, dict.fromkeys((facts['rank'][0], facts['rank'][-1]))))}" if facts["rank"] else ""
    energy = done.energy
    rows = [
        ["patch", f"{done.output} ({done.kind}{ranks}, {in_words(facts['bytes_out'])})"],
        ["weights", f"{facts['changed']} of {facts['weights']} have changed, {facts['whole']} are kept as whole values"],
        ["change kept", f"{energy['all']:.2%} of its square, least {energy['min']:.2%} ({energy['worst']})"],
        ["time", f"{done.seconds:.1f} s"],
        ["peak RAM", f"{in_words(done.peak_ram_bytes)} ({in_words(done.peak_above_import_bytes)} above import)"],
    ]
    return table(["extracted", ""], rows)


def changes_text(done: Extraction) -> str:
    """A line for each weight that has changed."""
    rows = [
        [fact.weight, fact.form, str(fact.rank or "-"), *map(decimal, (fact.change, fact.energy))] for fact in done.changed
    ]
    return table(["weight", "form", "rank", "change", "kept"], rows)


FIGURES = ("change", "drift", "cosine", "read", "written", "along")


def diagnosis_text(found: Diagnosis) -> str:
    """A line for each layer, one for all, and the verdict."""
    facts = found.to_json()
    lines = {**facts["layers"], "all": facts["all"]} if found.weights else {}
    rows = [[name, *(decimal(line[key]) for key in FIGURES)] for name, line in lines.items()]
    text = table(["patched weights of", *FIGURES], rows) + "\n\n" if rows else ""
    if facts["survival"]:
        kept = facts["survival"]
        text += f"kept by the new base's own number format: {kept['mean']:.1%} of the patch in all, least {kept['min']:.1%}\n"
    return f"{text}{found.verdict.verdict}: {found.verdict.reason}"
