"""What will happen to every weight, and what it costs: from headers alone, and every user error surfaces here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from edgeport.errors import BudgetTooSmall, DecodeOnly, NotEnoughDisk, OutputExists, ShapeMismatch, UnsupportedPatch, about
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES, MIB, in_words
from edgeport.registry import codec
from edgeport.seams import Converter, Edit, FileLayout, Finishing, Patch, Sink, Source, Target
from edgeport.tensor import EMBEDDING, HEAD, Weight

MANIFEST = "edgeport.json"

BLOCK_ELEMENTS = 1 << 20
"""Elements a block has when memory does not ask for fewer: large enough to keep the cores busy, small enough for caches."""
FLOAT_BYTES = 4
EDIT_BYTES = 16
"""Bytes an element that one edit takes beside the block it is given: at most four float32 matrices, as a value that is
replaced by its difference to the old base does (LoRA: delta, scaled delta, result)."""
SURVIVAL_BYTES = 2
"""Bytes an element that `run.Survival` takes: three float32 matrices of an eighth of the block's rows."""
LEAST_ROWS = 32
"""Rows of an edited block, if the weight has so many: below 12 a matrix product rounds otherwise than the whole one does
(MKL and torch 2.13, any rank and width), and equal blocks of at most 32 rows have 16 or more."""
VRAM_FIXED_BYTES = 64 * MIB
"""Device memory beside the blocks: cuBLAS's workspace (32 MiB on Hopper, 8 before), torch's unfilled 20 MiB segments."""
COPY_BYTES = 8 * MIB
DISK_SLACK_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows. `ram` and `vram` in bytes for the whole process; None: as the plan sees fit."""

    ram: int | None = None
    vram: int | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Step:
    """One weight's way from source to sink: copied byte for byte, or decoded, edited and encoded `rows` at a time."""

    origin: Weight
    target: Weight
    edits: tuple[Edit, ...]
    rows: int
    peak_bytes: int
    """On the CPU, with the edits' factors."""
    vram_bytes: int = 0

    @property
    def granule(self) -> int:
        return common_granule(self.origin, self.target)

    @property
    def copied(self) -> bool:
        return not self.edits and stored_alike(self.origin, self.target)

    @property
    def action(self) -> str:
        return "copy" if self.copied else "patch" if self.edits else "recode"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided, nothing done. Bytes are of stored data; peaks are predictions that the run keeps to."""

    source: Source
    old: Source | None
    patches: tuple[Patch, ...]
    sink: Sink
    target: Target
    limits: Limits
    steps: tuple[Step, ...]
    files: tuple[FileLayout, ...]
    patch_tensors: int
    peak_above_import_bytes: int
    peak_vram_bytes: int
    notes: tuple[str, ...]

    @property
    def bytes_in(self) -> int:
        return sum(step.origin.nbytes for step in self.steps)

    @property
    def bytes_out(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def disk_bytes(self) -> int:
        return self.bytes_out + DISK_SLACK_BYTES

    @property
    def peak_ram_bytes(self) -> int:
        return IMPORT_BYTES + ALLOWANCE_BYTES + self.peak_above_import_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.target.output),
            "files": {file.name: file.size for file in self.files},
            "weights": len(self.steps),
            "patched": sum(step.action == "patch" for step in self.steps),
            "copied": sum(step.copied for step in self.steps),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "disk_bytes": self.disk_bytes,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_above_import_bytes": self.peak_above_import_bytes + ALLOWANCE_BYTES,
            "peak_vram_bytes": self.peak_vram_bytes,
            "coverage": {"tensors": self.patch_tensors, "consumed": self.patch_tensors},
            "notes": list(self.notes),
            "steps": [
                {
                    "weight": step.target.name,
                    "action": step.action,
                    "shape": list(step.target.shape),
                    "from": step.origin.format,
                    "to": step.target.format,
                    "rows": step.rows,
                    "peak_bytes": step.peak_bytes,
                }
                for step in self.steps
            ],
        }


def stored_alike(origin: Weight, target: Weight) -> bool:
    """Whether the target's bytes are the origin's."""
    return (origin.codec, origin.format, origin.arrangement, origin.shape, origin.nbytes) == (
        target.codec, target.format, target.arrangement, target.shape, target.nbytes,
    )  # fmt: skip


def make_plan(
    source: Source,
    patches: Sequence[Patch],
    converter: Converter,
    target: Target,
    limits: Limits,
    *,
    old: Source | None = None,
    overwrite: bool = False,
) -> Plan:
    """Match, check and cut. Raises every error that the user's input can cause; creates no file."""
    edits = collect_edits(source, patches, old)
    work = with_ties(source, edits)
    config = adapted_config(source, work)
    overlay = {name: path for patch in patches if grows(work) for name, path in patch.assets().items()}
    target = replace(target, config=config, assets=overlay)
    sink = converter.sink(source, target)
    check_output(target.output, sink.folder, overwrite)
    placed = [sink.place(replace(origin, name=name, shape=final_shape(origin, todo))) for name, origin, todo in work]
    files = tuple(sink.layout(placed))
    check_files(target.output, files, sink.folder, overwrite)
    check_disk(target.output, sum(file.size for file in files) + DISK_SLACK_BYTES)
    fixed = 2 * sum(len(blob) for file in files for _, blob in file.blobs)
    allowed = block_budget(limits, fixed)
    steps = tuple(cut(origin, stored, tuple(todo), allowed) for (_, origin, todo), stored in zip(work, placed, strict=True))
    check_writable(steps)
    peak = max((step.peak_bytes for step in steps), default=0)
    vram = max((step.vram_bytes for step in steps), default=0)
    return Plan(
        source=source, old=old, patches=tuple(patches), sink=sink, target=target, limits=limits, steps=steps, files=files,
        patch_tensors=sum(len(patch.tensors) for patch in patches),
        peak_above_import_bytes=peak + fixed, peak_vram_bytes=VRAM_FIXED_BYTES + vram if allowed.cuda else 0,
        notes=(*notes_on(work), *sink.notes),
    )  # fmt: skip


Work = tuple[str, Weight, list[Edit]]


def collect_edits(source: Source, patches: Sequence[Patch], old: Source | None) -> dict[str, list[list[Edit]]]:
    """Edits by target weight, one list a patch. Raises UnsupportedPatch for patch tensors that no edit consumes."""
    found: dict[str, list[list[Edit]]] = {}
    for index, patch in enumerate(patches):
        consumed: set[str] = set()
        for edit in patch.edits(source, old):
            found.setdefault(edit.target, [[] for _ in patches])[index].append(edit)
            consumed.update(edit.reads)
        left = sorted(set(patch.tensors) - consumed)
        if left:
            raise UnsupportedPatch(
                f"{len(left)} of the {len(patch.tensors)} tensors in {patch.path.name} would not be merged: {', '.join(left[:8])}"
                + (" ..." if len(left) > 8 else "")
            )
    return found


def with_ties(source: Source, edits: Mapping[str, list[list[Edit]]]) -> list[Work]:
    """One entry for each output weight: name, the stored weight it starts from, its edits in the order of the patches.

    On a tied base an edit of only one of embedding and head unties them: the head becomes a weight of its own.
    """
    flat = {name: [edit for part in parts for edit in part] for name, parts in edits.items()}
    work = [(name, weight, flat.get(name, [])) for name, weight in source.weights.items()]
    if HEAD in source.weights or EMBEDDING not in source.weights:
        return work
    none: list[list[Edit]] = [[] for _ in next(iter(edits.values()), [])]
    pairs = zip(edits.get(EMBEDDING, none), edits.get(HEAD, none), strict=True)
    head = [edit for below, own in pairs for edit in head_edits(below, own)]
    if head == flat.get(EMBEDDING, []):
        return work
    embedding = source.weights[EMBEDDING]
    return [*work, (HEAD, embedding.named(HEAD), head)]


def head_edits(below: Sequence[Edit], own: Sequence[Edit]) -> Sequence[Edit]:
    """One patch's edits of a tied head, given those of the embedding and those that name the head itself.

    A patch that was trained with both tied stores the same values under both names: the embedding's serve.
    """
    shared = [edit for edit in below if edit.tied]
    return shared if shared and all(edit.tied for edit in own) else own


def final_shape(origin: Weight, edits: Sequence[Edit]) -> tuple[int, ...]:
    """The shape after all edits. Raises ShapeMismatch where two grow the vocabulary differently."""
    shapes = {edit.shape for edit in edits if edit.shape != origin.shape}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the patches grow {origin.name} to different shapes: {sorted(shapes)}")
    return shapes.pop() if shapes else origin.shape


def grows(work: Sequence[Work]) -> bool:
    """Whether a vocabulary grows."""
    return any(final_shape(origin, todo) != origin.shape for _, origin, todo in work)


def adapted_config(source: Source, work: Sequence[Work]) -> dict[str, Any]:
    """config.json as the edits make it: an untied head, a grown vocabulary."""
    adapted = dict(source.config)
    if HEAD not in source.weights and any(name == HEAD for name, _, _ in work):
        adapted["tie_word_embeddings"] = False
    rows = {final_shape(origin, todo)[0] for name, origin, todo in work if name in (EMBEDDING, HEAD)}
    if len(rows) > 1:
        raise ShapeMismatch(f"embedding and head would have {' and '.join(map(str, sorted(rows)))} rows, where both need as many")
    if rows and not grows(work) and adapted.get("vocab_size") not in (None, *rows):
        raise ShapeMismatch(f"the embedding has {rows.pop()} rows, and config.json says vocab_size {adapted['vocab_size']}")
    if grows(work) and rows:
        adapted["vocab_size"] = rows.pop()
    return adapted


def notes_on(work: Sequence[Work]) -> list[str]:
    """What the user should hear before it happens."""
    replaced = [name for name, _, todo in work if any(edit.semantics == "operator" for edit in todo)]
    if not replaced:
        return []
    return [
        f"the patch holds whole values for {', '.join(replaced[:3])}{' ...' if len(replaced) > 3 else ''}; they replace "
        "the new base's own. With --old-base their change is added instead"
    ]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Bytes that one block may take in the process and, with `cuda`, on the device; None: no bound but the default's."""

    ram: int | None = None
    vram: int | None = None
    cuda: bool = False


def block_budget(limits: Limits, fixed: int) -> Allowed:
    """What the limits leave for a block. Raises BudgetTooSmall where not even the process fits."""
    cuda = limits.device == "cuda"
    least = IMPORT_BYTES + ALLOWANCE_BYTES + fixed
    if limits.ram is not None and limits.ram <= least:
        raise BudgetTooSmall(
            f"--max-ram {in_words(limits.ram)} is too small: Python, torch and the output's header alone take {in_words(least)}"
        )
    if cuda and limits.vram is not None and limits.vram <= VRAM_FIXED_BYTES:
        raise BudgetTooSmall(
            f"--max-vram {in_words(limits.vram)} is too small: cuBLAS and torch's allocator take {in_words(VRAM_FIXED_BYTES)}"
        )
    ram = None if limits.ram is None else limits.ram - least
    return Allowed(ram, limits.vram - VRAM_FIXED_BYTES if cuda and limits.vram is not None else None, cuda)


def common_granule(origin: Weight, target: Weight) -> int:
    """Rows that neither side's format or arrangement lets apart."""
    return min(lcm(origin.row_granule, target.row_granule), target.rows) or 1


def cut(origin: Weight, target: Weight, edits: tuple[Edit, ...], allowed: Allowed) -> Step:
    """Choose the rows of a block so that it fits what is allowed. Raises BudgetTooSmall."""
    if not edits and stored_alike(origin, target):
        piece = COPY_BYTES if allowed.ram is None else min(COPY_BYTES, allowed.ram)
        return Step(origin, target, edits, target.rows, min(piece, target.nbytes))
    # every edit's factors are loaded before the first block
    held = sum(edit.held_bytes for edit in edits) + finishing_bytes(target)
    granule = common_granule(origin, target)
    least = min(-(-LEAST_ROWS // granule) * granule, target.rows) if edits else granule
    each_host, each_device = host_bytes(origin, target, edits, allowed.cuda), device_bytes(origin, target, edits)
    rows = max(BLOCK_ELEMENTS // max(target.columns, 1) // granule * granule, least)
    rows = min(rows, -(-target.rows // granule) * granule)
    bounds: list[tuple[int | None, float, str]] = [(allowed.ram, each_host, "--max-ram")]
    bounds += [(allowed.vram, each_device, "--max-vram")] * allowed.cuda
    for room, each, option in bounds:
        if room is None:
            continue
        row_bytes = each * max(target.columns, 1)
        fitting = int((room - held) // row_bytes) // granule * granule
        if fitting < least:
            with about(target.name):
                raise BudgetTooSmall(
                    f"its smallest block takes {in_words(held + least * row_bytes)}, and the budget leaves {in_words(room)} "
                    f"for a block; raise {option}"
                )
        rows = min(rows, fitting)
    elements = rows * target.columns
    vram = held + int(elements * each_device) if allowed.cuda else 0
    return Step(origin, target, edits, rows, held + int(elements * each_host), vram)


def finishing_bytes(target: Weight) -> int:
    """What the target's codec keeps of every block until the weight is done."""
    owner = codec(target.codec)
    return owner.held_bytes(target) if isinstance(owner, Finishing) else 0


def compute_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...]) -> float:
    """Bytes an element while a block is computed: the greatest of what its four stages hold at once.

        stage     stored in   base    result   stored out   temporaries
        decode        x         x                            the codec's, or one copy to turn or pad rows
        edit                    x        x                   EDIT_BYTES, the new result among them
        encode                  x        x          x        the codec's, copies to turn and shift rows
        survival                x        x          x        the decoded result, and as decode
    """
    stored_in, stored_out = (weight.nbytes / max(weight.elements, 1) for weight in (origin, target))
    decode, encode = codec(origin.codec).scratch, codec(target.codec).scratch
    grown = origin.shape != target.shape
    turned_in, turned_out = (
        FLOAT_BYTES * (bool(weight.arrangement.heads) + bool(weight.arrangement.shift)) for weight in (origin, target)
    )
    stages = [stored_in + FLOAT_BYTES + max(decode, turned_in, FLOAT_BYTES * grown)]
    # without an edit the result is the base
    matrices = FLOAT_BYTES * (2 if edits else 1)
    stages.append(matrices + stored_out + turned_out + encode)
    if edits:
        stages.append(FLOAT_BYTES * min(len(edits), 2) + EDIT_BYTES)
        stages.append(matrices + stored_out + FLOAT_BYTES + max(encode, turned_out, SURVIVAL_BYTES))
    return max(stages)


def device_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...]) -> float:
    """Bytes an element on a CUDA device: the block that is computed, the next one's upload, the last one's download."""
    return compute_bytes(origin, target, edits) + (origin.nbytes + target.nbytes) / max(target.elements, 1)


def host_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...], cuda: bool) -> float:
    """Bytes an element in the process's memory.

    With a device: what was read and its pinned copy, the pinned result, which torch rounds up to a power of two each;
    and a float32 matrix either way for a codec that works on the CPU alone.
    """
    if not cuda:
        return compute_bytes(origin, target, edits)
    stored_in, stored_out = (weight.nbytes / max(weight.elements, 1) for weight in (origin, target))
    scratch = codec(origin.codec).scratch + codec(target.codec).scratch
    return 3 * stored_in + 3 * stored_out + 2 * FLOAT_BYTES + scratch


def check_output(output: Path, folder: bool, overwrite: bool) -> None:
    """Nothing stands where the output goes, or something of ours that may be replaced. Raises OutputExists."""
    if not output.parent.is_dir():
        raise OutputExists(f"the folder {output.parent} for the output does not exist; make it first")
    if not os.access(output.parent, os.W_OK):
        raise OutputExists(f"the folder {output.parent} for the output is not writable")
    existing = next((path for path in (output, manifest_path(output, folder)) if path.exists()), None)
    if existing is None:
        return
    if not overwrite:
        raise OutputExists(f"{existing} exists already; give another -o or --overwrite")
    ours = manifest_path(output, folder).is_file() or (folder and output.is_dir() and not any(output.iterdir()))
    if not ours or (output.exists() and output.is_dir() != folder):
        what = "folder" if output.is_dir() else "file"
        raise OutputExists(f"{output} is a {what} that edgeport did not write; it is not overwritten")


def check_files(output: Path, files: Sequence[FileLayout], folder: bool, overwrite: bool) -> None:
    """No other file stands where one of a split set goes. Raises OutputExists."""
    standing = [file.name for file in files if not folder and output.with_name(file.name).exists()]
    if standing and not overwrite:
        raise OutputExists(f"{output.with_name(standing[0])} exists already; give another -o or --overwrite")


def check_writable(steps: Sequence[Step]) -> None:
    """Raises DecodeOnly where a weight would have to be written in a format that is only read or copied."""
    for step in steps:
        if not step.copied and codec(step.target.codec).formats[step.target.format] != "rw":
            with about(step.target.name):
                raise DecodeOnly(f"{step.target.format} can be read and not written; choose a type with --quant")


def manifest_path(output: Path, folder: bool) -> Path:
    """Where an output's manifest lies: inside a folder, beside a file."""
    return output / MANIFEST if folder else output.with_name(f"{output.name}.{MANIFEST}")


def check_disk(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise NotEnoughDisk(f"the output takes {in_words(needed)}, and {output.parent} has {in_words(free)} free")
