"""Whether a port's rounding sees what the layers are given on a text, and how it gets at that (see `activations`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import sqrt
from tempfile import mkstemp
from typing import TYPE_CHECKING, Any

from edgeport.aside import ask, here
from edgeport.checkpoint import fill
from edgeport.errors import VerificationFailed
from edgeport.probing import WINDOW, Job, hindered, predicted_bytes
from edgeport.registry import roundings
from edgeport.rounding import AUTO, NEAREST, ON_GRID, UNCALIBRATED, Inputs
from edgeport.seams import LowRankEdit, Source
from edgeport.steps import Limits, Rule, Step

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.aside import Watch
    from edgeport.planning import Plan

TOKENS = 3072
COLUMNS = 64
EMPHASIS = 4.0
"""Strength of a direction that a patch reads, relative to an average direction of the text."""
BFLOAT16_BYTES = 2


def rule_for(wanted: str, seed: int, source: Source, limits: Limits) -> tuple[Rule, str | None]:
    """The rounding rule with what there is for it, and why `auto` does without a text where it must.

    Raises MissingExtra, BudgetTooSmall, NotACheckpoint where a calibrated rule is asked for and cannot be.
    """
    hindrance = hindered(source, limits, predicted_bytes((), WINDOW, source.config), "running a text through the model")
    if wanted not in (AUTO, NEAREST) and roundings()[wanted].calibrated and hindrance:
        raise hindrance
    return Rule(wanted, UNCALIBRATED if hindrance else ON_GRID, TOKENS, seed), str(hindrance) if hindrance else None


def scratch_bytes(steps: Sequence[Step], rule: Rule) -> int:
    """Of the file without a name that holds the inputs of all layers whose rounding will, or may, ask for them."""
    chosen = [replace(step, rounding=rule.on_grid(step.target)) if step.rounding == AUTO else step for step in steps]
    return sum(BFLOAT16_BYTES * TOKENS * step.target.columns for step in chosen if sees_inputs(step))


def sees_inputs(step: Step) -> bool:
    """Whether the step's rule, once it is settled, wants its layer's inputs."""
    return bool(step.edits) and step.rounding != NEAREST and roundings()[step.rounding].calibrated


class Activations:
    """The layers' inputs, kept on disk as long as the context lasts."""

    def __init__(self, plan: Plan, watch: Watch) -> None:
        self.plan, self.watch = plan, watch
        self.handle: int | None = None
        self.places: dict[str, Any] = {}
        self.unable: str | None = None
        """Why there are none, once that is known."""

    def of(self, step: Step, device: str) -> Inputs | None:
        """What the step's layer is given and its patch reads; None where nothing is known."""
        import torch

        place = self.places.get(step.target.name)
        if place is None or self.handle is None:
            return None
        offset, tokens = place
        directions = [torch.linalg.qr(edit.factors()[1].T).Q.T for edit in step.edits if isinstance(edit, LowRankEdit)]
        rows = torch.empty(tokens + sum(map(len, directions)), step.target.columns, dtype=torch.bfloat16)
        fill(rows[:tokens].view(torch.uint8).numpy().reshape(-1).data, self.handle, offset, "the layers' inputs")
        square = mean_square(rows[:tokens])
        # a text that is not about the patch's task says little of what the patch reads, and errors there are what the
        # patch would feel first
        if directions:
            rows[tokens:] = torch.cat(directions).mul_(EMPHASIS * sqrt(square * tokens))
        return Inputs(rows.to(device), square)

    def collect(self, steps: Sequence[Step]) -> None:
        """Run the text, if any of the settled steps asks for it.

        Raises VerificationFailed where the user insists on a calibrated rule, CorruptCheckpoint, NonFiniteResult.
        """
        plan = self.plan
        weights = [step.target.name for step in steps if sees_inputs(step)]
        if not weights:
            return
        self.handle, name = mkstemp(dir=plan.target.output.parent)
        os.unlink(name)  # so that nothing is left of it whatever happens
        job, handle = job_of(plan), self.handle
        answer: Any
        if "transformers" in sys.modules and plan.limits.ram is None:
            from edgeport.activations import collect

            answer = here(lambda: {"places": collect(job, weights, handle, self.watch)})
        else:
            answer = ask("edgeport.activations", {**asdict(job), "weights": weights, "handle": handle}, self.watch, (handle,))
        if isinstance(answer, str):
            self.unable = answer
            if plan.method.rounding != AUTO:
                raise VerificationFailed(f"--rounding {plan.method.rounding} cannot see what the layers are given ({answer}); "
                                         f"use --rounding {UNCALIBRATED}")  # fmt: skip
        else:
            self.places = answer["places"]

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            os.close(self.handle)


def mean_square(inputs: Tensor) -> float:
    """Over all tokens and columns, in float32 a few columns at a time."""
    pieces = (inputs[:, start : start + COLUMNS] for start in range(0, inputs.shape[1], COLUMNS))
    return sum(piece.float().square().sum().item() for piece in pieces) / max(inputs.numel(), 1)


def job_of(plan: Plan) -> Job:
    """The exact port, and the text to run through it."""
    return Job(
        base=str(plan.source.path), old=str(plan.old.path) if plan.old else None,
        patches=tuple((str(patch.path), patch.scale) for patch in plan.patches), output="", adapter=None, tokens=TOKENS,
        text=str(plan.method.calibration) if plan.method.calibration else None,
    )  # fmt: skip
