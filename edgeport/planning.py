"""What will happen to every weight, and what it costs: from headers alone, and every user error surfaces here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeport.adapter import Adapter, Patched, plan_residual, plan_sidecar, surveyed
from edgeport.calibration import TOKENS, may_see, rule_for, scratch_bytes, text_bytes
from edgeport.errors import (
    ConvertError,
    DecodeOnly,
    ShapeMismatch,
    UnknownName,
    UnmappedTensor,
    UnsupportedPatch,
    about,
)
from edgeport.hub import called
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES
from edgeport.pace import seconds
from edgeport.places import DISK_SLACK_BYTES, check_disk, check_files, check_output, through_links
from edgeport.probing import PROCESS_BYTES, Probing, check_text, decide
from edgeport.registry import codec, miss, roundings
from edgeport.rounding import AUTO, UNCALIBRATED
from edgeport.seams import Cautioned, Converter, Edit, FileLayout, LowRankEdit, Partial, Patch, Sink, Source, Target
from edgeport.steps import VRAM_FIXED_BYTES, Limits, Rule, Step, block_budget, cut, is_linear
from edgeport.tensor import Weight
from edgeport.ties import INPUTS, ends, is_tied
from edgeport.vocabulary import tokenizer_files

if TYPE_CHECKING:
    from edgeport.promotion import Promotion

ASSET_BYTES = 9
"""Memory that a byte of the files beside the weights takes where they have to be made: a GGUF's tokenizer, as objects."""


@dataclass(frozen=True, slots=True)
class Method:
    """How the user wants a patch to be applied and judged."""

    rounding: str = AUTO
    seed: int = 0
    """Of the draws that rounding takes."""
    semantics: str | None = None
    """"delta": every change is added to the new base. "operator": values of the patch's own replace the base's."""
    promoted: tuple[Promotion, ...] = ()
    sidecar: bool = False
    residual: int | None = None
    """Rank of what rounding lost, kept beside the output."""
    keep_format: bool = False
    """Whether the output has to have the base's number formats; without --quant it has them where its container can."""
    probe: bool | None = None
    calibration: Path | None = None

    def to_json(self) -> dict[str, Any]:
        promoted = {one.weight: {key: value for key, value in asdict(one).items() if key != "weight"} for one in self.promoted}
        told: dict[str, Any] = {"rounding": self.rounding, "seed": self.seed, "semantics": self.semantics}
        return told | ({"promoted": promoted} if promoted else {})


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided, nothing done. Bytes are of stored data; peaks are predictions that the run keeps to."""

    source: Source
    old: Source | None
    patches: tuple[Patch, ...]
    sink: Sink
    target: Target
    limits: Limits
    method: Method
    steps: tuple[Step, ...]
    files: tuple[FileLayout, ...]
    patch_tensors: int
    peak_above_import_bytes: int
    peak_vram_bytes: int
    notes: tuple[str, ...]
    probing: Probing
    scratch_bytes: int
    """On disk while the output is made."""
    rule: Rule
    adapter: Adapter | None = None
    overwrite: bool = False
    made_on: Source | None = None
    """The old base, also where the semantics leave it out."""

    @property
    def bytes_in(self) -> int:
        return sum(step.origin.nbytes for step in self.steps)

    @property
    def bytes_out(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def disk_bytes(self) -> int:
        return self.bytes_out + self.scratch_bytes + DISK_SLACK_BYTES

    @property
    def peak_ram_bytes(self) -> int:
        return IMPORT_BYTES + ALLOWANCE_BYTES + self.peak_above_import_bytes

    @property
    def seconds(self) -> float:
        """A guess (`edgeport.pace`)."""
        return seconds(self.steps)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """Of the text that will, or may, guide the rounding: its tokens, and the memory of a process of its own; None without."""
        if not may_see(self.steps, self.rule):
            return None
        tokens = self.rule.tokens
        return {"tokens": tokens, "peak_ram_bytes": PROCESS_BYTES + text_bytes(self.source.config, tokens)}

    @property
    def patched(self) -> set[str]:
        """The weights that a patch changes, in the model or in the adapter beside it."""
        beside = {one.target for one in self.adapter.factors} if self.adapter else set()
        return beside | {step.target.name for step in self.steps if step.edits}

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.target.output),
            "files": {file.name: file.size for file in self.files},
            "weights": len(self.steps),
            "patched": len(self.patched),
            "copied": sum(step.copied for step in self.steps),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "disk_bytes": self.disk_bytes,
            "seconds": round(self.seconds, 1),
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_above_import_bytes": self.peak_above_import_bytes + ALLOWANCE_BYTES,
            "peak_vram_bytes": self.peak_vram_bytes,
            "coverage": {"tensors": self.patch_tensors, "consumed": self.patch_tensors},
            "notes": list(self.notes),
            "adapter": self.adapter.to_json() if self.adapter else None,
            "calibration": self.calibration,
            "probe": self.probing.to_json(),
            "steps": [
                {
                    "weight": step.target.name,
                    "action": step.action,
                    "shape": list(step.target.shape),
                    "from": step.origin.format,
                    "to": step.target.format,
                    "rounding": step.rounding,
                    "rows": step.rows,
                    "peak_bytes": step.peak_bytes,
                }
                for step in self.steps
            ],
        }


DEFAULT = Method()
DELTA, OPERATOR = "delta", "operator"


def make_plan(
    source: Source,
    patches: Sequence[Patch],
    converter: Converter,
    target: Target,
    limits: Limits,
    *,
    old: Source | None = None,
    overwrite: bool = False,
    method: Method = DEFAULT,
) -> Plan:
    """Match, check and cut. Raises every error that the user's input can cause; creates no file."""
    if method.rounding not in (known := [AUTO, *roundings()]):
        raise UnknownName(miss(known, method.rounding, "rounding"))
    if method.calibration is not None:
        check_text(method.calibration)
    made_on, old = old, None if method.semantics == OPERATOR else old
    edits = collect_edits(source, patches, old)
    patched = with_ties(source, edits)
    check_semantics(patched, method)
    check_order(edits, patches)
    work = with_ties(source, {}) if method.sidecar else patched
    config = adapted_config(source, work)
    overlay, about_tokens = tokenizer_files(source, patches, {} if method.sidecar else edits)
    target = replace(target, config=config, assets=overlay)
    sink = converter.sink(source, target)
    made = 0
    if sink.folder:
        made = made_assets(source)
        target = replace(target, output=through_links(target.output))
    check_output(target.output, sink.folder, overwrite)
    work = taken(work, sink)
    placed = [sink.place(reshaped(origin, final_shape(origin, todo))) for _, origin, todo in work]
    files = tuple(sink.layout(placed))
    beside = {name: (origin, todo) for name, origin, todo in patched if todo}
    adapter = plan_adapter(sink, beside, {weight.name: weight for weight in placed}, method)
    files += adapter.files if adapter else ()
    check_files(target.output, files, sink.folder, overwrite)
    fixed = 2 * sum(len(blob) for file in files for _, blob in file.blobs)
    block_budget(limits, ASSET_BYTES * made)  # which are made before the blocks, and after
    allowed = block_budget(limits, fixed)
    pairs = zip(work, placed, strict=True)
    rule, hindrance = rule_for(method.rounding, method.seed, method.calibration is not None, source, limits)
    steps = tuple(cut(origin, stored, todo, allowed, rule) for (_, origin, todo), stored in pairs)
    check_writable(steps)
    if method.keep_format:
        check_kept(steps)
    adapter = adapter and surveyed(adapter, beside, {weight.name: weight for weight in placed}, allowed)
    scratch = scratch_bytes(steps, rule)
    check_disk(target.output, sum(file.size for file in files) + scratch + DISK_SLACK_BYTES)
    probing = decide(source, patches, steps, converter, limits, method.probe, method.calibration, config)
    peak = max([ASSET_BYTES * made] + [step.peak_bytes for step in steps] + ([adapter.peak_bytes] if adapter else []))
    vram = max((step.vram_bytes for step in steps), default=0)
    return Plan(
        source=source, old=old, patches=tuple(patches), sink=sink, target=target, limits=limits, method=method,
        steps=steps, files=files, patch_tensors=sum(len(patch.tensors) for patch in patches),
        peak_above_import_bytes=peak + fixed, peak_vram_bytes=VRAM_FIXED_BYTES + vram if allowed.cuda else 0,
        notes=(*notes_on(work), *about_tokens, *cautions(beside), *sink.notes,
               *notes_on_rounding(steps, rule, method, hindrance, probing)),
        probing=probing, scratch_bytes=scratch, rule=rule, adapter=adapter, overwrite=overwrite, made_on=made_on,
    )  # fmt: skip


def notes_on_rounding(
    steps: Sequence[Step], rule: Rule, method: Method, hindrance: str | None, probing: Probing
) -> list[str]:
    """Why weights are rounded without a text, or with less of one than there is."""
    asked = method.calibration is not None and method.rounding == AUTO
    lossy = [step for step in steps if is_linear(step.target) and not step.copied and step.target.codec != "plain"]
    if hindrance and any(asked or step.rounding == UNCALIBRATED for step in lossy):
        return [f"no text is run through the model to guide the rounding: {hindrance}"]
    if rule.tokens < TOKENS and may_see(steps, rule):
        return [f"--max-ram has room for {rule.tokens} of {TOKENS} tokens of the text that guides the rounding"]
    if method.calibration is not None and not may_see(steps, rule) and probing.skipped:
        return ["nothing reads --calibration: no weight is rounded by a text, and there is no probe"]
    return []


Work = tuple[str, Weight, tuple[Edit, ...]]


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
                f"{len(left)} of the {len(patch.tensors)} tensors in {called(patch.path)} would not be merged: "
                f"{', '.join(left[:8])}{' ...' if len(left) > 8 else ''}"
            )
    return found


def with_ties(source: Source, edits: Mapping[str, list[list[Edit]]]) -> list[Work]:
    """One entry for each output weight: name, the stored weight it starts from, its edits in the order of the patches.

    On a tied base an edit of only one of embedding and head unties them: the head becomes a weight of its own. Where a
    tied base stores its head all the same, it gets what the embedding gets, unless the patch says another.
    """
    flat = {name: tuple(edit for part in parts for edit in part) for name, parts in edits.items()}
    work = [(name, weight, flat.get(name, ())) for name, weight in source.weights.items()]
    model, tied = ends(source.weights), is_tied(source.weights, source.config)
    if model is None:
        if tied:
            check_together(source, flat)
        return work
    stored = model.head in source.weights
    if not tied and (stored or model.head not in edits):
        return work
    none: list[list[Edit]] = [[] for _ in next(iter(edits.values()), [])]
    pairs = zip(edits.get(model.embedding, none), edits.get(model.head, none), strict=True)
    head = tuple(edit for below, own in pairs for edit in head_edits(below, own))
    if stored:
        return [(name, weight, head if name == model.head else todo) for name, weight, todo in work]
    if head == flat.get(model.embedding, ()):
        return work
    embedding = source.weights[model.embedding]
    return [*work, (model.head, embedding.named(model.head), head)]


def check_together(source: Source, edits: Mapping[str, Sequence[Edit]]) -> None:
    """Raises UnsupportedPatch where an embedding changes whose tied head has to stay, and cannot be stored."""
    alone = [name for name, todo in edits.items() if INPUTS.fullmatch(name) and not all(edit.tied for edit in todo)]
    if alone:
        raise UnsupportedPatch(
            f"the patch changes {alone[0]} and not the head that {called(source.path)} ties to it, and edgeport cannot store a "
            f"head for a model of type {source.config.get('model_type')}; train both together (PEFT's ensure_weight_tying)"
        )


def head_edits(below: Sequence[Edit], own: Sequence[Edit]) -> Sequence[Edit]:
    """One patch's edits of a tied head, given those of the embedding and those that name the head itself.

    A patch that was trained with both tied stores the same values under both names: the embedding's serve. What it adds to
    the head alone goes on top of what both share (PEFT's factors of a head over its trained rows).
    """
    shared = [edit for edit in below if edit.tied]
    if shared and all(edit.tied for edit in own):
        return shared
    return [*shared, *own] if all(isinstance(edit, LowRankEdit) for edit in own) else own


def taken(work: list[Work], sink: Sink) -> list[Work]:
    """What has a place in the output. Raises UnmappedTensor where a patch changes what has none."""
    if not isinstance(sink, Partial):
        return work
    lost = [name for name, _, todo in work if todo and not sink.takes(name)]
    if lost:
        raise UnmappedTensor(
            f"the patch changes {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}, which the output does not compute with"
        )
    return [entry for entry in work if sink.takes(entry[0])]


def final_shape(origin: Weight, edits: Sequence[Edit]) -> tuple[int, ...]:
    """The shape after all edits. Raises ShapeMismatch where two grow the vocabulary differently."""
    shapes = {edit.shape for edit in edits if edit.shape != origin.shape}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the patches grow {origin.name} to different shapes: {sorted(shapes)}")
    return shapes.pop() if shapes else origin.shape


def reshaped(origin: Weight, shape: tuple[int, ...]) -> Weight:
    return origin if shape == origin.shape else replace(origin, shape=shape)


def plan_adapter(sink: Sink, patched: Patched, placed: Mapping[str, Weight], method: Method) -> Adapter | None:
    """What goes beside the model. Raises UnknownName for a sidecar and a residual at once."""
    if method.sidecar and method.residual is not None:
        raise UnknownName("--sidecar keeps the patch out of the weights, and so leaves no --residual; give one of them")
    if method.sidecar:
        return plan_sidecar(sink, patched)
    return None if method.residual is None else plan_residual(sink, patched, placed, method.residual)


def check_semantics(work: Sequence[Work], method: Method) -> None:
    """Raises UnknownName; UnsupportedPatch where a change cannot be told from the value that stands for it."""
    if method.semantics not in (None, DELTA, OPERATOR):
        raise UnknownName(miss([DELTA, OPERATOR], method.semantics, "--semantics"))
    whole = [name for name, _, todo in work if any(edit.semantics == OPERATOR for edit in todo)]
    if method.semantics == DELTA and whole:
        raise UnsupportedPatch(
            f"the patch holds whole values for {', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}, whose change shows only "
            "beside the base that it was made on; give it as --old-base, or leave off --semantics delta"
        )


def check_order(edits: Mapping[str, list[list[Edit]]], patches: Sequence[Patch]) -> None:
    """Raises UnsupportedPatch where a patch's whole values would take the place of what another has done before."""
    for name, parts in edits.items():
        for index, part in enumerate(parts):
            if any(parts[:index]) and any(edit.semantics == OPERATOR for edit in part):
                raise UnsupportedPatch(
                    f"{called(patches[index].path)} holds whole values for {name}, which would undo what an earlier patch does; "
                    "give --old-base, beside which they are changes, or that patch first"
                )


def grows(work: Sequence[Work]) -> bool:
    """Whether a vocabulary grows."""
    return any(final_shape(origin, todo) != origin.shape for _, origin, todo in work)


def adapted_config(source: Source, work: Sequence[Work]) -> dict[str, Any]:
    """config.json as the edits make it: an untied head, a grown vocabulary."""
    todo = {name: edits for name, _, edits in work}
    changes: dict[str, Any] = {}
    model = ends(todo)
    if model and is_tied(source.weights, source.config) and todo.get(model.head, todo[model.embedding]) != todo[model.embedding]:
        changes["tie_word_embeddings"] = False
    rows = {final_shape(origin, todo)[0] for name, origin, todo in work if model and name in (model.embedding, model.head)}
    if len(rows) > 1:
        raise ShapeMismatch(
            f"embedding and head would have {' and '.join(map(str, sorted(rows)))} rows, where both need as many; if the patch "
            "has its new tokens in only one of them, give a new base that has them in both"
        )
    text = source.config.get("text_config")
    told = (text if isinstance(text, dict) else source.config).get("vocab_size")
    if rows and not grows(work) and told not in (None, *rows):
        raise ShapeMismatch(f"the embedding has {rows.pop()} rows, and config.json says vocab_size {told}")
    if grows(work) and rows:
        changes["vocab_size"] = rows.pop()
    if not changes or not isinstance(text, dict):
        return {**source.config, **changes}
    # of models with a text_config transformers 4 and 5 read the first word in different places
    outer = {key: value for key, value in changes.items() if key in source.config or key == "tie_word_embeddings"}
    return {**source.config, **outer, "text_config": {**text, **changes}}


def notes_on(work: Sequence[Work]) -> list[str]:
    """What the user should hear before it happens."""
    replaced = [name for name, _, todo in work if any(edit.semantics == "operator" for edit in todo)]
    if not replaced:
        return []
    return [
        f"the patch holds whole values for {', '.join(replaced[:3])}{' ...' if len(replaced) > 3 else ''}; they replace "
        "the new base's own. With --old-base their change is added instead"
    ]


def cautions(patched: Patched) -> list[str]:
    """What the formats of patched weights do not tell by themselves."""
    owners = [codec(name) for name in dict.fromkeys(origin.codec for origin, _ in patched.values())]
    return [owner.caution for owner in owners if isinstance(owner, Cautioned)]


def check_writable(steps: Sequence[Step]) -> None:
    """Raises DecodeOnly where a weight would have to be read, or written, in a format that cannot."""
    for step in steps:
        if not step.copied and not codec(step.origin.codec).formats[step.origin.format]:
            with about(step.origin.name):
                raise DecodeOnly(f"{step.origin.format} can be copied and not computed with; give the model in another precision")
        if not step.copied and not step.on_own_grid and codec(step.target.codec).formats[step.target.format] != "rw":
            with about(step.target.name):
                raise DecodeOnly(f"{step.target.format} can be read and not written; choose a type with --quant")


def made_assets(source: Source) -> int:
    """Bytes of the files that go with the weights and have to be made. Raises ConvertError where the tokenizer cannot be told."""
    with TemporaryDirectory() as staging:
        return sum(path.stat().st_size for path in source.assets(Path(staging)).values() if path.is_relative_to(staging))


def check_kept(steps: Sequence[Step]) -> None:
    """Raises ConvertError where a matrix, or quantized numbers, would change their format."""
    changed = [step for step in steps if step.target.format != step.origin.format and len(step.target.shape) > 1]
    if changed:
        first = changed[0]
        raise ConvertError(
            f"--keep-format: {first.target.name} is {first.origin.format} in the base and would be {first.target.format}; "
            "write the base's own container, or leave off --keep-format"
        )
