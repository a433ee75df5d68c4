"""Put the held-out questions to a GGUF through llama.cpp, or to an ONNX folder through onnxruntime.

`python -m edgeport.demo.ask MODEL`. Prompts go through in batches; only the logits after each prompt are read, since
the options differ in their first token. Prints one JSON object; a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeport.demo.triage import Question, questions
from edgeport.errors import need
from edgeport.memory import cores, peak_bytes
from edgeport.quiet import silence

COUNT = 400
BATCH_TOKENS = 512
SEQUENCES = 64
ONNX_SEQUENCES = 8
"""Prompts of like length that go through onnxruntime together: a graph gives logits for every token, 200 kB each."""


def ask_onnx(model: Path, asked: Sequence[Question]) -> list[int]:
    """As `ask`, for a folder with a tokenizer.json. Shorter prompts of a batch are padded at their end."""
    import numpy as np

    from edgeport.locate import open_model
    from edgeport.probe import open_tokenizer
    from edgeport.runtime import Runner

    tokenizer = open_tokenizer(open_model(model))
    assert tokenizer is not None
    prompts, firsts = [], []
    for question in asked:
        prompts.append(tokenizer.encode(question.prompt, add_special_tokens=False).ids)
        firsts.append([tokenizer.encode(option, add_special_tokens=False).ids[0] for option in question.options])
    runner = Runner(model, threads=cores())
    order = sorted(range(len(asked)), key=lambda index: len(prompts[index]))
    answers = [-1] * len(asked)
    for start in range(0, len(order), ONNX_SEQUENCES):
        group = order[start : start + ONNX_SEQUENCES]
        length = len(prompts[group[-1]])
        tokens, mask = np.zeros((2, len(group), length), np.int64)
        for row, index in enumerate(group):
            tokens[row, : len(prompts[index])] = prompts[index]
            mask[row, : len(prompts[index])] = 1
        runner.reset()
        logits = runner.step(tokens, mask)
        for row, index in enumerate(group):
            scores = logits[row, len(prompts[index]) - 1, firsts[index]]
            answers[index] = int(scores.argmax())
    return answers


def ask(model: Path, asked: Sequence[Question]) -> list[int]:
    """The option that the model finds likeliest, for each question."""
    llama: Any = need("llama_cpp", "gguf")
    silence(llama)
    loaded = llama.llama_model_load_from_file(os.fsencode(model), llama.llama_model_default_params())
    context = llama.llama_init_from_model(loaded, settings(llama))
    vocabulary = llama.llama_model_get_vocab(loaded)
    firsts = [[tokenize(llama, vocabulary, option)[0] for option in question.options] for question in asked]
    prompts = [tokenize(llama, vocabulary, question.prompt) for question in asked]
    answers = [-1] * len(asked)
    batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
    for group in batches(prompts):
        last = fill(batch, [prompts[index] for index in group])
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama.cpp could not decode a batch of {batch.n_tokens} tokens")
        for index, position in zip(group, last, strict=True):
            logits = llama.llama_get_logits_ith(context, position)
            scores = [logits[token] for token in firsts[index]]
            answers[index] = scores.index(max(scores))
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(loaded)
    return answers


def settings(llama: Any) -> Any:
    """A context for a batch of many short sequences."""
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
    parameters.n_seq_max, parameters.kv_unified = SEQUENCES, True
    parameters.n_threads = parameters.n_threads_batch = cores()
    return parameters


def tokenize(llama: Any, vocabulary: Any, text: str) -> list[int]:
    """Token ids of plain text, without a start token: the patch was trained without one."""
    data = text.encode()
    ids = (llama.llama_token * (len(data) + 8))()
    count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, False)
    return list(ids[:count])


def batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts that fit one batch together."""
    group: list[int] = []
    filled = 0
    for index, prompt in enumerate(prompts):
        if group and (filled + len(prompt) > BATCH_TOKENS or len(group) == SEQUENCES):
            yield group
            group, filled = [], 0
        group.append(index)
        filled += len(prompt)
    yield group


def fill(batch: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """One sequence a prompt; returns the position of each prompt's last token in the batch."""
    last = []
    at = 0
    for sequence, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = position == len(prompt) - 1
            at += 1
        last.append(at - 1)
    batch.n_tokens = at
    return last


def main() -> None:
    asked = questions("test", COUNT)
    began = time.perf_counter()
    model = Path(sys.argv[1])
    answers = (ask_onnx if model.is_dir() else ask)(model, asked)
    correct = sum(answer == question.answer for answer, question in zip(answers, asked, strict=True))
    seconds = time.perf_counter() - began
    found = {"correct": correct, "total": len(asked), "seconds": seconds, "peak_ram_bytes": peak_bytes()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
