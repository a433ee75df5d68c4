"""What a model's linear layers are given on a text: by the exact port, and by the port that is being made.

The exact port runs first, a layer at a time (see `forward`), and the inputs of all layers in question are noted. Then the
text runs through the port: before a layer whose weight is to be rounded it stands still, tells what that layer is given
and how that differs from the exact port's, and goes on with the weight as it has been stored meanwhile. Each rounding so
sees what the roundings before it have done to the text, and takes back what it can.

Source: the asymmetric calibration of Li et al., GPTAQ (ICML 2025, arXiv 2504.02692).
"""

from __future__ import annotations

import pickle
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.aside import Watch, attend
from edgeport.calibration import PROBED
from edgeport.effect import models
from edgeport.forward import Streamed, multiply, stream
from edgeport.memory import peak_bytes, return_freed_blocks
from edgeport.probe import packaged_text, probe_tokens
from edgeport.probing import Job, read_text, window_length
from edgeport.scratch import Notes
from edgeport.seams import Source
from edgeport.staging import Written
from edgeport.tensor import Weight
from edgeport.turns import Turn

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Course:
    """A calibration as a process of its own is told it."""

    job: Job
    """The exact port, and the text."""
    weights: Sequence[str]
    """To be rounded as the text comes to them."""
    stored: Mapping[str, Weight]
    """Weights as the port's files have them: those above once they are rounded, and others all along."""
    written: Written
    handle: int
    """The scratch file."""
    windows: int
    """Of the text, that go through the model at once."""

    def packed(self) -> dict[str, Any]:
        """For a process of our own."""
        return {"course": b64encode(pickle.dumps(self)).decode()}


def calibrate(course: Course, watch: Watch) -> Iterator[dict[str, Any]]:
    """Each weight that the text comes to, the place of what its layer is given, and the process's peak so far.

    The weight is to be stored when the next is asked for. One that the text does not reach does not come. Raises
    UnsupportedArchitecture and what `stream` raises.
    """
    import torch

    _, exact = models(course.job)
    tokens = calibration_tokens(exact, course.job)
    groups = torch.split(tokens, course.windows)
    notes = Notes(course.handle, groups)
    streamed = stream(exact, lambda: watch(f"calibration: part {notes.group + 1} of {len(groups)}"))
    with heard(streamed, course.weights, notes.exact):
        for notes.group, group in enumerate(groups):
            say(streamed, group, course.weights, notes.exact)
    streamed = stream(exact)
    use(streamed, course.stored, course.written)
    found: dict[str, Any] = {"tokens": tokens.numel(), "unread": unread(exact, course.job)}

    def stop(weight: str, inputs: Tensor) -> None:
        found.update(weight=weight, place=notes.port(weight, inputs), peak_ram_bytes=peak_bytes())
        turns[notes.group].stop()

    def advance(group: int) -> bool:
        notes.group = group
        return turns[group].advance()

    turns = [Turn(partial(say, streamed, group, course.weights, stop)) for group in groups]
    try:
        with heard(streamed, course.weights, stop):
            # all groups of tokens come to a layer before its weight is rounded
            while sum(map(advance, range(len(groups)))):
                yield found
    finally:
        for turn in turns:
            turn.cancel()


Hear = Callable[[str, "Tensor"], object]


@contextmanager
def heard(streamed: Streamed, weights: Iterable[str], hear: Hear) -> Iterator[None]:
    """In the block `hear` is told of the inputs of the linear layers with these weights, before they run."""
    from torch import nn

    modules = dict(streamed.model.named_modules())
    found = {weight: modules.get(weight.removesuffix(".weight")) for weight in weights}
    handles = [
        module.register_forward_pre_hook(partial(told, hear, weight))
        for weight, module in found.items() if type(module) is nn.Linear
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def told(hear: Hear, weight: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    hear(weight, inputs[0])


def say(streamed: Streamed, tokens: Tensor, weights: Sequence[str], hear: Hear) -> None:
    """Run int64 `tokens` [windows, length] through the model's body, and `hear` what its head is given."""
    hidden = streamed.hidden(tokens)
    if streamed.head.name in weights:
        hear(streamed.head.name, hidden)


def use(streamed: Streamed, stored: Mapping[str, Weight], written: Written) -> None:
    """Make linear layers multiply by weights as they are stored."""
    from torch import nn

    modules: dict[str, Any] = dict(streamed.model.named_modules())
    for name, weight in stored.items():
        path = name.removesuffix(".weight")
        if type(modules.get(path)) is nn.Linear:
            bias = streamed.source.weights.get(f"{path}.bias")
            own = (streamed.source, bias) if bias else None
            vars(modules[path])["forward"] = partial(multiply, written, weight, own)


def calibration_tokens(source: Source, job: Job) -> Tensor:
    """int64 [windows, length]: the user's text and then the packaged one, from where a probe would end."""
    text = (read_text(Path(job.text)) + "\n\n" if job.text else "") + packaged_text()
    found = probe_tokens(source, PROBED + job.tokens, text)[:, PROBED:]
    length = window_length(source.config)
    windows = found.shape[1] // length
    return found[:, : windows * length].reshape(-1, length) if windows else found


def unread(source: Source, job: Job) -> bool:
    """Whether the user's text ends before calibration begins."""
    return job.text is not None and probe_tokens(source, PROBED + 1, read_text(Path(job.text))).shape[1] <= PROBED


def main(packed: dict[str, Any], watch: Watch) -> Iterator[dict[str, Any]]:
    return_freed_blocks()
    yield from calibrate(pickle.loads(b64decode(packed["course"])), watch)


if __name__ == "__main__":
    attend(main)
