"""What a port did to the model: the output beside the exact port and the base without the patch, on a short text.

Weights do not predict the model, so a port is judged by what all three say of the next token. With b the base, e the
exact port (the patch added in float32, never rounded or written) and o the output, the share of the patch's effect that
the output has is the projection of its log-probabilities on the patch's own change of them,

    kept = <e - b, log o - log b> / <e - b, log e - log b>
         = (KL(e||b) - KL(e||o) + KL(b||o)) / (KL(e||b) + KL(b||e)),

the second line by the three-point identity of Bregman divergences (Csiszar, Annals of Probability 3, 1975; Chen and
Teboulle, SIAM J. Optimization 3, 1993). It is 0 for the base and 1 for the exact port, and rounding noise that has
nothing to do with the patch leaves it there; below a half the output is nearer to the base. KL(e||o) beside it is the
usual figure for quantized models (llama.cpp's perplexity --kl-divergence; Dutta et al., arXiv 2407.09141).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.aside import Watch, serve
from edgeport.errors import CorruptCheckpoint
from edgeport.hub import called
from edgeport.locate import open_model, open_patch_at
from edgeport.manifest import manifest_of, read_manifest
from edgeport.matching import adapted_config, collect_edits, final_shape, with_ties
from edgeport.memory import peak_bytes
from edgeport.probing import Job, read_text
from edgeport.seams import Patch, Source
from edgeport.sizes import size
from edgeport.virtual import Patched
from edgeport.vocabulary import tokenizer_files

if TYPE_CHECKING:
    from torch import Tensor

HALF = 0.5
ERRORS = 2.0
"""Standard errors that the kept share has to lie beyond a half to count."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Means over the text's positions; divergences in nats, perplexities of the text's own tokens but the first."""

    text: str
    tokens: int
    kl: float
    """KL(exact port || output): what rounding changed."""
    patch_kl: float
    """KL(exact port || base): what the patch changes."""
    base_kl: float
    """KL(base || output)."""
    kept: float | None
    """Share of the patch's effect that the output has; None where the patch has none on this text."""
    kept_error: float | None
    """Standard error of `kept` over the positions."""
    top1: float
    """Share of the positions where exact port and output have the same most probable token."""
    perplexity: Mapping[str, float]
    """Of base, exact and output."""
    seconds: float
    peak_ram_bytes: int
    """Of the process that ran it, all libraries included."""

    @property
    def lost(self) -> bool:
        """Whether the output is nearer to the base than to the exact port, and not by chance of the text."""
        return self.kept is not None and self.kept_error is not None and self.kept + ERRORS * self.kept_error < HALF


def probe(job: Job, watch: Watch) -> Effect:
    """Run base, exact port and output on the text, a layer at a time. Raises EdgeportError where that cannot be done."""
    from edgeport.probe import open_tokenizer, probe_tokens

    began = time.perf_counter()
    base, exact = models(job)
    output = open_model(job.output)
    if job.adapter:
        output = ported(output, [open_patch_at(Path(job.adapter), 1.0)], None)
    text = read_text(Path(job.text)) if job.text else None
    # in tokens that the base has too, where the patch brings new ones
    tokens = probe_tokens(base if open_tokenizer(base) else exact, job.tokens, text)
    figures = measure(base, exact, output, tokens, watch)
    name = Path(job.text).name if job.text else "packaged"
    return Effect(
        text=name, tokens=tokens.shape[1], **figures, seconds=round(time.perf_counter() - began, 3), peak_ram_bytes=peak_bytes()
    )


def open_whole(path: Path) -> Source:
    """A model, with the adapter that its manifest says is part of it."""
    source = open_model(path)
    if not manifest_of(path).is_file():
        return source
    beside = read_manifest(path).get("adapter")
    if not beside:
        return source
    if not isinstance(beside, dict) or not isinstance(beside.get("path"), str):
        raise CorruptCheckpoint(f"the manifest of {called(path)} does not say which adapter belongs to it")
    folder = path if path.is_dir() else path.parent
    return ported(source, [open_patch_at(folder / Path(beside["path"]).name, 1.0)], None)


def models(job: Job) -> tuple[Source, Source]:
    """The base with the output's weights (a head that the patch unties), in its own vocabulary, and the exact port."""
    source, old = open_model(job.base), open_model(job.old) if job.old else None
    patches = [open_patch_at(Path(path), scale) for path, scale in job.patches]
    exact = ported(source, patches, old)
    unpatched = {name: (origin, (), origin.shape) for name, (origin, _, _) in exact.edits.items()}
    return Patched(source, unpatched, exact.config), exact


def ported(source: Source, patches: list[Patch], old: Source | None) -> Patched:
    found = collect_edits(source, patches, old)
    work = with_ties(source, found)
    edits = {name: (origin, todo, final_shape(origin, todo)) for name, origin, todo in work}
    return Patched(source, edits, adapted_config(source, work), tokenizer_files(source, patches, found)[0])


def measure(base: Source, exact: Source, output: Source, tokens: Tensor, watch: Watch) -> dict[str, Any]:
    """The figures of `Effect` on int64 `tokens` [1, length] of the base's, over the vocabulary that all three have."""
    from edgeport.forward import stream
    from edgeport.probe import score

    layers = 3 * size(base.config, "num_hidden_layers", 0)
    done = 0

    def layer() -> None:
        nonlocal done
        done += 1
        watch(f"probe: layer {done} of {layers}")

    # an output that is a program too is asked for its numbers alone: the program would load the whole model
    models = [stream(source, layer) for source in (base, exact, output)]
    vocabulary = min(model.head.rows for model in models)
    found = score(models, tokens, ((1, 2), (1, 0), (0, 2), (0, 1)), vocabulary)
    rounding, patch, away, back = (found.kl[pair] for pair in ((1, 2), (1, 0), (0, 2), (0, 1)))
    kept, error = share(patch - rounding + away, patch + back)
    tallies = found.tallies
    return {
        "kl": rounding.mean().item(), "patch_kl": patch.mean().item(), "base_kl": away.mean().item(),
        "kept": kept, "kept_error": error, "top1": (tallies[1].best == tallies[2].best).double().mean().item(),
        "perplexity": {name: tally.perplexity() for name, tally in zip(("base", "exact", "output"), tallies, strict=True)},
    }  # fmt: skip


def share(parts: Tensor, whole: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Ratio of the sums of float64 `parts` and `whole`, and its standard error over their elements, linearised.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.4 (ratio estimate).
    """
    total, count = whole.sum().item(), whole.numel()
    if total <= 0 or count < 2:
        return None, None
    ratio = parts.sum().item() / total
    spread = (parts - ratio * whole).square().sum().item() * count / (count - 1)
    return ratio, sqrt(spread) / total


def main(job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    return {"effect": asdict(probe(Job(**job | {"patches": tuple(map(tuple, job["patches"]))}), watch))}


if __name__ == "__main__":
    serve(main)
