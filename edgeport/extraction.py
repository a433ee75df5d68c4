"""A patch out of a fine-tune: what it changed in its base, as a PEFT adapter, or exactly, as dense differences.

    old base, tuned --> blocks of the difference --> factors of its leading directions --> adapter_model.safetensors
                                                 '-> the rows themselves (--full) ------> difference.safetensors

A plan says from headers alone what each weight would become and take. Which weights have changed, and with --energy what
rank they need, shows only in the numbers: so tensors are appended as they come, behind room for the longest header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeport import lowrank
from edgeport.checkpoint import safetensors_bytes
from edgeport.errors import BudgetTooSmall, UnknownName, UnsupportedPatch, about
from edgeport.manifest import stamps
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES, in_words
from edgeport.pair import Both, matched
from edgeport.patches import dense
from edgeport.patches.lora import FILES
from edgeport.patches.names import PEFT_PREFIX, TURNED_MODELS, loaded
from edgeport.places import DISK_SLACK_BYTES, check_disk, check_output, through_links
from edgeport.registry import codec
from edgeport.seams import Source
from edgeport.steps import BLOCK_ELEMENTS, FLOAT_BYTES, Limits, block_budget
from edgeport.tensor import HEAD, TensorSpec, Weight
from edgeport.ties import HEADS, is_tied
from edgeport.vocabulary import other_tokens

DEFAULT_RANK = 16
LEAST_WIDTH = 64
"""Directions that the range finder looks at, where the matrix has so many: few are found better among more."""
DRAW_BYTES = 24
"""A random number that the range finder draws, with its temporaries."""
EMBEDDINGS = re.compile(r"(?!embed_out$).*embed.*|wte|wpe|shared|relative_attention_bias")
"""Own names of tables that are looked up (GPT-NeoX's embed_out is a linear head). PEFT knows their factors under other names,
and passes those of a linear layer over; a linear layer that is called so is kept whole, which is as exact."""

NO_SETTINGS = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "pad_token_id",
    "quantization_config", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
})  # fmt: skip
"""Keys of a config.json that decide nothing of what a model computes, or that headers tell better."""

LORA, WHOLE, DIFFERENCE, NONE = "lora", "whole", "difference", "none"


@dataclass(frozen=True, slots=True)
class Keep:
    """How much of a change is kept: so many directions a matrix, the fewest with that share of its square, or all of it."""

    rank: int | None = None
    energy: float | None = None
    full: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What the difference of one weight would become, if it has changed."""

    both: Both
    form: str
    rows: int
    """Of a block."""
    width: int
    """Directions that may be looked at, for factors."""
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    """Everything that headers tell. Sizes are of what would come if every weight has changed."""

    old: Source
    tuned: Source
    keep: Keep
    output: Path
    limits: Limits
    changes: tuple[Change, ...]
    room: int
    """Bytes of the longest header."""
    bytes_out: int
    overwrite: bool
    tokens: bool
    """Whether the tuned model's tokenizer has other tokens than the old base's."""
    settings: tuple[str, ...]
    """What its config.json says otherwise, of what decides what a model computes."""
    stamps: Mapping[str, Sequence[int]]
    """Of the inputs' files, from before their headers were read."""

    @property
    def bytes_in(self) -> int:
        return sum(change.both.nbytes for change in self.changes)

    @property
    def file(self) -> str:
        return dense.FILE if self.keep.full else FILES[0]

    @property
    def tied(self) -> bool:
        own = any(change.both.name in HEADS.values() for change in self.changes)
        return not own and is_tied(self.tuned.weights, self.tuned.config)

    @property
    def grown(self) -> dict[str, int]:
        return {change.both.name: change.both.old.rows for change in self.changes if change.both.grown}

    @property
    def disk_bytes(self) -> int:
        return self.bytes_out + DISK_SLACK_BYTES

    @property
    def peak_above_import_bytes(self) -> int:
        return max((change.peak_bytes for change in self.changes), default=0) + 2 * self.room

    @property
    def peak_ram_bytes(self) -> int:
        return IMPORT_BYTES + ALLOWANCE_BYTES + self.peak_above_import_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "keep": asdict(self.keep), "weights": len(self.changes), "bytes_in": self.bytes_in,
            "bytes_out_at_most": self.bytes_out, "disk_bytes": self.disk_bytes, "peak_ram_bytes": self.peak_ram_bytes,
            "peak_above_import_bytes": self.peak_above_import_bytes + ALLOWANCE_BYTES, "peak_vram_bytes": 0,
            "steps": [
                {"weight": change.both.name, "form": change.form, "shape": list(change.both.new.shape), "rows": change.rows,
                 "directions": change.width, "peak_bytes": change.peak_bytes} for change in self.changes
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of one weight. `change`: |tuned - old| / |old|, None where the old one is all zeros. `energy`: the share of
    its square that the patch holds."""

    weight: str
    form: str
    shape: tuple[int, ...]
    change: float | None = 0.0
    rank: int | None = None
    energy: float = 1.0
    squares: float = 0.0
    """Of all elements of the difference, summed."""
    grown: bool = False
    """Whether there are rows that the old one has not, which may be zeros."""

    @property
    def stored(self) -> bool:
        """Whether the patch has to say anything of it."""
        return bool(self.squares) or self.grown


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an extraction made and cost."""

    output: Path
    kind: str
    """Of the patch: "lora" or "dense"."""
    files: dict[str, int]
    bytes_in: int
    facts: tuple[Taken, ...]
    seconds: float
    peak_ram_bytes: int
    peak_above_import_bytes: int
    predicted_peak_bytes: int
    notes: tuple[str, ...]

    @property
    def changed(self) -> list[Taken]:
        return [fact for fact in self.facts if fact.stored]

    @property
    def energy(self) -> dict[str, Any]:
        """The share of all changes' square that is kept, and the weight of which least is."""
        total = sum(fact.squares for fact in self.changed)
        worst = min(self.changed, key=lambda fact: fact.energy)
        kept = sum(fact.squares * fact.energy for fact in self.changed) / total if total else 1.0
        return {"all": kept, "min": worst.energy, "worst": worst.weight}

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "patch_kind": self.kind, "files": dict(self.files), "bytes_in": self.bytes_in,
            "bytes_out": sum(self.files.values()), "weights": len(self.facts), "changed": len(self.changed),
            "whole": sum(fact.form == WHOLE for fact in self.changed), "energy": self.energy,
            "rank": sorted({fact.rank for fact in self.facts if fact.rank}), "seconds": round(self.seconds, 3),
            "peak_ram_bytes": self.peak_ram_bytes, "peak_above_import_bytes": self.peak_above_import_bytes,
            "peak_vram_bytes": 0, "predicted_peak_bytes": self.predicted_peak_bytes, "notes": list(self.notes),
        }  # fmt: skip


def keep_of(rank: int | None, energy: float | None, full: bool) -> Keep:
    """What the user wants kept. Raises UnknownName."""
    if (rank is not None) + (energy is not None) + full > 1:
        raise UnknownName("--rank, --energy and --full are three ways to say how much to keep; give one of them")
    if rank is not None and rank < 1:
        raise UnknownName(f"--rank {rank} is no rank; give a number from 1 on")
    if energy is not None and not 0 < energy <= 1:
        raise UnknownName(f"--energy {energy} is no share; give a number above 0, and at most 1")
    return Keep(rank, energy, full) if full or energy is not None else Keep(rank or DEFAULT_RANK)


def plan_extraction(
    old: Source, tuned: Source, keep: Keep, output: Path, limits: Limits, overwrite: bool = False
) -> ExtractionPlan:
    """Match, check and cut. Raises every error that headers show; creates no file."""
    stamped = stamps([*old.files, *tuned.files])
    pairs, output = matched(old, tuned), through_links(output)
    check_output(output, True, overwrite)
    if tuned.config.get("model_type") in TURNED_MODELS and not keep.full:
        raise UnsupportedPatch(f"the linear layers of {tuned.config['model_type']} are stored turned; give --full")
    if not keep.full:
        pairs = [replace(both, name=loaded(both.name, old.weights)) for both in pairs]
    forms = {both.name: form_of(both, keep) for both in pairs}
    # biases come last: what else there is of a module decides how PEFT looks for its bias
    pairs.sort(key=lambda both: ([LORA, DIFFERENCE, WHOLE, NONE].index(forms[both.name]), both.name.endswith(".bias")))
    most = specs_at_most(pairs, forms, keep)
    header, _ = safetensors_bytes({spec.name: spec for spec in most}, {"format": "pt"})
    room = block_budget(limits, 2 * len(header)).ram
    changes = tuple(cut(both, forms[both.name], keep, room) for both in pairs)
    size = len(header) + sum(spec.nbytes for spec in most)
    # what --energy will need no header tells; rarely as much as it may
    likely = specs_at_most(pairs, forms, Keep(LEAST_WIDTH)) if keep.energy else most
    check_disk(output, len(header) + sum(spec.nbytes for spec in likely) + DISK_SLACK_BYTES)
    return ExtractionPlan(
        old, tuned, keep, output, limits, changes, len(header), size, overwrite, other_tokens(old, tuned),
        settings_changed(old.config, tuned.config), stamped,
    )  # fmt: skip


def settings_changed(old: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[str, ...]:
    """What both config.jsons say, and not alike: a key that one leaves out is nearly always of another version."""
    return tuple(sorted(key for key in old.keys() & tuned.keys() - NO_SETTINGS if old[key] != tuned[key]))


def form_of(both: Both, keep: Keep) -> str:
    """How a patch holds its change. PEFT has factors for linear layers, and whole values of other modules."""
    module, _, leaf = both.name.rpartition(".")
    if keep.full:
        return DIFFERENCE
    if len(both.new.shape) == 2 and leaf == "weight" and not both.grown and not EMBEDDINGS.fullmatch(module.rpartition(".")[2]):
        return LORA
    return WHOLE if leaf in ("weight", "bias") else NONE


def specs_at_most(pairs: Sequence[Both], forms: Mapping[str, str], keep: Keep) -> list[TensorSpec]:
    """What would be stored if every weight has changed, under the longest names."""
    found: list[Weight] = []
    for both in pairs:
        name, form = both.name, forms[both.name]
        if form == LORA:
            found += factor_layout(both, min(keep.rank or both.new.rows, both.new.rows, both.new.columns))
        elif form != NONE:
            inside = f"{PEFT_PREFIX}{name.rpartition('.')[0]}.base_layer.weight"
            found.append(as_plain(both, form, inside if form == WHOLE else name))
        if form == WHOLE and name in HEADS:
            found.append(as_plain(both, form, f"{PEFT_PREFIX}{HEAD}"))
    return [part.spec for weight in found for part in weight.parts.values()]


def factor_layout(both: Both, rank: int) -> tuple[Weight, Weight]:
    """How the down and up factors of a weight are stored."""
    module, lay_out = f"{PEFT_PREFIX}{both.name.removesuffix('.weight')}", codec("plain").layout
    down = lay_out(f"{module}.lora_A.weight", (rank, both.new.columns), "F32")
    return down, lay_out(f"{module}.lora_B.weight", (both.new.rows, rank), "F32")


def as_plain(both: Both, form: str, name: str) -> Weight:
    """A matrix of the weight's shape: the tuned values in their own type where that is plain, a difference in float32."""
    plain = form == WHOLE and both.new.codec == "plain" and not both.new.arrangement.shift
    return codec("plain").layout(name, both.new.shape, both.new.format if plain else "F32")


def cut(both: Both, form: str, keep: Keep, room: int | None) -> Change:
    """Choose rows and directions that fit `room` bytes. Raises BudgetTooSmall."""
    rows, columns, granule = both.new.rows, max(both.new.columns, 1), both.granule
    stored = sum(weight.nbytes / max(weight.elements, 1) for weight in (both.old, both.new))
    turned = FLOAT_BYTES * any(weight.arrangement.heads or weight.arrangement.shift for weight in (both.old, both.new))
    each = stored + 3 * FLOAT_BYTES + max(*(codec(weight.codec).scratch for weight in (both.old, both.new)), turned)
    width = widest(keep, rows, columns) if form == LORA else 0

    def peak(block: int, width: int) -> int:
        return int(block * (each * columns + DRAW_BYTES * width)) + lowrank.held_bytes(rows, columns, width)

    block = min(max(BLOCK_ELEMENTS // columns // granule, 1) * granule, -(-rows // granule) * granule)
    if room is not None:
        least = min(width, LEAST_WIDTH)
        while width > least and keep.energy is not None and peak(granule, width) > room:
            width = max(width // 2, least)
        while block > granule and peak(block, width) > room:
            block = max(block // 2 // granule, 1) * granule
        if peak(block, width) > room:
            with about(both.name):
                raise BudgetTooSmall(
                    f"its smallest block takes {in_words(peak(block, width))}, and the budget leaves {in_words(room)}; "
                    "raise --max-ram" + ("" if keep.full else ", or take a lower --rank")
                )
    return Change(both, form, block, width, peak(block, width))


def widest(keep: Keep, rows: int, columns: int) -> int:
    """Directions to look at: for --energy, up to the rank at which factors take as much room as the matrix itself."""
    most = rows * columns // (rows + columns) if keep.rank is None else keep.rank
    return min(max(most + lowrank.OVERSAMPLING, LEAST_WIDTH), rows, columns)
