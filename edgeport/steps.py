"""One weight's way from source to sink, cut into blocks of rows that fit the memory that is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import cast

from edgeport.errors import BudgetTooSmall, about
from edgeport.grid import Gridded
from edgeport.memory import ALLOWANCE_BYTES, IMPORT_BYTES, MIB, in_words
from edgeport.registry import codec, roundings
from edgeport.rounding import AUTO, NEAREST, UNCALIBRATED
from edgeport.seams import Edit, Finishing, LowRankEdit
from edgeport.tensor import Weight
from edgeport.ties import HEADS

BLOCK_ELEMENTS = 1 << 20
"""Elements a block has when memory does not ask for fewer: large enough to keep the cores busy, small enough for caches."""
FLOAT_BYTES = 4
EDIT_BYTES = 16
"""Bytes an element that one edit takes beside the block it is given: at most four float32 matrices, as a value that is
replaced by its difference to the old base does (LoRA: delta, scaled delta, result)."""
GRID_BYTES = 2.5
"""Bytes an element of a grid: codes as stored and as chosen, scales and offsets of groups of 16 or more."""
SURVIVAL_BYTES = 2
"""Bytes an element that `run.Survival` takes: three float32 matrices of an eighth of the block's rows."""
LEAST_ROWS = 32
"""Rows of an edited block, if the weight has so many: below 12 a matrix product rounds otherwise than the whole one does
(MKL and torch 2.13, any rank and width), and equal blocks of at most 32 rows have 16 or more."""
VRAM_FIXED_BYTES = 64 * MIB
"""Device memory beside the blocks: cuBLAS's workspace (32 MiB on Hopper, 8 before), torch's unfilled 20 MiB segments."""
COPY_BYTES = 8 * MIB


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
    rounding: str = NEAREST
    seed: int = 0
    fresh: bool = False
    """Whether a rule's grid is made of the edited values, in place of the one that the base lies on."""

    @property
    def draws(self) -> str:
        """What the draws of the rule depend on, besides the place in the weight."""
        return f"{self.seed} {self.target.name}" if self.seed else self.target.name

    @property
    def granule(self) -> int:
        return common_granule(self.origin, self.target)

    @property
    def chooses_codes(self) -> bool:
        """Whether the rule chooses codes on a grid that is there, also to nearest where scales cannot be made anew."""
        return self.rounding != NEAREST or codec(self.target.codec).formats[self.target.format] == "rp"

    @property
    def on_own_grid(self) -> bool:
        """Whether the stored bytes of the base spell the grid."""
        return self.chooses_codes and not self.fresh and begins_alike(self.origin, self.target)

    @property
    def without_inputs(self) -> Step:
        """The same where the layer's inputs turn out not to be at hand."""
        return replace(self, rounding=NEAREST if self.fresh else UNCALIBRATED, fresh=False)

    @property
    def copied(self) -> bool:
        return not self.edits and stored_alike(self.origin, self.target)

    @property
    def action(self) -> str:
        return "copy" if self.copied else "patch" if self.edits else "recode"


def stored_alike(origin: Weight, target: Weight) -> bool:
    """Whether the target's bytes are the origin's."""
    return (origin.codec, origin.format, origin.parameters, origin.arrangement, origin.shape, origin.nbytes) == (
        target.codec, target.format, target.parameters, target.arrangement, target.shape, target.nbytes,
    )  # fmt: skip


def begins_alike(origin: Weight, target: Weight) -> bool:
    """Whether the target's bytes are the origin's, but for rows that it has more: of new tokens, each with bytes of its own."""
    if origin.rows == target.rows:
        return stored_alike(origin, target)
    grown = replace(origin, shape=target.shape, parts=target.parts)
    apart = target.row_granule == 1 and all(part.stride for part in target.parts.values())
    return origin.rows < target.rows and apart and stored_alike(grown, target)


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
            f"--max-ram {in_words(limits.ram)} is too small: Python, torch, its header and tokenizer alone take "
            f"{in_words(least)}"
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


@dataclass(frozen=True, slots=True)
class Rule:
    """The rounding that the user wants, and what there is for it."""

    wanted: str = AUTO
    automatic: str = UNCALIBRATED
    """What auto takes on a grid."""
    tokens: int = 0
    """Of the text that calibrated rules see."""
    seed: int = 0
    everywhere: bool = False
    """Whether automatic is a calibrated rule and takes also numbers that lie on no grid, with or without a patch."""

    @property
    def without_inputs(self) -> Rule:
        """The same where no layer's inputs are at hand."""
        calibrated = self.wanted not in (AUTO, NEAREST) and roundings()[self.wanted].calibrated
        return replace(self, wanted=UNCALIBRATED if calibrated else self.wanted, automatic=UNCALIBRATED, everywhere=False)

    def on_grid(self, weight: Weight) -> str:
        """What auto takes for one weight on a grid."""
        return fitting(self.automatic, weight)

    def off_grid(self, weight: Weight) -> str:
        """The same for one that lies on none."""
        return self.automatic if self.everywhere and is_linear(weight) else NEAREST


def fitting(rule: str, weight: Weight) -> str:
    """The rule, or the one that takes its place where there are no inputs to see."""
    return UNCALIBRATED if roundings()[rule].calibrated and not is_linear(weight) else rule


def is_linear(weight: Weight) -> bool:
    """Whether the weight is multiplied by what its layer is given, and not a table or a vector."""
    return len(weight.shape) == 2 and weight.name not in HEADS


def rounding_of(origin: Weight, target: Weight, edits: tuple[Edit, ...], rule: Rule) -> str:
    """The rule for one weight. Nearest where the format has no grid, and where nothing pulls the values off it.

    `auto`: a base in the output's own format lies on its grid, where nearest would erase the patch; numbers of another
    format may, if they were quantized before, and the run tries some. It does so with all that loses bits, patched or not,
    where the rule also takes what lies on no grid.
    """
    owner, kept = codec(target.codec), begins_alike(origin, target)
    if not isinstance(owner, Gridded) or target.format not in owner.grids or (origin.shape != target.shape and not kept):
        return NEAREST
    if not kept and rule.off_grid(target) != NEAREST:
        return AUTO
    if not edits:
        return NEAREST
    if rule.wanted != AUTO:
        return fitting(rule.wanted, target)
    return rule.on_grid(target) if kept else AUTO


ROUND_TO_NEAREST = Rule(NEAREST)


def cut(
    origin: Weight, target: Weight, edits: tuple[Edit, ...], allowed: Allowed, rule: Rule = ROUND_TO_NEAREST
) -> Step:
    """Choose the rows of a block so that it fits what is allowed. Raises BudgetTooSmall."""
    if not edits and stored_alike(origin, target):
        piece = COPY_BYTES if allowed.ram is None else min(COPY_BYTES, allowed.ram)
        return Step(origin, target, edits, target.rows, min(piece, target.nbytes))
    # every edit's factors are loaded before the first block
    chosen = rounding_of(origin, target, edits, rule)
    possible = rule.on_grid(target) if chosen == AUTO else chosen
    held = sum(edit.held_bytes for edit in edits) + finishing_bytes(target)
    rows_seen = rule.tokens + directions_of(edits)
    held += input_bytes(target, edits, possible, rows_seen)
    granule = common_granule(origin, target)
    least = min(-(-LEAST_ROWS // granule) * granule, target.rows) if edits else granule
    rounding = rounding_bytes(origin, target, possible, rows_seen)
    each_host, each_device = (
        each(origin, target, edits, rounding) for each in (host_bytes if allowed.cuda else compute_bytes, device_bytes)
    )
    rows = max(BLOCK_ELEMENTS // target.columns // granule * granule, least) if target.columns else target.rows
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
    return Step(origin, target, edits, rows, held + int(elements * each_host), vram, chosen, rule.seed)


def finishing_bytes(target: Weight) -> int:
    """What the target's codec keeps of every block until the weight is done."""
    owner = codec(target.codec)
    return owner.held_bytes(target) if isinstance(owner, Finishing) else 0


def directions_of(edits: Sequence[Edit]) -> int:
    """That the patches read, beside a text's tokens."""
    return sum(edit.rank for edit in edits if isinstance(edit, LowRankEdit))


def input_bytes(target: Weight, edits: Sequence[Edit], rounding: str, rows: int) -> int:
    """Where the rule sees the layer's inputs: these and the directions that the patch reads, in bfloat16; the latter's
    factors in float32, made orthogonal; and what the rule makes of all `rows`."""
    if rounding == NEAREST or not (rule := roundings()[rounding]).calibrated:
        return 0
    return (2 * rows + 3 * FLOAT_BYTES * directions_of(edits)) * target.columns + rule.held(target.columns, rows)


def rounding_bytes(origin: Weight, target: Weight, rounding: str, rows: int) -> float:
    """Bytes an element while codes are chosen on a grid, beside both matrices: the bytes in, the grid, codes in and out."""
    if rounding == NEAREST:
        return 0.0
    chosen = roundings()[rounding]
    scratch = cast(Gridded, codec(target.codec)).grid_scratch + chosen.scratch(target.columns, rows) / chosen.pieces
    return (origin.nbytes + target.nbytes) / max(target.elements, 1) + GRID_BYTES + scratch


def compute_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...], rounding: float = 0.0) -> float:
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
    if rounding:
        stages.append(matrices + turned_out + rounding)
    return max(stages)


def device_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...], rounding: float = 0.0) -> float:
    """Bytes an element on a CUDA device: the block that is computed, the next one's upload, the last one's download."""
    return compute_bytes(origin, target, edits, rounding) + (origin.nbytes + target.nbytes) / max(target.elements, 1)


def host_bytes(origin: Weight, target: Weight, edits: tuple[Edit, ...], rounding: float = 0.0) -> float:
    """Bytes an element in the process's memory beside a device: what was read and its pinned copy, the pinned result,
    which torch rounds up to a power of two each; and a float32 matrix either way for a codec that works on the CPU alone.
    """
    stored_in, stored_out = (weight.nbytes / max(weight.elements, 1) for weight in (origin, target))
    scratch = codec(origin.codec).scratch + codec(target.codec).scratch
    return 3 * stored_in + 3 * stored_out + 2 * FLOAT_BYTES + scratch
