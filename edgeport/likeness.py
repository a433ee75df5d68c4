"""Encoders on the same inputs: how far one's outputs are from another's, in the memory of one block of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeport.encoders import Encoder, encoder, shared, stored_names
from edgeport.errors import CorruptCheckpoint, MissingTensor, NonFiniteResult, UnsupportedArchitecture, VerificationFailed
from edgeport.forward import bind, build_class, meta_explained, read_whole
from edgeport.hub import called
from edgeport.memory import trim_heap
from edgeport.seams import Encoding, Source
from edgeport.sizes import size
from edgeport.tensor import Weight

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 2
LENGTH = 64
"""Tokens of each text, where the model has positions for so many."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Of each output that both have: the root mean square of the difference, as a share of the reference's own."""

    errors: Mapping[str, float]
    tolerance: float | None = None
    """What the candidate's precision explains; None: its container does not say."""

    measure = "the largest error"
    """What `distance` is."""

    @property
    def distance(self) -> float:
        return max(self.errors.values())

    def text(self) -> str:
        each = ", ".join(f"{name} {error:.3g}" for name, error in self.errors.items())
        return f"error as a share of each output's root mean square: {each}"

    def to_json(self) -> dict[str, Any]:
        return {"errors": dict(self.errors), "tolerance": self.tolerance}


def compare(reference: Source, candidate: Source) -> Likeness:
    """Run both on the same inputs. Raises VerificationFailed where they have not the same inputs, or no output in
    common, NonFiniteResult, and what `outputs_of` does."""
    known, other = known_encoder(reference), known_encoder(candidate)
    taken = [(one.dims(), one.config.get("vocab_size") if one.reads_text else None) for one in (known, other)]
    if taken[0] != taken[1]:
        words = [", ".join(f"{name} {list(dims)}" for name, dims in dims.items()) + (f" of {size} tokens" if size else "")
                 for dims, size in taken]  # fmt: skip
        raise VerificationFailed(f"the two encoders take {words[0]} and {words[1]}; only the same inputs are compared")
    reach = (size(source.config, "max_position_embeddings", LENGTH) for source in (reference, candidate))
    length = min(LENGTH, min(reach) // 2)
    given = known.example({"batch": BATCH, "length": length})
    theirs, ours = (outputs_of(source, given) for source in (reference, candidate))
    both = {name: (theirs[name], ours[name]) for name in theirs if name in ours}
    if not both or any(one.shape != other.shape for one, other in both.values()):
        shapes = [{name: list(values.shape) for name, values in outputs.items()} for outputs in (theirs, ours)]
        raise VerificationFailed(f"the two encoders give {shapes[0]} and {shapes[1]}; only the same outputs are compared")
    errors = {name: ((other - one).square().mean() / one.square().mean()).sqrt().item() for name, (one, other) in both.items()}
    return Likeness(errors, candidate.tolerance if isinstance(candidate, Encoding) else None)


def known_encoder(source: Source) -> Encoder:
    """Raises UnsupportedArchitecture for another kind of model."""
    found = encoder(source.config)
    if found is None:
        raise UnsupportedArchitecture(f"{called(source.path)} is no encoder, and its outputs cannot be compared with one's")
    return found


def outputs_of(source: Source, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """By the source's own program where it has one, else by transformers' code over the source's weights.

    Raises MissingTensor, CorruptCheckpoint, UnsupportedArchitecture, NonFiniteResult.
    """
    found = source.outputs(given) if isinstance(source, Encoding) else streamed(source, given)
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise NonFiniteResult(f"{called(source.path)} computes NaN or infinity in {name}; its weights are damaged")
    return found


def streamed(source: Source, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch
    from torch import nn

    known = known_encoder(source)
    model = build_class(source.config, known.architecture)
    spelled, part = stored_names(model, source.weights), model.get_submodule(known.part)
    table = part.get_input_embeddings() if known.reads_text else None
    owned: dict[str, dict[str, Weight]] = {}
    for name, whole in shared(model, known.part).items():
        path, _, attribute = name.rpartition(".")
        owned.setdefault(path, {})[attribute] = own(source, spelled.get(whole), whole, part.state_dict()[name].shape)
    for path, weights in owned.items():
        module = part.get_submodule(path)
        if isinstance(module, nn.Embedding) and module is not table:
            # some are read from without being called
            module.weight = nn.Parameter(read_whole(source, weights["weight"]), requires_grad=False)
        else:
            bind(module, source, weights, table=module is table)
    for stack in (module for module in part.modules() if isinstance(module, nn.ModuleList)):
        for layer in stack:
            layer.register_forward_hook(lambda *_: trim_heap())
    with torch.no_grad(), meta_explained(model):
        made = part(**given)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def own(source: Source, stored: str | None, name: str, shape: tuple[int, ...]) -> Weight:
    """The weight of the model's parameter `name`. Raises MissingTensor, CorruptCheckpoint."""
    if stored is None:
        raise MissingTensor(f"{called(source.path)} lacks {name}, which its config describes")
    weight = source.weights[stored]
    if weight.shape != tuple(shape):
        raise CorruptCheckpoint(f"{stored} has shape {list(weight.shape)} where config.json says {list(shape)}")
    return weight
