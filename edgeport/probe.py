"""Models on the same text: divergences, top-1 agreement and perplexity at every position, in the memory of one block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from sys import float_info
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeport.errors import CorruptCheckpoint, NonFiniteResult, NotACheckpoint, VerificationFailed, need
from edgeport.forward import BLOCK_ELEMENTS, block_rows, scorer, stream
from edgeport.hub import called
from edgeport.seams import Executable, Scorer, Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two models say of the next token, at each position of the text in order."""

    kl: tuple[float, ...]
    """KL(reference || candidate) in nats."""
    agree: tuple[bool, ...]
    """Whether both have the same most probable next token."""
    reference_perplexity: float
    """Of the text's own tokens but the first."""
    candidate_perplexity: float
    vocabulary: int
    """Tokens that both models have, over which the distributions are taken."""
    tolerance: float | None = None
    """Mean KL that the candidate's precision explains; None: its container does not say."""

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)

    distance = mean_kl
    measure = "mean KL"
    """What `distance` is."""

    def text(self) -> str:
        return f"mean KL {self.mean_kl:.3g} nats, largest {self.max_kl:.3g}, top-1 agreement {self.top1:.1%}"

    @property
    def max_kl(self) -> float:
        return max(self.kl)

    @property
    def top1(self) -> float:
        """Share of the positions that agree."""
        return sum(self.agree) / len(self.agree)

    def to_json(self) -> dict[str, Any]:
        return {
            "positions": len(self.kl),
            "vocabulary": self.vocabulary,
            "mean_kl": self.mean_kl,
            "tolerance": self.tolerance,
            "max_kl": self.max_kl,
            "top1": self.top1,
            "reference_perplexity": self.reference_perplexity,
            "candidate_perplexity": self.candidate_perplexity,
            "kl": list(self.kl),
            "agree": list(self.agree),
        }


def probe_tokens(source: Source, count: int = 256, text: str | None = None) -> Tensor:
    """int64 [1, count]: the start of a text (edgeport's own if None) in the model's own tokens; fewer if it is shorter.

    Raises NotACheckpoint where the model has no tokenizer.json.
    """
    import torch

    tokenizer = open_tokenizer(source)
    if tokenizer is None:
        raise NotACheckpoint(
            f"{called(source.path)} has no tokenizer.json to read the probe text with; "
            "save one beside the model with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return torch.tensor([tokenizer.encode(packaged_text() if text is None else text).ids[:count]], dtype=torch.int64)


def packaged_text() -> str:
    """A few pages of prose, talk, code, tables and formulas that no task is about."""
    return (files("edgeport") / "data" / "probe.txt").read_text(encoding="utf-8")


def open_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer in the source's assets, which cuts and pads nothing; None where there is none."""
    tokenizers = need("tokenizers", "hf")
    with TemporaryDirectory() as staging:
        path = source.assets(Path(staging)).get("tokenizer.json")
        if path is None:
            return None
        try:
            tokenizer: Tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # tokenizers raises nothing narrower
            raise CorruptCheckpoint(f"the tokenizer.json of {called(source.path)} cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def hidden_states(source: Source, tokens: Tensor) -> Tensor:
    """float32 [batch, length, hidden] after the final norm, for int64 `tokens` [batch, length].

    Raises UnsupportedArchitecture, MissingTensor, CorruptCheckpoint.
    """
    return stream(source).hidden(tokens)


def compare(reference: Source, candidate: Source, tokens: Tensor) -> Comparison:
    """KL, top-1 agreement and perplexity on int64 `tokens` [batch, length], of two tokens or more.

    Raises what `hidden_states` does, VerificationFailed for vocabularies that differ, and NonFiniteResult for a model
    that computes no numbers.
    """
    found = score((scorer(reference), scorer(candidate)), tokens, ((0, 1),))
    ours, theirs = found.tallies
    return Comparison(
        kl=tuple(found.kl[0, 1].flatten().tolist()),
        agree=tuple((ours.best == theirs.best).flatten().tolist()),
        reference_perplexity=ours.perplexity(),
        candidate_perplexity=theirs.perplexity(),
        vocabulary=found.vocabulary,
        tolerance=candidate.tolerance if isinstance(candidate, Executable) else None,
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """What several models say of the next token at every position."""

    tallies: tuple[Tally, ...]
    kl: Mapping[tuple[int, int], Tensor]
    """float64 [batch, length]: KL(first || second) in nats, by the numbers of the two models."""
    vocabulary: int


def score(models: Sequence[Scorer], tokens: Tensor, pairs: Sequence[tuple[int, int]], vocabulary: int | None = None) -> Scores:
    """Run every model on int64 `tokens` [batch, length], and take the divergences of `pairs` of them, over the first `vocabulary`
    tokens (None: over those that all have, if that is known).

    Neither a whole model nor the logits of a whole vocabulary are ever in memory: all models' logits pass in blocks of
    the vocabulary, and running sums of exponentials go along.
    """
    import torch

    if tokens.shape[1] < 2:
        raise VerificationFailed("a comparison needs a text of at least two tokens")
    vocabulary = vocabulary or common_vocabulary(models)
    states = [finite(model.hidden(tokens), model) for model in models]
    tallies = tuple(Tally.start(tokens) for _ in models)
    # sum of exp(logit - peak) * (logit - the other's logit) over the vocabulary so far
    gaps = {pair: torch.zeros_like(tallies[0].mass) for pair in pairs}
    for rows in vocabulary_blocks(models, tokens.numel(), vocabulary):
        logits = [finite(model.logits(tokens, hidden, rows), model) for model, hidden in zip(models, states, strict=True)]
        added = [tally.add(one, rows) for tally, one in zip(tallies, logits, strict=True)]
        for first, second in pairs:
            shares, shrink = added[first]
            gap = (shares * (logits[first] - logits[second])).sum(-1, dtype=torch.float64)
            gaps[first, second] = gaps[first, second] * shrink + gap
    kl = {
        # rounding can leave a divergence of nothing a little below it
        (first, second): (
            gap / tallies[first].mass - tallies[first].log_mass() + tallies[second].log_mass()
        ).clamp(min=0)
        for (first, second), gap in gaps.items()
    }
    return Scores(tallies, kl, vocabulary)


@dataclass(slots=True)
class Tally:
    """One model's next-token distributions over the part of the vocabulary seen so far. All [batch, length]."""

    peak: Tensor
    """float32: the greatest logit."""
    mass: Tensor
    """float64: sum of exp(logit - peak)."""
    best: Tensor
    """int64: the token of the greatest logit; of several, the first."""
    target: Tensor
    """int64: the token that the text goes on with; -1 at its end."""
    target_logit: Tensor

    @classmethod
    def start(cls, tokens: Tensor) -> Tally:
        import torch

        nothing = torch.zeros(tokens.shape, dtype=torch.float32)
        target = tokens.roll(-1, dims=1)
        target[:, -1] = -1
        return cls(nothing - torch.inf, nothing.double(), target.clone(), target, nothing.clone())

    def add(self, logits: Tensor, rows: range) -> tuple[Tensor, Tensor]:
        """Take in float32 logits [batch, length, len(rows)] of the tokens `rows`.

        Returns exp(logits - peak) under the new peak, and the factor that brings sums under the old peak to the new.
        """
        import torch

        value, index = logits.max(-1)
        self.best = torch.where(value > self.peak, index + rows.start, self.best)
        peak = torch.maximum(value, self.peak)
        shrink = (self.peak - peak).double().exp()
        shares = (logits - peak.unsqueeze(-1)).exp_()
        self.mass = self.mass * shrink + shares.sum(-1, dtype=self.mass.dtype)
        self.peak = peak
        place = (self.target - rows.start).clamp(0, len(rows) - 1).unsqueeze(-1)
        here = (self.target >= rows.start) & (self.target < rows.stop)
        self.target_logit = torch.where(here, logits.gather(-1, place).squeeze(-1), self.target_logit)
        return shares, shrink

    def log_mass(self) -> Tensor:
        """float64 log of the sum of exp(logit)."""
        return self.peak + self.mass.log()

    def perplexity(self) -> float:
        """exp of the mean of -log p(target), over the positions that have one, as far as float64 goes."""
        surprise = self.log_mass() - self.target_logit
        return surprise[:, :-1].mean().exp().clamp(max=float_info.max).item()


def finite(values: Tensor, model: Scorer) -> Tensor:
    """What the model computed. Raises NonFiniteResult where it is no numbers."""
    if not bool(values.isfinite().all()):
        raise NonFiniteResult(
            f"{called(model.source.path)} computes NaN or infinity on the probe text; its weights are damaged"
        )
    return values


def vocabulary_blocks(models: Sequence[Scorer], positions: int, vocabulary: int) -> Iterator[range]:
    """Cut the vocabulary so that a block of any head, and the logits it gives, stay about BLOCK_ELEMENTS."""
    step = min(*(block_rows(model.head) for model in models), max(BLOCK_ELEMENTS // positions, 1))
    for start in range(0, vocabulary, step):
        yield range(start, min(start + step, vocabulary))


def common_vocabulary(models: Sequence[Scorer]) -> int:
    """The number of tokens that all heads have. Raises VerificationFailed unless further rows are mere padding."""
    sizes = [model.head.rows for model in models]
    if len(set(sizes)) == 1:
        return sizes[0]
    tokenizers = [open_tokenizer(model.source) for model in models]
    # a missing tokenizer leaves open what the further rows are
    used = [max(tokenizer.get_vocab().values()) + 1 if tokenizer else max(sizes) for tokenizer in tokenizers]
    if max(used) > min(sizes):
        names = [called(model.source.path) for model in models]
        others = "".join(f", {name} one of {size}" for name, size in zip(names[1:], sizes[1:], strict=True))
        raise VerificationFailed(
            f"{names[0]} has a vocabulary of {sizes[0]}{others}, and {max(used)} tokens may be in use; models are compared "
            "over one vocabulary, or one and its padding"
        )
    return min(sizes)
