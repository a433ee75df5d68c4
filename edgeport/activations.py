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
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from edgeport.aside import Watch, attend
from edgeport.checkpoint import fill
from edgeport.effect import models
from edgeport.forward import Streamed, multiply, stream
from edgeport.memory import peak_bytes, return_freed_blocks
from edgeport.probe import packaged_text, probe_tokens
from edgeport.probing import Job, read_text, window_length
from edgeport.seams import Source
from edgeport.staging import Written, write_at
from edgeport.tensor import Weight
from edgeport.turns import Turn

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBED = 512
"""Tokens from the start of a text that calibration leaves alone, so that a probe on them is not flattered."""


class Place(NamedTuple):
    """Where the scratch file has what a layer is given, in bfloat16, and how it was cut."""

    inputs: int
    """Offset of [tokens, columns]: in the port that is being made."""
    drift: int
    """Offset, for each `group` tokens, of [columns, group]: those inputs, less the exact port's."""
    tokens: int
    group: int


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


class Notes:
    """Inputs of layers on a text that comes in groups of tokens, written to the scratch file."""

    def __init__(self, handle: int, groups: Sequence[Tensor]) -> None:
        self.handle = handle
        self.sizes = [group.numel() for group in groups]
        self.group = 0
        """The one that is being run."""
        self.exact_at: dict[str, int] = {}
        """Offset of the exact port's inputs, by weight."""
        self.end = 0
        self.last: dict[int, tuple[Callable[[], Tensor | None], str]] = {}
        """By group the inputs that were noted last, while they live, and of which weight: several layers are given the same."""

    def exact(self, weight: str, inputs: Tensor) -> None:
        same = self.noted_as(weight, inputs)
        if same:
            self.exact_at[weight] = self.exact_at[same]
            return
        data = content(inputs)
        if weight not in self.exact_at:
            self.exact_at[weight] = self.end
            self.end += data.nbytes // self.sizes[self.group] * sum(self.sizes)
        write_at(self.handle, data, self.exact_at[weight] + data.nbytes // self.sizes[self.group] * self.before)

    def port(self, weight: str, inputs: Tensor) -> Place:
        """Behind all of the exact port's inputs; what was noted there before goes."""
        import torch

        tokens, columns = sum(self.sizes), inputs.shape[-1]
        place = Place(self.end, self.end + 2 * tokens * columns, tokens, self.sizes[0])
        if not self.noted_as(weight, inputs):
            ours = inputs.reshape(-1, columns).to(torch.bfloat16)
            exact = torch.empty_like(ours)
            begin = 2 * self.before * columns
            fill(content(exact), self.handle, self.exact_at[weight] + begin, "the layers' inputs")
            write_at(self.handle, content(ours), place.inputs + begin)
            write_at(self.handle, content(ours.sub_(exact).T), place.drift + begin)
        return place

    @property
    def before(self) -> int:
        """Tokens of the groups before this one."""
        return sum(self.sizes[: self.group])

    def noted_as(self, weight: str, inputs: Tensor) -> str | None:
        """The weight for which the same inputs were noted just before."""
        found, name = self.last.get(self.group, (lambda: None, ""))
        if found() is inputs:
            return name
        self.last[self.group] = ref(inputs), weight
        return None


def content(matrix: Tensor) -> memoryview:
    """Its numbers in bfloat16; a bfloat16 matrix's own memory."""
    import torch

    data: memoryview = matrix.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1).data
    return data


def calibrate(course: Course, watch: Watch) -> Iterator[dict[str, Any]]:
    """Each weight that the text comes to, and the place of what its layer is given; to be stored when the next is asked for.

    With the peak of the process so far.
    A layer that the text does not reach does not come. Raises UnsupportedArchitecture and what `stream` raises.
    """
    import torch

    _, exact = models(course.job)
    groups = torch.split(calibration_tokens(exact, course.job), course.windows)
    notes = Notes(course.handle, groups)
    streamed = stream(exact, lambda: watch(f"calibration: part {notes.group + 1} of {len(groups)}"))
    with heard(streamed, course.weights, notes.exact):
        for notes.group, group in enumerate(groups):
            say(streamed, group, course.weights, notes.exact)
    streamed = stream(exact)
    use(streamed, course.stored, course.written)
    found: dict[str, Any] = {}

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


def main(packed: dict[str, Any], watch: Watch) -> Iterator[dict[str, Any]]:
    return_freed_blocks()
    yield from calibrate(pickle.loads(b64decode(packed["course"])), watch)


if __name__ == "__main__":
    attend(main)
