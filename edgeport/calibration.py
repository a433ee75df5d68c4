"""Whether a port's rounding sees what the layers are given on a text, and how it gets at that (see `activations`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from tempfile import mkstemp
from typing import TYPE_CHECKING, Any

from edgeport.aside import converse, within
from edgeport.errors import BrokenOff, VerificationFailed
from edgeport.memory import IMPORT_BYTES, MIB
from edgeport.probing import PROCESS_BYTES, Job, hindered, scores_bytes, window_bytes, window_length
from edgeport.registry import roundings
from edgeport.rounding import AUTO, NEAREST, ON_GRID, UNCALIBRATED, Inputs
from edgeport.scratch import NUMBER_BYTES, Place, read, read_drift
from edgeport.seams import LowRankEdit, Source
from edgeport.sizes import size
from edgeport.steps import Limits, Rule, Step

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.aside import Watch
    from edgeport.journal import Journal
    from edgeport.planning import Plan
    from edgeport.staging import Written

TOKENS = 3072
PROBED = 512
"""Tokens from the start of a text that calibration leaves alone, so that a probe on them is not flattered."""
COLUMNS = 64
EMPHASIS = 6.0
"""Strength of a direction that a patch reads, relative to an average direction of the text."""
ACTIVATION_BYTES = 256 * MIB
"""Of windows that go through the model at once: for each lot of them all weights are decoded."""
LITTLE = 48 * MIB
"""Activations that a process in which transformers is loaded may take itself, so that a port's memory remains its own."""


def rule_for(wanted: str, seed: int, text: bool, source: Source, limits: Limits) -> tuple[Rule, str | None]:
    """The rounding rule with what there is for it, and why `auto` does without a text where it must.

    `text`: whether the user has given one, which then serves all weights that lose bits. Raises MissingExtra,
    BudgetTooSmall, NotACheckpoint where a calibrated rule is asked for and cannot be.
    """
    tokens = affordable(source.config, limits)
    hindrance = hindered(source, limits, PROCESS_BYTES + text_bytes(source.config, tokens), "running a text through the model")
    insisted = wanted not in (AUTO, NEAREST) and roundings()[wanted].calibrated
    if not hindrance:
        return Rule(wanted, ON_GRID, tokens, seed, insisted or (text and wanted == AUTO)), None
    if insisted:
        raise hindrance
    return Rule(wanted, UNCALIBRATED, tokens, seed), str(hindrance)


def affordable(config: Mapping[str, Any], limits: Limits) -> int:
    """Tokens of text: TOKENS, or as many windows as --max-ram has room for, or one."""
    if limits.ram is None:
        return TOKENS
    length, room = window_length(config), limits.ram - IMPORT_BYTES - PROCESS_BYTES
    windows = (TOKENS, *range(TOKENS // length * length, 0, -length))
    return next((tokens for tokens in windows if text_bytes(config, tokens) <= room), length)


def windows_at_once(config: Mapping[str, Any]) -> int:
    """How many windows of the text go through the model together. Not for --max-ram to change: it shows in the last bits."""
    length = window_length(config)
    return int(max(min(ACTIVATION_BYTES // max(window_bytes(length, config), 1), TOKENS // length), 1))


def text_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Activations at their highest: of the windows that run, and what the others hold while they wait in a layer.

    That is at most what a layer was given and makes of it, and either the scores of attention or the wide inputs.
    """
    hidden = size(config, "hidden_size", 0)
    wide = size(config, "intermediate_size", 4 * hidden)
    length = window_length(config)
    windows = max(tokens // length, 1)
    waiting = max(8 * tokens * wide, windows * scores_bytes(length, config))
    return min(windows_at_once(config), windows) * window_bytes(length, config) + 16 * tokens * hidden + waiting


def scratch_bytes(steps: Sequence[Step], rule: Rule) -> int:
    """Of the file without a name that holds the inputs of all layers whose rounding will, or may, ask for them."""
    sizes = [NUMBER_BYTES * rule.tokens * step.target.columns for step in may_see(steps, rule)]
    # of all layers the exact port's, and of one the port's that is being made, and how they differ
    return sum(sizes) + 2 * max(sizes, default=0)


def may_see(steps: Sequence[Step], rule: Rule) -> list[Step]:
    """The steps whose rounding will see their layers' inputs, or may, once it is settled."""
    chosen = (replace(step, rounding=rule.on_grid(step.target)) if step.rounding == AUTO else step for step in steps)
    return [step for step in chosen if sees_inputs(step)]


def sees_inputs(step: Step) -> bool:
    """Whether the step's rule, once it is settled, wants its layer's inputs."""
    return step.rounding != NEAREST and roundings()[step.rounding].calibrated


class Activations:
    """The layers' inputs, on disk as long as the context lasts."""

    def __init__(self, plan: Plan, watch: Watch) -> None:
        self.plan, self.watch = plan, watch
        self.handle: int | None = None
        self.answers: Generator[dict[str, Any] | str] | None = None
        self.peak_bytes = 0
        """Of the process that has run the text, or the largest of those that have."""
        self.tokens = 0
        """That were run."""
        self.unread = False
        """Whether the user's text ended before any of those."""
        self.unable: str | None = None
        """Why there are none, once that is known."""

    def through(
        self, steps: Sequence[Step], written: Callable[[], Written], journal: Journal, device: str
    ) -> Iterator[tuple[Step, Inputs | None]]:
        """Every step, in the order in which they are to be taken, with its layer's inputs if its rule wants to see them.

        A step is to be carried out before the next is asked for, since the text goes on through what is `written`; those
        the `journal` has as done are so already, and where they went without the text the others do. Raises
        VerificationFailed where the user insists on a calibrated rule, BrokenOff, CorruptCheckpoint, NonFiniteResult.
        """
        self.restore(journal.text)
        waiting = {step.target.name: step for step in steps if sees_inputs(step) and step.target.name not in journal.done}
        for step in steps:
            if step.target.name not in waiting:
                yield step, None
        if waiting and not self.unable:
            for weight, place in self.heard(steps, list(waiting), written):
                step = waiting.pop(weight)
                yield step, self.inputs(step, place, device)
        for step in waiting.values():
            yield step, None

    def heard(
        self, steps: Sequence[Step], weights: Sequence[str], written: Callable[[], Written]
    ) -> Iterator[tuple[str, Place]]:
        """Each of the weights that a text comes to, and where its layer's inputs are."""
        from edgeport.activations import Course, calibrate

        plan = self.plan
        self.handle, name = mkstemp(dir=plan.target.output.parent)
        os.unlink(name)  # so that nothing is left of it whatever happens
        # an adapter beside the model takes back each weight's errors, also those that would make up for others'
        stored = {step.target.name: step.target for step in steps if not step.copied and not plan.adapter}
        course = Course(job_of(plan), weights, stored, written(), self.handle, windows_at_once(plan.source.config))
        little = text_bytes(plan.source.config, plan.rule.tokens) <= LITTLE
        if at_hand(plan.source.config) and plan.limits.ram is None and little:
            self.answers = within(calibrate(course, self.watch))
        else:
            self.answers = converse("edgeport.activations", course.packed(), self.watch, (self.handle,))
        for answer in self.answers:
            if isinstance(answer, str):
                if self.peak_bytes:  # others have seen theirs, here or before an interruption
                    without = f"give --rounding {UNCALIBRATED}" if plan.patches else "leave off --calibration"
                    raise BrokenOff(
                        f"the text that guides the rounding broke off on its way ({answer}), and the weights after it would be "
                        f"rounded otherwise; start again (a run with --resume goes on from here), or {without}"
                    )
                self.unable = answer
                wanted = plan.method.rounding
                if wanted != AUTO:
                    raise VerificationFailed(
                        f"--rounding {wanted} cannot see what the layers are given ({answer}); use --rounding {UNCALIBRATED}"
                    )
                return
            self.peak_bytes = max(self.peak_bytes, answer["peak_ram_bytes"])
            self.tokens, self.unread = answer["tokens"], answer["unread"]
            yield answer["weight"], Place(*answer["place"])

    def inputs(self, step: Step, place: Place, device: str) -> Inputs:
        """What the step's layer is given, and its patch reads."""
        import torch

        assert self.handle is not None
        columns = step.target.columns
        directions = [torch.linalg.qr(edit.factors()[1].T).Q.T for edit in step.edits if isinstance(edit, LowRankEdit)]
        rows = torch.empty(place.tokens + sum(map(len, directions)), columns, dtype=torch.bfloat16)
        read(rows[: place.tokens], self.handle, place.inputs)
        square = mean_square(rows[: place.tokens])
        # a text that is not about the patch's task says little of what the patch reads, and errors there are what the
        # patch would feel first
        if directions:
            rows[place.tokens :] = torch.cat(directions).mul_(EMPHASIS * sqrt(square * place.tokens))
        handle = self.handle
        return Inputs(rows.to(device), square, lambda some: read_drift(handle, place, columns, some).to(device))

    @property
    def state(self) -> dict[str, Any]:
        """For the journal: what has become of the text by now."""
        return {"peak_ram_bytes": self.peak_bytes, "tokens": self.tokens, "unread": self.unread, "unable": self.unable}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what a journal says; an empty one is of a run that has not come to the text."""
        if state:
            self.peak_bytes, self.tokens = state["peak_ram_bytes"], state["tokens"]
            self.unread, self.unable = state["unread"], state["unable"]

    @property
    def notes(self) -> list[str]:
        """What became of the text, where that is not what the user would expect."""
        if self.unable:
            return [f"no text was run through the model to guide the rounding: {self.unable}"]
        if self.unread:
            return [f"--calibration guides no rounding: its first {PROBED} tokens are left to the probe, and it has no more"]
        return []

    def to_json(self) -> dict[str, Any] | None:
        return {"tokens": self.tokens, "peak_ram_bytes": self.peak_bytes} if self.peak_bytes else None

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        if self.answers is not None:
            self.answers.close()
        if self.handle is not None:
            os.close(self.handle)


def at_hand(config: Mapping[str, Any]) -> bool:
    """Whether a text runs in this process without another import, whose memory would be counted as the port's."""
    kind = config.get("model_type")
    return sys.modules.keys() >= {"tokenizers", "transformers.modeling_utils", f"transformers.models.{kind}.modeling_{kind}"}


def mean_square(inputs: Tensor) -> float:
    """Over all tokens and columns, in float32 a few columns at a time."""
    pieces = (inputs[:, start : start + COLUMNS] for start in range(0, inputs.shape[1], COLUMNS))
    return sum(piece.float().square().sum().item() for piece in pieces) / max(inputs.numel(), 1)


def job_of(plan: Plan) -> Job:
    """The exact port, and the text to run through it."""
    return Job(
        base=str(plan.source.path), old=str(plan.old.path) if plan.old else None,
        patches=tuple((str(patch.path), patch.scale) for patch in plan.patches), output="", adapter=None,
        tokens=plan.rule.tokens, text=str(plan.method.calibration) if plan.method.calibration else None,
    )  # fmt: skip
