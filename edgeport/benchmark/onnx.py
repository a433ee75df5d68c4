"""ONNX folders through onnxruntime: prompt and option in one row each, padded at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.benchmark.llama import threads
from edgeport.benchmark.runner import Judged, Tree, log_softmax, opened, opening
from edgeport.errors import NotACheckpoint
from edgeport.locate import open_model
from edgeport.memory import MIB
from edgeport.probe import open_tokenizer
from edgeport.runtime import Runner
from edgeport.sizes import size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeport.benchmark.runner import Array

ROWS = 8
"""Sequences that go through together, at most."""
LOGITS_BYTES = 128 * MIB
"""Of what goes through together: the graph gives the logits of every token."""


class OnnxRunner:
    def __init__(self, path: Path) -> None:
        source = open_model(path)
        tokenizer = open_tokenizer(source)
        if tokenizer is None:
            raise NotACheckpoint(f"{path} has no tokenizer.json to read questions with; copy the base's beside the model")
        self.tokenizer = tokenizer
        self.opening = opening(lambda text: list(tokenizer.encode(text).ids), self.bare)
        ends = source.config.get("eos_token_id") or ()
        controls = (token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)
        self.ends = {*([ends] if isinstance(ends, int) else ends), *controls}
        start = source.config.get("bos_token_id")
        self.start = start if isinstance(start, int) else min(self.ends, default=0)
        self.runner = Runner(path, threads=threads())
        self.positions = self.runner.positions
        self.room = max(LOGITS_BYTES // (4 * size(source.config, "vocab_size", 1)), 1)

    def encode(self, text: str) -> list[int]:
        return opened(self.opening, self.bare(text))

    def bare(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def judge(self, trees: Sequence[Tree]) -> Iterator[Judged]:
        import numpy as np

        for tree in trees:
            rows = [[*tree.prompt, *branch[:-1]] for branch in tree.branches]
            found: dict[tuple[int, ...], list[tuple[float, bool]]] = {}
            first = None
            distinct = sorted({tuple(row) for row in rows}, key=len)
            together = max(min(self.room // len(distinct[-1]), ROWS), 1)
            for start in range(0, len(distinct), together):
                some = distinct[start : start + together]
                tokens, mask = np.zeros((2, len(some), len(some[-1])), np.int64)
                for place, row in enumerate(some):
                    tokens[place, : len(row)], mask[place, : len(row)] = row, 1
                tails = self.tails(tokens, mask, len(tree.prompt) - 1)
                for row, whole in zip(some, tails, strict=True):
                    tail = whole[: len(row) - len(tree.prompt) + 1]
                    first = tail[0] if first is None else first
                    for branch in (one for one, its in zip(tree.branches, rows, strict=True) if tuple(its) == row):
                        steps = list(zip(tail, branch, strict=True))
                        found[tuple(branch)] = [(float(logs[token]), int(logs.argmax()) == token) for logs, token in steps]
            assert first is not None
            each = [found[tuple(branch)] for branch in tree.branches]
            yield Judged(first, [sum(score for score, _ in one) for one in each], [all(hit for _, hit in one) for one in each])

    def tails(self, tokens: NDArray[np.int64], mask: NDArray[np.int64], start: int) -> list[list[Array]]:
        """The distributions after each token from `start` on, of each row; several rows fit one step."""
        found: list[list[Array]] = [[] for _ in tokens]
        piece = max(self.room // len(tokens), 1)
        self.runner.reset()
        for begin in range(0, tokens.shape[1], piece):
            logits = self.runner.step(tokens[:, begin : begin + piece], mask[:, begin : begin + piece])
            for tail, row in zip(found, logits, strict=True):
                tail += map(log_softmax, row[max(start - begin, 0) :])
        return found

    def write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str]) -> list[str]:
        return [self._write(prompt, tokens, stops) for prompt in prompts]

    def _write(self, prompt: Sequence[int], tokens: int, stops: Sequence[str]) -> str:
        written: list[int] = []
        for token in self.runner.generate(prompt, tokens):
            if token in self.ends:
                break
            written.append(token)
            text = self.tokenizer.decode(written).lstrip()
            if any(stop in text for stop in stops):
                break
        return str(self.tokenizer.decode(written))


def open_runner(path: Path) -> OnnxRunner:
    return OnnxRunner(path)
