"""Training on prefix trees against transformers' own loss on padded questions."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("peft", reason="peft, of the extra bench, is not installed")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import prefixes

IGNORED = -100  # the label that transformers' loss leaves out
TINY = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def questions(count: int) -> list[tuple[list[int], list[int]]]:
    """Of few words, so that they share beginnings of every length; one is asked twice, and one goes on where another ends."""
    draw = random.Random(0)
    some = [
        ([1, *draw.choices((2, 3), k=draw.randint(1, 6))], draw.choices((2, 4, 5), k=draw.randint(1, 3))) for _ in range(count)
    ]
    return [*some, some[0], (some[1][0] + some[1][1], [6, 0])]


def padded_loss(model: LlamaForCausalLM, asked: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    width = max(len(prompt) + len(answer) for prompt, answer in asked)
    ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in asked])
    labels = torch.tensor(
        [
            [IGNORED] * len(prompt) + answer + [IGNORED] * (width - len(prompt) - len(answer))
            for prompt, answer in asked
        ]
    )
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


@pytest.mark.parametrize("sequences", [1, 5, 64])
def test_loss_and_gradients_are_those_of_padded_questions(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "SEQUENCES", sequences)
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY)
    asked = questions(20)
    wanted = padded_loss(model, asked)
    wanted.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    found = prefixes.loss(model, prefixes.trees(asked))
    found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close([weight.grad for weight in model.parameters()], gradients)


def test_every_beginning_is_run_once() -> None:
    asked = questions(14)
    batch = prefixes.trees(asked)
    whole = [prompt + answer for prompt, answer in asked]
    beginnings = {tuple(one[:end]) for one in whole for end in range(1, len(one))}
    assert batch["input_ids"].shape == (1, len(beginnings))
    seen = {
        tuple(batch["input_ids"][0][sees].tolist()): int(place)
        for sees, place in zip(batch["attention_mask"][0, 0] == 0, batch["position_ids"][0], strict=True)
    }
    assert seen == {beginning: len(beginning) - 1 for beginning in beginnings}
