"""Carrying out an extraction: the difference of two models, weight by weight, into a patch (see `extraction`)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeport import lowrank
from edgeport.blocks import ranges
from edgeport.checkpoint import safetensors_bytes
from edgeport.errors import UnsupportedPatch, about
from edgeport.extraction import (
    DEFAULT_RANK,
    DIFFERENCE,
    LEAST_WIDTH,
    LORA,
    NONE,
    WHOLE,
    Change,
    Extraction,
    ExtractionPlan,
    Taken,
    as_plain,
    factor_layout,
    widest,
)
from edgeport.hub import called
from edgeport.manifest import check_unchanged, described, in_background, write_record
from edgeport.memory import ALLOWANCE_BYTES, metered, peak_bytes, return_freed_blocks, trim_heap
from edgeport.pair import Both, block_of, blocks
from edgeport.patches import dense
from edgeport.patches.lora import CONFIG, TOKENIZER_FILES
from edgeport.patches.lora_config import lora_config, spelled, task_of
from edgeport.patches.names import PEFT_PREFIX, TIED_BY_PEFT
from edgeport.places import MANIFEST, check_output
from edgeport.registry import codec
from edgeport.run import Progress, check_budget, silent
from edgeport.seams import FileLayout
from edgeport.staging import Staging, claimed, staged
from edgeport.steps import COPY_BYTES, stored_alike
from edgeport.survival import inner
from edgeport.tensor import HEAD, TensorSpec, Weight
from edgeport.ties import HEADS

if TYPE_CHECKING:
    from torch import Tensor

WIDENING = 4
"""By how much --energy widens its search where the directions so far do not hold enough."""
TOLERANCE = 1e-6
"""Of shares that are sums in float32."""


class Appended:
    """A safetensors file that grows tensor by tensor behind room for its header."""

    def __init__(self, name: str, room: int) -> None:
        self.places: dict[str, int] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.layout = FileLayout(name, 0, (), self.places)
        self.room = self.end = room

    def add(self, weight: Weight, staging: Staging) -> None:
        for part in weight.parts.values():
            self.places[part.spec.name], self.specs[part.spec.name] = self.end, part.spec
            staging.expect(part.spec.name, part.spec.nbytes)
            self.end += part.spec.nbytes

    def put(self, weight: Weight, row: int, values: Tensor, staging: Staging) -> None:
        """Write float32 rows of a weight from `row` on."""
        for role, data in codec("plain").encode(weight, values, None).items():
            part = weight.parts[role]
            staging.write(part.spec.name, row * part.stride, memoryview(data.numpy()))  # type: ignore[arg-type]

    def close(self, staging: Staging) -> None:
        """Write the header, filled up with spaces."""
        header, _ = safetensors_bytes(self.specs, {"format": "pt"})
        text = header[8:].ljust(self.room - 8)
        with open(staging.folder / self.layout.name, "r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)


def extract(plan: ExtractionPlan, *, progress: Progress = silent, command: Sequence[str] = ()) -> Extraction:
    """Carry out a plan. The patch appears whole, or an error is raised and nothing is left."""
    import torch  # before the meter starts: the bound is above the imports

    return_freed_blocks()
    began = time.perf_counter()
    file = Appended(plan.file, plan.room)
    with torch.no_grad(), claimed(plan.output), metered() as meter:
        check_output(plan.output, True, plan.overwrite)
        check_unchanged(plan.stamps)
        inputs = in_background(partial(described, {"old_base": plan.old, "tuned": plan.tuned}))
        with staged(plan.output, [file.layout], True, plan.overwrite) as staging:
            facts = []
            for change in plan.changes:
                with about(change.both.name):
                    facts.append(take(plan, change, file, staging))
                progress(change.both.name, change.both.nbytes)
                trim_heap()
                check_budget(plan.limits)
            if not file.specs:
                raise UnsupportedPatch(
                    f"{called(plan.tuned.path)} has the same weights as {called(plan.old.path)}; there is nothing to extract"
                )
            file.close(staging)
            write_companions(plan, facts, staging.folder)
            meter.peak = peak_bytes()
            done = Extraction(
                plan.output, dense.KIND if plan.keep.full else LORA, {file.layout.name: file.end}, plan.bytes_in, tuple(facts),
                time.perf_counter() - began, meter.peak, meter.above, plan.peak_above_import_bytes + ALLOWANCE_BYTES,
                tuple(notes_on(plan, facts)),
            )  # fmt: skip
            told = inputs.result()
            check_unchanged(plan.stamps)
            write_record(staging.folder, MANIFEST, told, command, record(plan, done, told))
    return done


def record(plan: ExtractionPlan, done: Extraction, inputs: Any) -> dict[str, Any]:
    """What the manifest says, and what reads the patch wants to know of its base."""
    return {
        **{key: value for key, value in done.to_json().items() if key not in ("files", "output")},
        "base_fingerprint": inputs["old_base"]["fingerprint"], "keep": asdict(plan.keep), "tied": plan.tied,
        "grown": plan.grown, "per_weight": [asdict(fact) for fact in done.changed],
    }  # fmt: skip


def notes_on(plan: ExtractionPlan, facts: Sequence[Taken]) -> Iterator[str]:
    """What the user should know of the patch."""
    whole = [fact.weight for fact in facts if fact.form == WHOLE and fact.stored]
    if whole:
        yield (
            f"{len(whole)} weights that are no linear layers ({', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}) are kept "
            "as whole values; port with --old-base to add their change in place of putting them in the new base's place"
        )
    if plan.grown:
        before = "" if plan.keep.full else "; before PEFT loads the patch, resize the base's embeddings"
        yield f"the vocabulary has grown ({', '.join(plan.grown)}){before}"
    if plan.settings:
        yield (
            f"config.json has another {', '.join(plan.settings)} in the tuned model, which no patch holds: a port of it computes "
            "as the new base's config.json says"
        )


def take(plan: ExtractionPlan, change: Change, file: Appended, staging: Staging) -> Taken:
    """Append what holds one weight's change, if it has changed."""
    both = change.both
    if not computable(both):
        if same_bytes(both, plan):
            return Taken(both.name, change.form, both.new.shape)
        raise UnsupportedPatch(f"it has changed, and {both.new.format} numbers can be copied and not computed with")
    squares, before = survey(plan, change)
    if squares == 0 and not both.grown and not saved_beside(both.name, file):
        return Taken(both.name, change.form, both.new.shape)
    relative = sqrt(squares / before) if before else None
    if change.form == NONE:
        raise UnsupportedPatch("a PEFT adapter has no place for the change of it; use --full")
    if change.form == LORA:
        rank, energy = append_factors(plan, change, squares, file, staging)
        return Taken(both.name, LORA, both.new.shape, relative, rank, energy, squares)
    name = both.name if change.form == DIFFERENCE else whole_name(both.name, file)
    # PEFT looks for the values of a tied embedding under the head's name as well
    names = [name, f"{PEFT_PREFIX}{HEAD}"] if change.form == WHOLE and both.name in HEADS and plan.tied else [name]
    for weight in [as_plain(both, change.form, name) for name in names]:
        file.add(weight, staging)
        for rows in ranges(both.new, change.rows, both.granule):
            old, new = block_of(both, plan.old, plan.tuned, rows)
            file.put(weight, rows.start, new.sub_(old) if change.form == DIFFERENCE else new, staging)
    return Taken(both.name, change.form, both.new.shape, relative, squares=squares, grown=both.grown)


def computable(both: Both) -> bool:
    return all(codec(weight.codec).formats[weight.format] for weight in (both.old, both.new))


def same_bytes(both: Both, plan: ExtractionPlan) -> bool:
    """Of weights that are numbers of no kind that can be computed with: positions, counters."""
    if not stored_alike(both.old, both.new):
        return False
    for before, after in zip(both.old.parts.values(), both.new.parts.values(), strict=True):
        for start in range(0, after.spec.nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, after.spec.nbytes)
            if plan.old.read(before.spec, start, stop) != plan.tuned.read(after.spec, start, stop):
                return False
    return True


def survey(plan: ExtractionPlan, change: Change) -> tuple[float, float]:
    """Sums of squares: of the difference, and of the old values."""
    squares = before = 0.0
    for _, old, new in blocks(change.both, plan.old, plan.tuned, change.rows):
        before += float(inner(old, old))
        difference = new.sub_(old)
        squares += float(inner(difference, difference))
    return squares, before


def append_factors(
    plan: ExtractionPlan, change: Change, squares: float, file: Appended, staging: Staging
) -> tuple[int, float]:
    """Rank and kept energy of the factors that are appended. Raises UnsupportedPatch where --energy takes too many."""
    both, keep = change.both, plan.keep
    rows, columns = both.new.rows, both.new.columns

    def difference() -> Iterator[tuple[range, Tensor]]:
        for some, old, new in blocks(both, plan.old, plan.tuned, change.rows):
            yield some, new.sub_(old)

    width = change.width if keep.energy is None else min(LEAST_WIDTH, change.width)
    while True:
        found = lowrank.truncated(difference, columns, width, f"extract {both.name}")
        held = (found.values.double().square().cumsum(0) / squares).clamp(max=1.0).tolist()
        surely = len(held) if width == min(rows, columns) else len(held) - lowrank.OVERSAMPLING
        rank = min(keep.rank or surely, surely)
        if keep.energy is None:
            break
        enough = next((index for index, share in enumerate(held[:surely], 1) if share >= keep.energy - TOLERANCE), None)
        if enough is not None:
            rank = enough
            break
        if width == change.width:
            raise UnsupportedPatch(too_wide(plan, change, surely, held[surely - 1]))
        del found  # before a wider one comes
        width = min(WIDENING * width, change.width)
    up, down = found.factors(rank)
    for weight, values in zip(factor_layout(both, rank), (down, up), strict=True):
        file.add(weight, staging)
        file.put(weight, 0, values, staging)
    return rank, held[rank - 1]


def too_wide(plan: ExtractionPlan, change: Change, rank: int, share: float) -> str:
    """Why --energy cannot be had."""
    bound = widest(plan.keep, change.both.new.rows, change.both.new.columns)
    limit = "where factors take as much room as the difference itself" if change.width == bound else "as much as --max-ram allows"
    return (
        f"the change is not of low rank: {rank} directions, {limit}, hold {share:.1%} of it (rounding to 16 bits counts as "
        f"change), and --energy {plan.keep.energy} was asked; use --full, or --rank for so many directions whatever they hold"
    )


def saved_beside(name: str, file: Appended) -> bool:
    """Whether it is the bias of a module that PEFT loads whole, and misses none of."""
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{PEFT_PREFIX}{module}.weight" in file.specs


def whole_name(name: str, file: Appended) -> str:
    """Under which PEFT keeps a whole value: that of a layer with factors lies one level deeper."""
    module, _, leaf = name.rpartition(".")
    inside = ".base_layer" if f"{PEFT_PREFIX}{module}.lora_A.weight" in file.specs else ""
    return f"{PEFT_PREFIX}{module}{inside}.{leaf}"


def write_companions(plan: ExtractionPlan, facts: Sequence[Taken], folder: Path) -> None:
    """The adapter's config, and the tokenizer where it has tokens that the old base's has not."""
    if plan.grown or plan.tokens:
        with TemporaryDirectory(dir=folder) as scratch:
            for name, path in plan.tuned.assets(Path(scratch)).items():
                if name in TOKENIZER_FILES:
                    shutil.copyfile(path, folder / name)
    if plan.keep.full:
        return
    ranks = {fact.weight.removesuffix(".weight"): fact.rank for fact in facts if fact.rank}
    alpha = plan.keep.rank or max(ranks.values(), default=DEFAULT_RANK)
    whole = [fact.weight for fact in facts if fact.form == WHOLE and fact.stored]
    saved = [name.removesuffix(".weight") for name in whole if name.endswith(".weight")]
    if plan.tied and any(name in HEADS and not name.endswith(TIED_BY_PEFT) for name in whole):
        saved.append(HEAD.removesuffix(".weight"))
    biases = {name.removesuffix(".bias") for name in whole if name.endswith(".bias")}
    config = lora_config(
        ranks, alpha, alpha_pattern={name: rank for name, rank in ranks.items() if rank != alpha},
        task_type=task_of(plan.tuned.config), bias="all" if biases - set(saved) else "none", modules_to_save=saved or None,
        ensure_weight_tying=plan.tied and any(name.endswith(TIED_BY_PEFT) for name in whole),
    )  # fmt: skip
    (folder / CONFIG).write_bytes(spelled(config))
