"""What a model's linear layers are given on a text: the exact port, run a layer at a time (see `forward`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.aside import Watch, serve
from edgeport.effect import models
from edgeport.forward import stream
from edgeport.probe import packaged_text, probe_tokens
from edgeport.probing import WINDOW, Job, read_text
from edgeport.seams import Source
from edgeport.staging import write_at

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBED = 512
"""Tokens from the start of a text that calibration leaves alone, so that a probe on them is not flattered."""


class Recorder:
    """Writes inputs to an open file, as bfloat16 [tokens, columns], once for all layers that are given the same."""

    def __init__(self, handle: int, windows: int) -> None:
        self.handle, self.windows = handle, windows
        self.window = 0
        """The one whose inputs are noted."""
        self.places: dict[str, int] = {}
        """Offset, by weight."""
        self.end = 0
        self.last: tuple[Tensor, str] | None = None
        """The inputs that were noted before, and of which weight."""

    def note(self, weight: str, inputs: Tensor) -> None:
        import torch

        if self.last and inputs is self.last[0]:
            self.places[weight] = self.places[self.last[1]]
            return
        self.last = inputs, weight
        data = inputs.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1).data
        if weight not in self.places:
            self.places[weight] = self.end
            self.end += self.windows * len(data)
        write_at(self.handle, data, self.places[weight] + self.window * len(data))


def collect(job: Job, weights: Sequence[str], handle: int, watch: Watch) -> dict[str, tuple[int, int]]:
    """Write the inputs of the named weights' layers to `handle`; returns offset and tokens of each.

    A layer that the text does not reach has none. Raises UnsupportedArchitecture and what `stream` raises.
    """
    import torch

    _, exact = models(job)
    tokens = calibration_tokens(exact, job)
    recorder = Recorder(handle, len(tokens))
    streamed = stream(exact, lambda: watch(f"calibration: part {recorder.window + 1} of {len(tokens)}"))
    modules = dict(streamed.model.named_modules())
    for weight in weights:
        module = modules.get(weight.removesuffix(".weight"))
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(partial(noted, recorder, weight))
    # one window after the other, so that activations take no more memory the longer the text is
    for number, window in enumerate(tokens):
        recorder.window = number
        hidden = streamed.hidden(window[None])
        if streamed.head.name in weights:
            recorder.note(streamed.head.name, hidden)
    return {weight: (place, tokens.numel()) for weight, place in recorder.places.items()}


def noted(recorder: Recorder, weight: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    recorder.note(weight, inputs[0])


def calibration_tokens(source: Source, job: Job) -> Tensor:
    """int64 [windows, length]: the user's text and then the packaged one, from where a probe would end."""
    text = (read_text(Path(job.text)) + "\n\n" if job.text else "") + packaged_text()
    found = probe_tokens(source, PROBED + job.tokens, text)[:, PROBED:]
    length = min(WINDOW, int(source.config.get("max_position_embeddings") or WINDOW))
    windows = found.shape[1] // length
    return found[:, : windows * length].reshape(-1, length) if windows else found


def main(job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    weights, handle = job.pop("weights"), job.pop("handle")
    return {"places": collect(Job(**job | {"patches": tuple(map(tuple, job["patches"]))}), weights, handle, watch)}


if __name__ == "__main__":
    serve(main)
