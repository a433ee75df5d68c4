"""What will happen to every weight, and what it costs: from headers alone, and every user error surfaces here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeport.adapter import Adapter, Patched, plan_residual, plan_sidecar, surveyed
from edgeport.calibration import TOKENS, may_see, rule_for, scratch_bytes, text_bytes
from edgeport.errors import (
    ConvertError,
    DecodeOnly,
    UnknownName,
    about,
)
from edgeport.manifest import stamps
from edgeport.matching import (
    OPERATOR,
    adapted_config,
    check_order,
    check_semantics,
    collect_edits,
    final_shape,
    notes_on_values,
    reshaped,
    taken,
    with_ties,
)
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES
from edgeport.pace import seconds
from edgeport.places import DISK_SLACK_BYTES, check_disk, check_files, check_handles, check_output, through_links
from edgeport.probing import PROCESS_BYTES, Probing, check_text, decide
from edgeport.registry import codec, miss, roundings
from edgeport.rounding import AUTO, UNCALIBRATED
from edgeport.seams import Cautioned, Converter, FileLayout, Patch, Sink, Source, Target
from edgeport.steps import VRAM_FIXED_BYTES, Allowed, Limits, Rule, Step, block_budget, cut, is_linear
from edgeport.tensor import Weight
from edgeport.vocabulary import tokenizer_files

if TYPE_CHECKING:
    from edgeport.promotion import Promotion

BESIDE = ("config.json", "tokenizer.json")
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
    stamps: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of every file that goes into the output's weights, as it was when the plan was made."""

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
    check_semantics(patched, method.semantics)
    check_order(source, edits, patches)
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
    check_handles(files)
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
        notes=(*notes_on_values(work), *about_tokens, *cautions(beside), *sink.notes,
               *notes_on_rounding(steps, rule, method, hindrance, probing), *notes_on_importance(steps, target, method),
               *notes_on_memory(limits, allowed)),
        probing=probing, scratch_bytes=scratch, rule=rule, adapter=adapter, overwrite=overwrite, made_on=made_on,
        stamps=stamps(inputs([source, old, *patches], method.calibration, target.imatrix)),
    )  # fmt: skip


def inputs(read: Iterable[Source | Patch | None], *texts: Path | None) -> list[Path]:
    """Every file that goes into the output's weights; of a folder also what says how a text goes through it."""
    found = [one for one in read if one]
    beside = [path for one in found for name in BESIDE if (path := one.path / name).is_file()]
    return [path for one in found for path in one.files] + beside + [path for path in texts if path]


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


def notes_on_importance(steps: Sequence[Step], target: Target, method: Method) -> list[str]:
    """Whether an importance matrix was given for nothing."""
    anew = [step for step in steps if not (step.copied or step.target.codec == "plain" or step.on_own_grid)]
    if target.imatrix is None or anew or method.residual is not None:
        return []
    return ["nothing reads --imatrix: it is for numbers that are quantized anew, and those of this output are not"]


def notes_on_memory(limits: Limits, allowed: Allowed) -> list[str]:
    """Whether a bound on a device's memory was given for nothing."""
    if limits.vram is None or allowed.cuda:
        return []
    return ["nothing reads --max-vram: the weights go through the CPU"]


def plan_adapter(sink: Sink, patched: Patched, placed: Mapping[str, Weight], method: Method) -> Adapter | None:
    """What goes beside the model. Raises UnknownName for a sidecar and a residual at once."""
    if method.sidecar and method.residual is not None:
        raise UnknownName("--sidecar keeps the patch out of the weights, and so leaves no --residual; give one of them")
    if method.sidecar:
        return plan_sidecar(sink, patched)
    return None if method.residual is None else plan_residual(sink, patched, placed, method.residual)


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
        anew = not step.on_own_grid or step.target.rows > step.origin.rows
        if not step.copied and anew and codec(step.target.codec).formats[step.target.format] != "rw":
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
