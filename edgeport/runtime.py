"""A decoder in ONNX through onnxruntime: text in chunks, a cache that stays on the device, greedy continuation.

For every graph with transformers' names: input_ids, attention_mask, past_key_values.N.key, logits, present.N.key. An input
called position_ids is fed too, so that graphs of other exporters run beside edgeport's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import ConvertError, NotACheckpoint, UnknownName, need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16"}
OLDEST = (1, 27)
"""Of the versions of onnxruntime that compute its own operators as they are meant. Of graphs of ours, 1.23 and earlier attend to
one token more than a window has, 1.25 and earlier take padding at a text's start for a part of it, and 1.26 and earlier read the
zero points of rows with an odd number of blocks from the wrong places, all without a word."""
ERRORS_ONLY = 3
"""onnxruntime's log level."""


def open_session(model: Path, provider: str = "cpu", threads: int | None = None) -> Any:
    """onnxruntime's session of an .onnx file, or of a folder with a `model.onnx`.

    Raises NotACheckpoint, UnknownName, ConvertError, MissingExtra.
    """
    runtime = need("onnxruntime", "onnx")
    path = model / "model.onnx" if model.is_dir() else model
    if not path.is_file():
        raise NotACheckpoint(f"{path} does not exist; a folder written with --to onnx was expected")
    if provider not in PROVIDERS:
        raise UnknownName(f"no execution provider is called {provider!r} (known: {', '.join(PROVIDERS)})")
    if PROVIDERS[provider] not in runtime.get_available_providers():
        raise ConvertError(f"the installed onnxruntime has no {PROVIDERS[provider]}; put 'edgeport[onnx-gpu]' in its place")
    options = runtime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    # threads that wait for the next token by spinning take the cores from whatever else runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        return runtime.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime's own errors have no common base
        raise ConvertError(f"onnxruntime cannot load {path.name}: {str(error).splitlines()[0]}") from error


def check_version(version: str) -> None:
    """Raises ConvertError for an onnxruntime that is not to be trusted with its own operators."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        raise ConvertError(
            f"onnxruntime {version}, which is installed, computes some of its own operators wrong without a word; install "
            f"{'.'.join(map(str, OLDEST))} or newer wherever such an output is to run, or give --portable"
        )


class Runner:
    """One model and the cache of what it has read so far."""

    def __init__(self, model: Path | str, *, provider: str = "cpu", threads: int | None = None, head_dim: int = 0) -> None:
        """`model`: an .onnx file, or a folder with a `model.onnx`. `threads` None: as many as the machine has cores.
        `head_dim`: of a graph that leaves it open, as onnxruntime-genai's builder does.

        Raises NotACheckpoint, UnknownName, ConvertError, MissingExtra.
        """
        self.session = open_session(Path(model), provider, threads)
        self.values: Any = need("onnxruntime", "onnx").OrtValue
        self.device, self.head_dim = provider, head_dim
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        told = json.loads(self.session.get_modelmeta().custom_metadata_map.get("edgeport", "{}"))
        self.fused, self.positions = told.get("portable") is False, told.get("positions", sys.maxsize)
        if self.fused:
            check_version(need("onnxruntime", "onnx").__version__)
        self.past = {name: name.replace("past_key_values", "present") for name in self.inputs if name.startswith("past")}
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self.cache: dict[str, Any] = {}
        self.mask: NDArray[np.int64] | None = None

    @property
    def length(self) -> int:
        """Tokens that the cache holds, of each sequence."""
        return 0 if self.mask is None else self.mask.shape[1]

    def step(
        self, tokens: Sequence[Sequence[int]] | NDArray[np.int64], mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Read int64 `tokens` [batch, length] after what was read so far; float32 logits [batch, length, vocabulary].

        `mask`: int64 of the same shape, 0 for padding. Raises ConvertError for padding that the graph cannot take.
        """
        import numpy as np

        ids = np.ascontiguousarray(tokens, np.int64)
        batch, length = ids.shape
        mask = np.ones_like(ids) if mask is None else mask
        if self.fused:
            check_padding(mask, first=not self.length)
        if batch > 1 and length > 1 and self.length:
            # more than onnxruntime's grouped-query attention takes at once
            places = [slice(place, place + 1) for place in range(length)]
            return np.concatenate([self.step(ids[:, place], mask[:, place]) for place in places], axis=1)
        seen = mask if self.mask is None else np.concatenate([self.mask, mask], axis=1)
        if seen.shape[1] > self.positions:
            raise ConvertError(f"{seen.shape[1]} tokens are more than the {self.positions} that the model has positions for")
        fed = {"input_ids": ids, "attention_mask": seen}
        if "position_ids" in self.inputs:
            fed["position_ids"] = np.arange(self.length, seen.shape[1])[None].repeat(batch, 0)
        binding = self.session.io_binding()
        for name, values in fed.items():
            binding.bind_cpu_input(name, values)
        for name, present in self.past.items():
            binding.bind_ortvalue_input(name, self.cache.get(name) or self.empty(name, batch))
            binding.bind_output(present, self.device)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        *states, logits = binding.get_outputs()
        self.cache = dict(zip(self.past, states, strict=True))
        self.mask = seen
        return np.asarray(logits.numpy(), np.float32)

    def empty(self, name: str, batch: int) -> Any:
        """A cache that holds no token yet, on the device."""
        import numpy as np

        entry = self.inputs[name]
        width = entry.shape[3] if isinstance(entry.shape[3], int) else self.head_dim
        shape = [batch, entry.shape[1], 0, width]
        if entry.type not in NUMPY:  # bfloat16, which numpy lacks
            return self.values.ortvalue_from_shape_and_type(shape, 16, self.device, 0)
        return self.values.ortvalue_from_numpy(np.empty(shape, NUMPY[entry.type]), self.device, 0)

    def generate(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """Greedy: up to `count` tokens after the prompt, each the likeliest; ends after a token of `stop`."""
        self.reset()
        unread = prompt
        for _ in range(count):
            token = int(self.step([unread])[0, -1].argmax())
            yield token
            if token in stop:
                return
            unread = [token]


def check_padding(mask: NDArray[np.int64], first: bool) -> None:
    """Raises ConvertError for padding that grouped-query attention would take for a part of the text: it goes by how many
    tokens a text has, so that they have to come first, and what comes after padding takes its place in the cache."""
    if not mask[:, 0].all() and first:
        raise ConvertError("a text is padded on the left, which fused attention cannot take; pad its end, or --portable")
    if (mask[:, 1:] > mask[:, :-1]).any() or (not first and not mask.all()):
        remedy = "pad the end of its first piece alone, or --portable"
        raise ConvertError(f"a text goes on after padding, which fused attention cannot take; {remedy}")
