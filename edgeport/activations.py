"""What a model's linear layers are given on a text: the exact port, run a layer at a time (see `forward`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.aside import Watch, serve
from edgeport.effect import models
from edgeport.forward import stream
from edgeport.probe import packaged_text, probe_tokens
from edgeport.probing import Job, read_text
from edgeport.seams import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOW = 512
"""Tokens that see each other, where the model was made for so many."""
PROBED = 512
"""Tokens from the start of a text that calibration leaves alone, so that a probe on them is not flattered."""


class Recorder:
    """Appends inputs to an open file, as bfloat16 [tokens, columns], once for all layers that are given the same."""

    def __init__(self, handle: int, watch: Watch) -> None:
        self.handle, self.watch = handle, watch
        self.places: dict[str, tuple[int, int]] = {}
        """Offset and tokens, by weight."""
        self.end = 0
        self.last: Tensor | None = None

    def note(self, weight: str, inputs: Tensor) -> None:
        import torch

        if inputs is not self.last:
            self.last = inputs
            rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.bfloat16).contiguous()
            data = rows.view(torch.uint8).numpy().tobytes()
            self.begin, self.rows = self.end, len(rows)
            while self.end - self.begin < len(data):
                self.end += os.pwrite(self.handle, data[self.end - self.begin :], self.end)
        self.places[weight] = self.begin, self.rows
        self.watch(f"calibration: {weight}")


def collect(job: Job, weights: Sequence[str], handle: int, watch: Watch) -> dict[str, tuple[int, int]]:
    """Write the inputs of the named weights' layers to `handle`; returns their places.

    A layer that the text does not reach has none. Raises UnsupportedArchitecture and what `stream` raises.
    """
    import torch

    _, exact = models(job)
    tokens = calibration_tokens(exact, job)
    streamed = stream(exact)
    recorder = Recorder(handle, watch)
    modules = dict(streamed.model.named_modules())
    for weight in weights:
        module = modules.get(weight.removesuffix(".weight"))
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(partial(noted, recorder, weight))
    hidden = streamed.hidden(tokens)
    if streamed.head.name in weights:
        recorder.note(streamed.head.name, hidden)
    return recorder.places


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
