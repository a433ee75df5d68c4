"""Which weight of the output gets which edits, ties and grown vocabularies included, and the config.json that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from edgeport.errors import ShapeMismatch, UnknownName, UnmappedTensor, UnsupportedPatch
from edgeport.hub import called
from edgeport.registry import miss
from edgeport.seams import Edit, LowRankEdit, Overwriting, Partial, Patch, Sink, Source
from edgeport.tensor import Weight
from edgeport.ties import INPUTS, Ends, ends, is_tied

DELTA, OPERATOR = "delta", "operator"

Work = tuple[str, Weight, tuple[Edit, ...]]
"""A weight of the output: its name, the stored weight that it starts from, and its edits in the order of the patches."""


def collect_edits(source: Source, patches: Sequence[Patch], old: Source | None) -> dict[str, list[list[Edit]]]:
    """Edits by target weight, one list a patch. Raises UnsupportedPatch for patch tensors that no edit consumes."""
    found: dict[str, list[list[Edit]]] = {}
    for index, patch in enumerate(patches):
        consumed: set[str] = set()
        for edit in patch.edits(source, old):
            found.setdefault(edit.target, [[] for _ in patches])[index].append(edit)
            consumed.update(edit.reads)
        left = sorted(set(patch.tensors) - consumed)
        if left:
            raise UnsupportedPatch(
                f"{len(left)} of the {len(patch.tensors)} tensors in {called(patch.path)} would not be merged: "
                f"{', '.join(left[:8])}{' ...' if len(left) > 8 else ''}"
            )
    return found


def with_ties(source: Source, edits: Mapping[str, list[list[Edit]]]) -> list[Work]:
    """One entry for each output weight: name, the stored weight it starts from, its edits in the order of the patches.

    On a tied base an edit of only one of embedding and head unties them: the head becomes a weight of its own. Where a
    tied base stores its head all the same, it gets what the embedding gets, unless the patch says another.
    """
    flat = {name: tuple(edit for part in parts for edit in part) for name, parts in edits.items()}
    work = [(name, weight, flat.get(name, ())) for name, weight in source.weights.items()]
    model = ends(source.weights)
    if model is None:
        if is_tied(source.weights, source.config):
            check_together(source, flat)
        return work
    parts = head_parts(source, model, edits)
    if parts is None:
        return work
    head = tuple(edit for part in parts for edit in part)
    if model.head in source.weights:
        return [(name, weight, head if name == model.head else todo) for name, weight, todo in work]
    if head == flat.get(model.embedding, ()):
        return work
    embedding = source.weights[model.embedding]
    return [*work, (model.head, embedding.named(model.head), head)]


def head_parts(source: Source, model: Ends, edits: Mapping[str, list[list[Edit]]]) -> list[Sequence[Edit]] | None:
    """What each patch does to a head that starts from the embedding; None where the head is a weight of its own."""
    untied = not is_tied(source.weights, source.config)
    if untied and (model.head in source.weights or model.head not in edits):
        return None
    none: list[list[Edit]] = [[] for _ in next(iter(edits.values()), [])]
    pairs = zip(edits.get(model.embedding, none), edits.get(model.head, none), strict=True)
    return [head_edits(below, own) for below, own in pairs]


def check_together(source: Source, edits: Mapping[str, Sequence[Edit]]) -> None:
    """Raises UnsupportedPatch where an embedding changes whose tied head has to stay, and cannot be stored."""
    alone = [name for name, todo in edits.items() if INPUTS.fullmatch(name) and not all(edit.tied for edit in todo)]
    if alone:
        raise UnsupportedPatch(
            f"the patch changes {alone[0]} and not the head that {called(source.path)} ties to it, and edgeport cannot store a "
            f"head for a model of type {source.config.get('model_type')}; train both together (PEFT's ensure_weight_tying)"
        )


def head_edits(below: Sequence[Edit], own: Sequence[Edit]) -> Sequence[Edit]:
    """One patch's edits of a tied head, given those of the embedding and those that name the head itself.

    A patch that was trained with both tied stores the same values under both names: the embedding's serve. What it adds to
    the head alone goes on top of what both share (PEFT's factors of a head over its trained rows).
    """
    shared = [edit for edit in below if edit.tied]
    if shared and all(edit.tied for edit in own):
        return shared
    return [*shared, *own] if all(isinstance(edit, LowRankEdit) for edit in own) else own


def taken(work: list[Work], sink: Sink) -> list[Work]:
    """What has a place in the output. Raises UnmappedTensor where a patch changes what has none."""
    if not isinstance(sink, Partial):
        return work
    lost = [name for name, _, todo in work if todo and not sink.takes(name)]
    if lost:
        raise UnmappedTensor(
            f"the patch changes {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}, which the output does not compute with"
        )
    return [entry for entry in work if sink.takes(entry[0])]


def final_shape(origin: Weight, edits: Sequence[Edit]) -> tuple[int, ...]:
    """The shape after all edits. Raises ShapeMismatch where two grow the vocabulary differently."""
    shapes = {edit.shape for edit in edits if edit.shape != origin.shape}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the patches grow {origin.name} to different shapes: {sorted(shapes)}")
    return shapes.pop() if shapes else origin.shape


def reshaped(origin: Weight, shape: tuple[int, ...]) -> Weight:
    return origin if shape == origin.shape else replace(origin, shape=shape)


def check_semantics(work: Sequence[Work], semantics: str | None) -> None:
    """Raises UnknownName; UnsupportedPatch where a change cannot be told from the value that stands for it."""
    if semantics not in (None, DELTA, OPERATOR):
        raise UnknownName(miss([DELTA, OPERATOR], semantics, "--semantics"))
    whole = [name for name, _, todo in work if any(edit.semantics == OPERATOR for edit in todo)]
    if semantics == DELTA and whole:
        raise UnsupportedPatch(
            f"the patch holds whole values for {', '.join(whole[:3])}{' ...' if len(whole) > 3 else ''}, whose change shows only "
            "beside the base that it was made on; give it as --old-base, or leave off --semantics delta"
        )


def check_order(source: Source, edits: Mapping[str, list[list[Edit]]], patches: Sequence[Patch]) -> None:
    """Raises UnsupportedPatch where a patch's whole values would take the place of what another has done before."""
    found: dict[str, Sequence[Sequence[Edit]]] = {**edits}
    model = ends(source.weights)
    if model and (head := head_parts(source, model, edits)):
        found[model.head] = head
    for name, parts in found.items():
        for index, part in enumerate(parts):
            earlier = max((prod(edit.shape[:-1]) for one in parts[:index] for edit in one), default=0)
            if any(isinstance(edit, Overwriting) and any(row < earlier for row in edit.whole_rows) for edit in part):
                raise UnsupportedPatch(
                    f"{called(patches[index].path)} has new tokens in {name}, which would take the place of those of an earlier "
                    "patch; port one of them, or train them as one"
                )
            if any(parts[:index]) and any(edit.semantics == OPERATOR for edit in part):
                raise UnsupportedPatch(
                    f"{called(patches[index].path)} holds whole values for {name}, which would undo what an earlier patch does; "
                    "give --old-base, beside which they are changes, or that patch first"
                )


def grows(work: Sequence[Work]) -> bool:
    """Whether a vocabulary grows."""
    return any(final_shape(origin, todo) != origin.shape for _, origin, todo in work)


def adapted_config(source: Source, work: Sequence[Work]) -> dict[str, Any]:
    """config.json as the edits make it: an untied head, a grown vocabulary."""
    todo = {name: edits for name, _, edits in work}
    changes: dict[str, Any] = {}
    model = ends(todo)
    if model and is_tied(source.weights, source.config) and todo.get(model.head, todo[model.embedding]) != todo[model.embedding]:
        changes["tie_word_embeddings"] = False
    rows = {final_shape(origin, todo)[0] for name, origin, todo in work if model and name in (model.embedding, model.head)}
    if len(rows) > 1:
        raise ShapeMismatch(
            f"embedding and head would have {' and '.join(map(str, sorted(rows)))} rows, where both need as many; if the patch "
            "has its new tokens in only one of them, give a new base that has them in both"
        )
    text = source.config.get("text_config")
    told = (text if isinstance(text, dict) else source.config).get("vocab_size")
    if rows and not grows(work) and told not in (None, *rows):
        raise ShapeMismatch(f"the embedding has {rows.pop()} rows, and config.json says vocab_size {told}")
    if grows(work) and rows:
        changes["vocab_size"] = rows.pop()
    if not changes or not isinstance(text, dict):
        return {**source.config, **changes}
    # of models with a text_config transformers 4 and 5 read the first word in different places
    outer = {key: value for key, value in changes.items() if key in source.config or key == "tie_word_embeddings"}
    return {**source.config, **outer, "text_config": {**text, **changes}}


def notes_on_values(work: Sequence[Work]) -> list[str]:
    """What the user should hear of whole values before they replace the base's."""
    replaced = [name for name, _, todo in work if any(edit.semantics == OPERATOR for edit in todo)]
    if not replaced:
        return []
    return [
        f"the patch holds whole values for {', '.join(replaced[:3])}{' ...' if len(replaced) > 3 else ''}; they replace "
        "the new base's own. With --old-base their change is added instead"
    ]
