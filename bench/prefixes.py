"""A batch of questions for training, each beginning that several of them share run once.

    How many legs ... if you have 5 --+-- wasps? \\n Answer: 30
                                      +-- crabs? \\n Answer: 50
    a token sees those before it in its own questions, at the places that they have there, and nothing else

Loss and gradients are those of the questions padded into a batch (which is what transformers' own loss is given), up to the
order of sums, from less than half to three quarters of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeport.benchmark.questions import Asked, gold

SEQUENCES = 16
"""Questions of a row: more share more, and attention grows with the square of a row."""


def batches(asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """What `loss` takes, of `size` questions each: the loss is on the answer and the end of the turn, not on the prompt."""
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        prompts = tokenizer([question.prompt for question in some])["input_ids"]
        options = tokenizer([gold(question) for question in some])["input_ids"]
        yield trees([(prompt, [*option, tokenizer.eos_token_id]) for prompt, option in zip(prompts, options, strict=True)])


def trees(questions: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Prompts and answers, as token ids, in rows of `width` nodes, a tree each:

    input_ids, position_ids [rows, width]; attention_mask [rows, 1, width, width], to be added to the scores; nodes and
    successors [tokens of all answers], the places in the flattened rows whose outputs are to tell these tokens.
    """
    ordered = sorted(questions, key=lambda question: question[0] + question[1])
    rows = [_Row(ordered[start : start + SEQUENCES]) for start in range(0, len(ordered), SEQUENCES)]
    width = max(len(row.ids) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        positions[number, : len(row.ids)] = torch.tensor(row.depths)
        for node, parent in enumerate(row.parents):
            if parent is not None:
                sees[number, node] |= sees[number, parent]
    mask = torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None]
    nodes = [number * width + node for number, row in enumerate(rows) for node, _ in row.answers]
    successors = [token for row in rows for _, token in row.answers]
    return {
        "input_ids": ids, "position_ids": positions, "attention_mask": mask,
        "nodes": torch.tensor(nodes), "successors": torch.tensor(successors),
    }  # fmt: skip


def loss(model: PeftModel | PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy, the mean over all answers' tokens; logits are made for these alone."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    given = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    hidden = base.model(**given, use_cache=False).last_hidden_state
    return cross_entropy(base.lm_head(hidden.flatten(0, 1)[batch["nodes"]]), batch["successors"])


class _Row:
    """The tree of some questions: its nodes in an order in which parents come first."""

    def __init__(self, questions: Sequence[tuple[list[int], list[int]]]) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int | None] = []
        self.answers: list[tuple[int, int]] = []
        """(node, token that is to follow), for every token of every answer."""
        children: dict[tuple[int | None, int], int] = {}
        for prompt, answer in questions:
            node = None
            for depth, token in enumerate(prompt + answer):
                if node is not None and depth >= len(prompt):
                    self.answers.append((node, token))
                if depth == len(prompt) + len(answer) - 1:
                    break  # the last token needs no successor
                if (node, token) not in children:
                    children[node, token] = len(self.ids)
                    self.ids.append(token)
                    self.depths.append(depth)
                    self.parents.append(node)
                node = children[node, token]
