"""The only loop: each weight of a plan, block by block, from source to sink."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeport import journal as journals
from edgeport.beside import write_adapter
from edgeport.blocks import arrange, check_finite, decode_parts, encode_rows, known, padded, ranges, read_parts
from edgeport.calibration import Activations, sees_inputs
from edgeport.device import Lane, opened, packed_bytes, wake
from edgeport.errors import BudgetTooSmall, PatchLost, PlanViolation, about
from edgeport.gate import Verdict, gate
from edgeport.grid import Gridded, Rescalable
from edgeport.journal import Journal
from edgeport.manifest import Receipt, WeightFact, check_unchanged, described, hashes, in_background, named, write_manifest
from edgeport.memory import ALLOWANCE_BYTES, Meter, in_words, metered, peak_bytes, resident_bytes, return_freed_blocks, trim_heap
from edgeport.places import check_files, check_output
from edgeport.planning import Plan
from edgeport.probing import carry_out, job_of
from edgeport.registry import codec, roundings
from edgeport.rounding import Inputs, on_grid
from edgeport.seams import Finishing
from edgeport.settling import settled
from edgeport.staging import Staging, claimed, staged
from edgeport.steps import COPY_BYTES, Limits, Step
from edgeport.survival import Survival
from edgeport.tensor import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.seams import Applied

Progress = Callable[[str, int], None]
"""Called with a weight's name and the bytes of the source that are done since the last call."""

LEAST_RETENTION = 0.5
INSTEAD = "write a finer format (--quant bf16, or Q8_0 in a GGUF), --sidecar (not in ONNX), or --force to write it all the same"


def silent(weight: str, nbytes: int) -> None:
    """Progress for those who do not watch."""


def run(
    plan: Plan, *, progress: Progress = silent, force: bool = False, resume: bool = False, command: Sequence[str] = ()
) -> Receipt:
    """Carry out a plan. The output appears whole, or an error is raised and nothing is left.

    `resume`: go on from the journal of an interrupted run, if there is one, and leave one where this is interrupted too.
    """
    import torch  # before the meter starts: the bound is above the imports

    return_freed_blocks()
    began = time.perf_counter()
    with (
        torch.no_grad(), claimed(plan.target.output), Activations(plan, lambda text: progress(text, 0)) as activations,
        metered() as meter,
    ):  # fmt: skip
        check_output(plan.target.output, plan.sink.folder, plan.overwrite)
        check_files(plan.target.output, plan.files, plan.sink.folder, plan.overwrite)
        verdict = gate(plan, force)
        steps = tuple(settled(step, plan.source, plan.rule) for step in plan.steps)
        wake(plan.limits.device)
        check_budget(plan.limits)
        meter.before = resident_bytes()  # with the libraries of formats and devices, which are in use by now
        check_unchanged(plan.stamps)
        journal = journals.opened(plan, steps, resume)
        return stream(plan, steps, activations, journal, verdict, began, meter, progress=progress, force=force, command=command)


def stream(
    plan: Plan, steps: Sequence[Step], activations: Activations, journal: Journal, verdict: Verdict, began: float,
    meter: Meter, *, progress: Progress, force: bool, command: Sequence[str],
) -> Receipt:  # fmt: skip
    """The loop itself: what the memory bound is about."""
    inputs = in_background(partial(describe_inputs, plan))
    with (
        staged(plan.target.output, plan.files, plan.sink.folder, plan.overwrite, journal) as staging, lane_for(plan) as lane,
    ):  # fmt: skip
        journal.begin(staging.folder)
        found: dict[str, WeightFact] = {}
        for step, seen in activations.through(steps, staging.written, journal, lane.device):
            name = step.target.name
            if name in journal.done:
                found[name] = skip(step, staging, journal, progress)
                continue
            with about(name):
                if step.copied:
                    found[name] = copy(plan, step, staging, progress)
                else:
                    found[name] = edit(plan, step, staging, lane, seen, progress)
                lane.finish()
                journal.add(step, found[name], journals.digests(step, staging.read), activations.state)
            del seen  # before the next step's inputs come
            trim_heap()
            check_budget(plan.limits)
        facts = [found[step.target.name] for step in steps]
        if plan.adapter:
            facts = write_adapter(plan.adapter, plan.source, staging, facts, plan.sink.importance)
            check_budget(plan.limits)
        plan.sink.finish(staging.folder)
        check_budget(plan.limits)
        meter.peak = peak_bytes()
        seconds = time.perf_counter() - began
        receipt = make_receipt(
            plan, tuple(facts), seconds, meter.peak, meter.above, lane.peak_bytes(), verdict, activations, journal
        )
        if not force:
            refuse_erased(receipt)
        receipt = probed(plan, receipt, staging.folder, progress)
        if not force:
            refuse_lost(receipt)
        told = inputs.result()
        check_unchanged(plan.stamps)
        write_manifest(receipt, plan.sink.folder, staging.folder, told, command)
    return receipt


def lane_for(plan: Plan) -> AbstractContextManager[Lane]:
    """The plan's device, with buffers for its largest block."""
    blocks = [(weight, step) for step in plan.steps if not step.copied for weight in (step.origin, step.target)]
    sizes = [packed_bytes(sizes_of(weight, range(step.rows))) for weight, step in blocks]
    return opened(plan.limits.device, max(sizes[::2], default=0), max(sizes[1::2], default=0), plan.limits.vram)


def sizes_of(weight: Weight, rows: range) -> list[int]:
    return [part.size(rows, weight.granule) for part in weight.parts.values()]


def skip(step: Step, staging: Staging, journal: Journal, progress: Progress) -> WeightFact:
    """Leave a weight as an interrupted run has written it."""
    for part in step.target.parts.values():
        staging.has(part.spec.name)
    progress(step.target.name, step.origin.nbytes)
    return journal.done[step.target.name]


def copy(plan: Plan, step: Step, staging: Staging, progress: Progress) -> WeightFact:
    """Move an untouched weight's bytes as they are."""
    size = max(min(COPY_BYTES, step.peak_bytes), 1)
    for role, part in step.origin.parts.items():
        name = step.target.parts[role].spec.name
        staging.expect(name, part.spec.nbytes)
        for start in range(0, part.spec.nbytes, size):
            stop = min(start + size, part.spec.nbytes)
            staging.write(name, start, plan.source.read(part.spec, start, stop))
            progress(step.target.name, stop - start)
    return WeightFact(step.target.name, "copy", step.target.shape, step.origin.format, step.target.format)


def edit(
    plan: Plan, step: Step, staging: Staging, lane: Lane, inputs: Inputs | None, progress: Progress
) -> WeightFact:
    """Decode, apply every edit, encode and write, `step.rows` rows at a time."""
    for part in step.target.parts.values():
        staging.expect(part.spec.name, part.spec.nbytes)
    if inputs is None and sees_inputs(step):
        step = step.without_inputs
    applied = [edit.load(lane.device) for edit in step.edits]
    importance = (plan.sink.importance or {}).get(step.target.name)
    survival = Survival()
    share = step.origin.nbytes / max(step.target.rows, 1)
    later: dict[str, list[Tensor]] = {}

    def read(rows: range) -> Mapping[str, bytearray]:
        return read_parts(plan.source, step.origin, known(step.origin, rows))

    for rows, parts in lane.blocks(ranges(step.target, step.rows, step.granule), read):
        stored = compute(step, rows, parts, applied, importance, inputs, survival)
        for role in stored.keys() - step.target.parts.keys():
            later.setdefault(role, []).append(stored[role].cpu())
        stored = {role: data for role, data in stored.items() if role in step.target.parts}
        lane.store(stored, partial(put, staging, step.target, rows))
        progress(step.target.name, round(share * rows.stop) - round(share * rows.start))
    if later:
        finish(step.target, later, staging, lane)
    return WeightFact(
        step.target.name, step.action, step.target.shape, step.origin.format, step.target.format,
        step.rounding if step.edits or step.chooses_codes else None,
        "+".join(sorted({edit.semantics for edit in step.edits})) or None,
        **survival.figures(),
    )  # fmt: skip


def put(staging: Staging, target: Weight, rows: range, role: str, data: memoryview) -> None:
    """Write what spells some rows of a weight's part. A table that all rows share goes with the first."""
    part = target.parts[role]
    if part.stride or rows.start == 0:
        staging.write(part.spec.name, part.span(rows, target.granule)[0], data, part.lines, part.pitch)


def finish(target: Weight, later: dict[str, list[Tensor]], staging: Staging, lane: Lane) -> None:
    """Write the parts that the codec makes of the whole weight. `later` is emptied."""
    import torch

    held = {role: torch.cat(later.pop(role)) for role in list(later)}
    owner = codec(target.codec)
    if not isinstance(owner, Finishing):
        raise PlanViolation(f"{target.codec} returned {', '.join(held)}, which {target.name} has no part for")
    lane.store(owner.finish(target, held), partial(put, staging, target, range(target.rows)))


def compute(
    step: Step, rows: range, parts: dict[str, Tensor], applied: Sequence[Applied], importance: Tensor | None,
    inputs: Inputs | None, survival: Survival,
) -> Mapping[str, Tensor]:
    """The stored bytes of the edited rows, by part. All device memory that a block takes is taken here.

    `parts` is emptied, so that the bytes read do not outlive their decoding. Raises NonFiniteResult.
    """
    import torch

    base = padded(decode_parts(step.origin, parts), rows)
    own = dict(parts) if step.on_own_grid else None
    parts.clear()
    exact = base
    for apply in applied:
        exact = apply(rows, exact)
    check_finite(base, exact, rows)
    old = len(known(step.origin, rows))
    if not step.chooses_codes or (own and not old):
        stored = encode_rows(step.target, exact, importance)
    elif own and old < len(rows):  # rows of new tokens lie on no grid yet
        pieces = round_on_grid(step, rows, own, exact[:old], inputs), spelt_anew(step, exact[old:], importance)
        stored = {role: torch.cat([piece[role] for piece in pieces]) for role in pieces[0]}
    else:
        spelt = own or spelt_anew(step, exact if step.fresh else base, importance)
        stored = round_on_grid(step, rows, spelt, exact, inputs)
    if applied and old:
        survival.add(base[:old], exact[:old], decode_parts(step.target, stored)[:old].to(exact.device))
    return stored


def spelt_anew(step: Step, values: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
    """The bytes of rows that lie on no grid yet, where the values are: some codecs encode on the CPU alone."""
    return {role: data.to(values.device) for role, data in encode_rows(step.target, values, importance).items()}


def round_on_grid(
    step: Step, rows: range, parts: Mapping[str, Tensor], exact: Tensor, inputs: Inputs | None
) -> Mapping[str, Tensor]:
    """The edited rows on the grid that `parts` spell: the step's rule chooses the codes, and scales if it gives any anew."""
    owner, rule = cast(Gridded, codec(step.target.codec)), roundings()[step.rounding]
    grid = owner.grid(step.target, parts)
    draws = None if step.fresh else step.draws
    codes = on_grid(rule, grid, arrange(exact, step.target), draws, rows.start, inputs)
    if rule.rescales and grid.scales is not None:
        parts = cast(Rescalable, owner).with_scales(step.target, parts, grid)
    return owner.with_codes(step.target, parts, codes)


def check_budget(limits: Limits) -> None:
    """Stop a run whose process grows beyond --max-ram, whatever the reason."""
    limit = limits.ram
    if limit is not None and peak_bytes() > limit:
        raise BudgetTooSmall(
            f"the process has taken {in_words(peak_bytes())}, above --max-ram {in_words(limit)}; this machine's libraries need "
            "more than planned, so give a larger --max-ram"
        )


def describe_inputs(plan: Plan) -> dict[str, Any]:
    """Name, hash and fingerprint of everything that went in."""
    models = {"new_base": plan.source} | ({"old_base": plan.made_on} if plan.made_on else {})
    beside = {"imatrix": plan.target.imatrix, "calibration": plan.method.calibration}
    patches = [
        {**named(patch.path), "kind": patch.kind, "scale": patch.scale, "sha256": hashes(patch.files)}
        for patch in plan.patches
    ]
    files = {role: {"name": path.name, "sha256": hashes([path])} for role, path in beside.items() if path}
    return {**described(models), **files, "patches": patches}


def make_receipt(
    plan: Plan, facts: tuple[WeightFact, ...], seconds: float, peak: int, above: int, vram: int, verdict: Verdict,
    activations: Activations, journal: Journal,
) -> Receipt:
    notes = (*plan.notes, *journal.notes, *activations.notes)
    coverage: Mapping[str, int] = {"tensors": plan.patch_tensors, "consumed": plan.patch_tensors}
    return Receipt(
        output=plan.target.output, files={file.name: file.size for file in plan.files}, bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out, facts=facts, seconds=seconds, peak_ram_bytes=peak, peak_above_import_bytes=above,
        peak_vram_bytes=vram, predicted_peak_bytes=plan.peak_above_import_bytes + ALLOWANCE_BYTES, coverage=coverage,
        method=plan.method.to_json(), gate=verdict.to_json(), notes=notes,
        adapter=plan.adapter.to_json() if plan.adapter else None, calibration=activations.to_json(), device=plan.limits.device,
    )  # fmt: skip


def probed(plan: Plan, receipt: Receipt, staging: Path, progress: Progress) -> Receipt:
    """The receipt with what the staged files do as a model, or why that was not asked."""
    if plan.probing.skipped:
        return replace(receipt, probe_skipped=plan.probing.skipped)
    found = carry_out(plan.probing, job_of(plan, staging), lambda text: progress(text, 0))
    if isinstance(found, str):
        return replace(receipt, probe_skipped=found)
    louder = found.kl > found.patch_kl
    notes = (f"rounding changes the model more than the patch does (KL {found.kl:.3g} and {found.patch_kl:.3g} nats)",) * louder
    return replace(receipt, probe=found, notes=(*receipt.notes, *notes))


def refuse_erased(receipt: Receipt) -> None:
    """Raise PatchLost where rounding erased the patch: a quantized no-op must not pass for a port."""
    survival = receipt.survival
    if survival and survival["mean"] < LEAST_RETENTION:
        raise PatchLost(
            f"rounding to the output's format keeps {survival['mean']:.0%} of the patch in all (least: {survival['worst']}, "
            f"{survival['min']:.0%}); {INSTEAD}"
        )


def refuse_lost(receipt: Receipt) -> None:
    """Raise PatchLost where the model itself says so, whatever the weights keep."""
    if receipt.probe and receipt.probe.lost:
        raise PatchLost(
            f"the output is nearer to the base than to the exact port: on the probe text it has {receipt.probe.kept:.0%} of what "
            f"the patch changes in the model; {INSTEAD}"
        )
