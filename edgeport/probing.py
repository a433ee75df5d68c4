"""Whether a port is probed, what that takes, and the process of its own in which it happens (see `effect`).

transformers takes more memory to import than a whole port does. So the probe runs beside the port, after it, in a process
that goes away, unless transformers is loaded already; the files are written by then and not yet in place.
"""

from __future__ import annotations

import sys
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.aside import ask, here
from edgeport.errors import (
    BudgetTooSmall,
    CorruptCheckpoint,
    EdgeportError,
    MissingExtra,
    NotACheckpoint,
    VerificationFailed,
)
from edgeport.hub import called
from edgeport.memory import IMPORT_BYTES, MIB, in_words
from edgeport.seams import Converter, Patch, Source
from edgeport.sizes import size

if TYPE_CHECKING:
    from edgeport.aside import Watch
    from edgeport.effect import Effect
    from edgeport.planning import Plan
    from edgeport.steps import Limits, Step

TOKENS, FEW_TOKENS = 256, 64
"""Tokens of text that a model runs on unless the user says otherwise; the few, where LARGE parameters make it long."""
LARGE = 1_000_000_000
WINDOW = 512
"""Tokens that see each other in a longer text, where the model was made for so many."""
PROCESS_BYTES = 480 * MIB
"""Python, torch, transformers and tokenizers with a model's code at hand (VmHWM), and a block of each of three weights."""
TEXT_BYTES = 1 << 20
"""Of a --calibration file, what is read."""
FUSED = ("gemma", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Types of models whose attention torch computes in one piece (sdpa). That leaves out Gemma 2's soft cap, and of other types
it is not known; there the scores of every token for every other are kept at once."""


@dataclass(frozen=True, slots=True)
class Job:
    """A probe as a process of its own is told it. Paths; `patches` with their scales."""

    base: str
    old: str | None
    patches: tuple[tuple[str, float], ...]
    output: str
    adapter: str | None
    """A low-rank patch beside the output, which belongs to it."""
    tokens: int
    text: str | None
    """A file in UTF-8; None: the text that comes with edgeport."""


@dataclass(frozen=True, slots=True)
class Probing:
    """What a plan says of the probe. `skipped`: why there is none."""

    tokens: int = 0
    text: Path | None = None
    peak_bytes: int = 0
    """Of the probe's own process."""
    asked: bool = False
    """Whether the user insists on it."""
    apart: bool = False
    """Whether memory is bounded, so that this process may not take what the probe takes."""
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.skipped:
            return {"skipped": self.skipped}
        text = str(self.text) if self.text else "packaged"
        return {"tokens": self.tokens, "text": text, "peak_ram_bytes": self.peak_bytes}


def decide(
    source: Source, patches: Sequence[Patch], steps: Sequence[Step], converter: Converter, limits: Limits,
    wanted: bool | None, text: Path | None, config: Mapping[str, Any],
) -> Probing:  # fmt: skip
    """Whether to probe (None: where rounding can harm a patch, and the means are there).

    Raises BudgetTooSmall, MissingExtra, NotACheckpoint, VerificationFailed where a probe is insisted on and cannot be.
    """
    tokens = TOKENS if sum(step.target.elements for step in steps) < LARGE else FEW_TOKENS
    tokens = min(tokens, size(config, "max_position_embeddings", tokens))
    need = predicted_bytes(steps, tokens, config)
    if not patches:
        return Probing(skipped="no patch")
    if wanted is False:
        return Probing(skipped="--no-probe")
    if wanted is None and not any(step.edits for step in steps):
        return Probing(skipped="the patch stays beside the model, where nothing rounds it")
    if wanted is None and all(step.target.codec == "plain" for step in steps if step.edits):
        return Probing(skipped="no patched weight is stored in a quantized format")
    hindrance = hindered(source, limits, need, "the probe")
    if hindrance is None and not converter.reads:
        hindrance = VerificationFailed(f"edgeport writes {converter.name} and does not read it back")
    if hindrance is None:
        return Probing(tokens, text, need, wanted is True, limits.ram is not None)
    if wanted:
        raise hindrance
    return Probing(skipped=str(hindrance))


def hindered(source: Source, limits: Limits, need: int, work: str) -> EdgeportError | MissingExtra | None:
    """Why no text can be run through the model in a process that takes `need` bytes, as far as headers tell."""
    absent = next((name for name in ("transformers", "tokenizers") if find_spec(name) is None), None)
    if absent:
        return MissingExtra(f"{absent} is not installed: pip install 'edgeport[hf]'")
    if limits.ram is not None and IMPORT_BYTES + need > limits.ram:
        return BudgetTooSmall(
            f"{work} takes {in_words(need)} in a process beside the port's {in_words(IMPORT_BYTES)}, and --max-ram is "
            f"{in_words(limits.ram)}"
        )
    if source.container == "hf" and not (source.path / "tokenizer.json").is_file():
        return NotACheckpoint(f"{called(source.path)} has no tokenizer.json to read a text with")
    return None


def check_text(path: Path) -> None:
    """Raises NotACheckpoint, CorruptCheckpoint."""
    if not path.is_file():
        raise NotACheckpoint(f"--calibration {path} is no file; give a text of some thousand words")
    if not read_text(path).strip():
        raise CorruptCheckpoint(f"--calibration {path.name} holds no text; give one of some thousand words")


def read_text(path: Path) -> str:
    """The first part of a file in UTF-8. Raises CorruptCheckpoint."""
    with open(path, "rb") as file:
        data = file.read(TEXT_BYTES)
    try:
        # the cut may go through the last character
        return getincrementaldecoder("utf-8-sig")().decode(data, final=len(data) < TEXT_BYTES)
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path.name} is not a text in UTF-8 ({error.reason} at byte {error.start})") from error


def predicted_bytes(steps: Sequence[Step], tokens: int, config: Mapping[str, Any]) -> int:
    """The peak of the probe's process: activations of one layer at a time, and the largest edit's factors."""
    held = max((sum(edit.held_bytes for edit in step.edits) for step in steps), default=0)
    return PROCESS_BYTES + window_bytes(tokens, config) + held


def window_length(config: Mapping[str, Any]) -> int:
    """Tokens of a window that the model can see at once."""
    return min(WINDOW, size(config, "max_position_embeddings", WINDOW))


def window_bytes(tokens: int, config: Mapping[str, Any]) -> int:
    """Activations of so many tokens that see each other, in one layer."""
    hidden = size(config, "hidden_size", 0)
    wide = size(config, "intermediate_size", 4 * hidden)
    return 4 * tokens * (8 * hidden + 4 * wide) + 4 * scores_bytes(tokens, config)


def scores_bytes(tokens: int, config: Mapping[str, Any]) -> int:
    """Of attention between so many tokens, in one layer. What torch computes in one piece has but a mask."""
    heads = 1 if config.get("model_type") in FUSED else size(config, "num_attention_heads", 1)
    return 4 * heads * tokens * tokens


def job_of(plan: Plan, staging: Path) -> Job:
    """The probe of what a run has put into `staging`."""
    first = plan.files[0].name
    adapter = str(staging / plan.adapter.name) if plan.adapter else None
    return Job(
        base=str(plan.source.path), old=str(plan.old.path) if plan.old else None,
        patches=tuple((str(patch.path), patch.scale) for patch in plan.patches),
        output=str(staging if plan.sink.folder else staging / first), adapter=adapter, tokens=plan.probing.tokens,
        text=str(plan.probing.text) if plan.probing.text else None,
    )  # fmt: skip


def carry_out(probing: Probing, job: Job, watch: Watch) -> Effect | str:
    """The effect, or why there is none.

    Raises NonFiniteResult, CorruptCheckpoint for a damaged output, VerificationFailed for a probe that was insisted on.
    """
    loaded = "transformers" in sys.modules and not probing.apart
    answer = in_this_process(job, watch) if loaded else beside(job, watch)
    if isinstance(answer, str) and probing.asked:
        raise VerificationFailed(f"the probe could not be run ({answer}); leave off --probe to write the output without it")
    return answer


def in_this_process(job: Job, watch: Watch) -> Effect | str:
    from edgeport.effect import probe

    answer: Effect | str = here(lambda: probe(job, watch))
    return answer


def beside(job: Job, watch: Watch) -> Effect | str:
    """By a process of its own."""
    from edgeport.effect import Effect

    answer = ask("edgeport.effect", asdict(job), watch)
    return answer if isinstance(answer, str) else Effect(**answer["effect"])
