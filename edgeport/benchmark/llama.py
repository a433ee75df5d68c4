"""GGUF models through llama.cpp: many short sequences in one batch, over one cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.benchmark.runner import STEM, Judged, Pack, Tree, groups, opened
from edgeport.errors import EdgeportError, NotACheckpoint, need
from edgeport.memory import cores
from edgeport.quiet import silence

if TYPE_CHECKING:
    from edgeport.benchmark.runner import Array

BATCH_TOKENS = 512
"""Tokens a batch has at least room for: llama.cpp sets memory aside for as many."""
SEQUENCES = 256
"""llama.cpp's own limit (`llama_max_parallel_sequences`)."""
WRITERS = 32
"""Prompts that are continued side by side."""


class LlamaRunner:
    def __init__(self, path: Path) -> None:
        self.llama: Any = need("llama_cpp", "gguf")
        self.numpy: Any = need("numpy", "gguf")
        silence(self.llama)
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), self.llama.llama_model_default_params())
        if not self.model:
            raise NotACheckpoint(f"llama.cpp cannot load {path}; does `edgeport inspect` name an architecture that it has?")
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.size = self.llama.llama_vocab_n_tokens(self.vocabulary)
        self.positions = int(self.llama.llama_model_n_ctx_train(self.model))
        start, end = (int(of(self.vocabulary)) for of in (self.llama.llama_vocab_bos, self.llama.llama_vocab_eos))
        self.start = start if start >= 0 else end

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids = (self.llama.llama_token * (len(data) + 8))()
        # neither start nor end of llama.cpp's own, and control tokens as such
        count = self.llama.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), False, True)
        return opened([self.start] if self.llama.llama_vocab_get_add_bos(self.vocabulary) else [], ids[:count])

    def judge(self, trees: Sequence[Tree]) -> Iterator[Judged]:
        room = max([BATCH_TOKENS, *(tree.tokens for tree in trees)])
        with Session(self, room, room) as session:
            for group in groups(trees, room, SEQUENCES):
                pack = Pack.of(group)
                session.clear()
                session.decode(pack.ids, pack.positions, sequences(pack), set(pack.wanted))
                yield from pack.judged(session.logits)

    def write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str]) -> list[str]:
        room = max([BATCH_TOKENS, *map(len, prompts)])
        trees = [Tree(prompt, [[0]]) for prompt in prompts]
        texts: list[str] = []
        with Session(self, room, room + min(WRITERS, len(prompts)) * tokens) as session:
            for group in groups(trees, room, WRITERS):
                texts += self._write([tree.prompt for tree in group], tokens, stops, session)
        return texts

    def _write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str], session: Session) -> list[str]:
        """As many prompts as fit one batch, a token each at a time."""
        pack = Pack.of([Tree(prompt, [[0]]) for prompt in prompts])
        session.clear()
        session.decode(pack.ids, pack.positions, [[tree] for tree in pack.trees], set(pack.wanted))
        written: list[list[int]] = [[] for _ in prompts]
        live = dict(enumerate(pack.wanted))  # prompt to its last token's place in the batch
        ends = self.llama.llama_vocab_is_eog, self.llama.llama_vocab_is_control
        for step in range(tokens):
            for prompt, place in list(live.items()):
                token = int(session.logits(place).argmax())
                if any(is_end(self.vocabulary, token) for is_end in ends):
                    del live[prompt]
                    continue
                written[prompt].append(token)
                text = self.decode(written[prompt]).lstrip()
                if any(stop in text for stop in stops):
                    del live[prompt]
            if not live or step == tokens - 1:
                break
            numbers = list(live)
            positions = [len(prompts[number]) + step for number in numbers]
            session.decode(
                [written[number][-1] for number in numbers], positions, [[number] for number in numbers],
                set(range(len(numbers))),
            )  # fmt: skip
            live = {number: place for place, number in enumerate(numbers)}
        return [self.decode(ids) for ids in written]

    def decode(self, ids: Sequence[int]) -> str:
        array = (self.llama.llama_token * len(ids))(*ids)
        text = bytes(64 * len(ids) + 64)
        count = self.llama.llama_detokenize(self.vocabulary, array, len(ids), text, len(text), False, False)
        return text[: max(count, 0)].decode(errors="replace")


def sequences(pack: Pack) -> list[list[int]]:
    """llama.cpp's sequences of each token: a prompt is part of every branch of its tree."""
    first, width = [], 0
    for asked in pack.asked:
        first.append(width)
        width += 1 + max(branch for _, branch, _ in asked)
    counts = [stop - start for start, stop in zip(first, [*first[1:], width], strict=True)]
    return [
        list(range(first[tree], first[tree] + counts[tree])) if branch == STEM else [first[tree] + branch]
        for tree, branch in zip(pack.trees, pack.branches, strict=True)
    ]


class Session:
    """A context of llama.cpp and the batch that it reads, freed together."""

    def __init__(self, runner: LlamaRunner, batch_tokens: int, cache_tokens: int) -> None:
        self.llama, self.size, self.numpy = runner.llama, runner.size, runner.numpy
        parameters = self.llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = cache_tokens, batch_tokens, batch_tokens
        parameters.n_seq_max, parameters.kv_unified = SEQUENCES, True
        parameters.n_threads = parameters.n_threads_batch = threads()
        self.context = self.llama.llama_init_from_model(runner.model, parameters)
        if not self.context:
            raise EdgeportError(f"llama.cpp finds no memory for a cache of {cache_tokens} tokens; free some")
        self.batch = self.llama.llama_batch_init(batch_tokens, 0, SEQUENCES)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def decode(self, ids: Sequence[int], positions: Sequence[int], belongs: Sequence[Sequence[int]], wanted: set[int]) -> None:
        batch = self.batch
        for at, (token, position, some) in enumerate(zip(ids, positions, belongs, strict=True)):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, len(some)
            for place, sequence in enumerate(some):
                batch.seq_id[at][place] = sequence
            batch.logits[at] = at in wanted
        batch.n_tokens = len(ids)
        if self.llama.llama_decode(self.context, batch) != 0:
            raise RuntimeError(f"llama.cpp could not decode a batch of {len(ids)} tokens")

    def logits(self, token: int) -> Array:
        row = self.llama.llama_get_logits_ith(self.context, token)
        return self.numpy.ctypeslib.as_array(row, shape=(self.size,)).copy()  # type: ignore[no-any-return]


def threads() -> int:
    """OMP_NUM_THREADS where it is set, or the cores that the process may use."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else cores()


def open_runner(path: Path) -> LlamaRunner:
    return LlamaRunner(path)
