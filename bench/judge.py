"""A model beside the exact port: weights, text and questions, on a GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeport.benchmark.tasks import asked
from edgeport.blocks import decode_rows
from edgeport.effect import open_whole, share
from edgeport.forward import build
from edgeport.locate import open_patch_at
from edgeport.matching import collect_edits
from edgeport.probe import open_tokenizer, probe_tokens
from edgeport.seams import LowRankEdit, Source
from edgeport.tensor import EMBEDDING, HEAD

WINDOW = 512
QUESTIONS_AT_ONCE = 64


@cache
def manual() -> str:
    """Unrelated text that every Python carries: its language reference. Of version to version it differs a little."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model says: of each text the log-probabilities at every position, of each question those of the options."""

    texts: Mapping[str, Tensor]
    """float32 [windows, length - 1, vocabulary], by text."""
    perplexity: Mapping[str, float]
    options: Tensor
    """float32 [questions, options], normalised over the options."""


class Judge:
    """One exact port, and the models that are to be as it is: they differ in the weights that the patch changes."""

    def __init__(self, exact: Path, patch: Path, task: str, limit: int, tokens: int, device: str) -> None:
        self.device = device
        source = open_whole(exact)
        self.model = build(source.config)
        weights = {name: read(source, name, device) for name in source.weights}
        if HEAD not in weights:
            weights[HEAD] = weights[EMBEDDING]
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.to(device)
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(f"{exact} lacks weights of its architecture")
        edits = collect_edits(source, [open_patch_at(patch, 1.0)], None)
        found = {name: [edit.factors()[1] for edit in parts[0] if isinstance(edit, LowRankEdit)] for name, parts in edits.items()}
        self.directions = {name: torch.linalg.qr(torch.cat(reads).T.float().to(device)).Q for name, reads in found.items()}
        self.exact = {name: weights[name] for name in self.directions}
        self.texts = {"probe": probe_tokens(source, WINDOW), "manual": windows(probe_tokens(source, tokens, manual()))}
        tokenizer = open_tokenizer(source)
        assert tokenizer is not None
        self.questions = asked(task, "test", limit)
        self.prompts = [tokenizer.encode(question.prompt, add_special_tokens=False).ids for question in self.questions]
        self.firsts = [[tokenizer.encode(option, add_special_tokens=False).ids[0] for option in question.options]  # type: ignore[union-attr]
                       for question in self.questions]  # fmt: skip
        if any(len(set(first)) < len(first) for first in self.firsts):
            raise ValueError(f"options of {task} begin with the same token, and only first tokens are read")
        self.answers = torch.tensor([question.answer for question in self.questions])  # type: ignore[union-attr]
        self.reference = self.hear()

    def put(self, place: Path) -> dict[str, Tensor]:
        """The changed weights of the model there, which the model now computes with."""
        source = open_whole(place)
        stored = {name: read(source, name, self.device) for name in self.exact}
        self.model.load_state_dict(stored, strict=False, assign=True)
        return stored

    def hear(self) -> Heard:
        texts, perplexity = {}, {}
        for name, tokens in self.texts.items():
            texts[name] = torch.cat([self.log_probabilities(window[None])[:, :-1] for window in tokens])
            picked = texts[name].gather(-1, tokens[:, 1:, None].to(self.device))
            perplexity[name] = math.exp(-picked.double().mean().item())
        return Heard(texts, perplexity, self.chosen())

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens.to(self.device), use_cache=False).logits
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def chosen(self) -> Tensor:
        found: list[Any] = [None] * len(self.prompts)
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        for start in range(0, len(order), QUESTIONS_AT_ONCE):
            group = order[start : start + QUESTIONS_AT_ONCE]
            length = len(self.prompts[group[-1]])
            # padded at the end, which what stands before it does not see
            tokens = torch.tensor([self.prompts[index] + [0] * (length - len(self.prompts[index])) for index in group])
            hidden = self.model.base_model(tokens.to(self.device), use_cache=False)[0]
            last = torch.tensor([len(self.prompts[index]) - 1 for index in group], device=self.device)
            logits = self.model.get_output_embeddings()(hidden[torch.arange(len(group), device=self.device), last]).float()
            for row, index in enumerate(group):
                found[index] = logits[row, self.firsts[index]].log_softmax(-1).cpu()
        return torch.stack(found)

    def right(self, heard: Heard) -> Tensor:
        """Whether each question is answered rightly, float64."""
        return (heard.options.argmax(1) == self.answers).double()

    def sureness(self, heard: Heard) -> Tensor:
        """Of the right option: its log-probability among the options."""
        return heard.options.gather(1, self.answers[:, None])[:, 0].double()

    def figures(self, heard: Heard, base: Heard) -> dict[str, Any]:
        """Beside the exact port, and beside the base without the patch."""
        exact, right = self.right(self.reference), self.right(heard)
        lost, won = int(((exact == 1) & (right == 0)).sum()), int(((exact == 0) & (right == 1)).sum())
        gain, gain_error = share(right - self.right(base), exact - self.right(base))
        sure, sure_error = share(self.sureness(heard) - self.sureness(base), self.sureness(self.reference) - self.sureness(base))
        flipped = int((heard.options.argmax(1) != self.reference.options.argmax(1)).sum())
        return {
            "correct": int(right.sum()), "total": len(right), "lost": lost, "won": won, "answers_changed": flipped,
            "gain": gain, "gain_error": gain_error, "log_gain": sure, "log_gain_error": sure_error,
            "perplexity": dict(heard.perplexity), "kl": {name: self.divergence(heard, name) for name in heard.texts},
        }  # fmt: skip

    def divergence(self, heard: Heard, text: str) -> float:
        """KL(exact port || this) in nats, mean over the positions."""
        # a window at a time, since each has as many numbers as the vocabulary for every token
        pairs = zip(self.reference.texts[text], heard.texts[text], strict=True)
        means: list[float] = [(ours.exp() * (ours - theirs)).sum(-1).double().mean().item() for ours, theirs in pairs]
        return sum(means) / len(means)

    def weights(self, base: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the weights: share of the patch kept, error where the patch reads relative to it, error relative to all."""
        rows = []
        for name, exact in self.exact.items():
            change, error = exact - base[name], stored[name] - exact
            size = change.square().sum()
            read = (error @ self.directions[name]).square().sum()
            rows.append(torch.stack([1 + (error * change).sum() / size, (read / size).sqrt(), error.norm() / exact.norm()]))
        return dict(zip(("retention", "subspace", "noise"), torch.stack(rows).mean(0).tolist(), strict=True))


def windows(tokens: Tensor) -> Tensor:
    """int64 [windows, WINDOW] of [1, length]; shorter texts as they are."""
    whole = tokens.shape[1] // WINDOW * WINDOW
    return tokens[:, :whole].view(-1, WINDOW) if whole else tokens


def read(source: Source, name: str, device: str) -> Tensor:
    weight = source.weights[name]
    return decode_rows(source, weight, range(weight.rows)).reshape(weight.shape).to(device)


def changed(places: Sequence[Path], names: Iterable[str], device: str) -> list[dict[str, Tensor]]:
    sources = [open_whole(place) for place in places]
    return [{name: read(source, name, device) for name in names} for source in sources]
