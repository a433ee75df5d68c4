"""Whose tokenizer an output gets: the new base's, or that of a patch that brings tokens of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeport.patches.names import find
from edgeport.seams import Edit, Patch, Source


def tokenizer_files(source: Source, patches: Sequence[Patch], edits: Mapping[str, list[list[Edit]]]) -> dict[str, Path]:
    """The files that take the place of the source's own, by name. `edits`: by target, one list a patch."""
    return {
        name: path
        for index, patch in enumerate(patches)
        if grows(source, {target: parts[index] for target, parts in edits.items()})
        for name, path in patch.assets().items()
    }


def grows(source: Source, edits: Mapping[str, Sequence[Edit]]) -> bool:
    """Whether one patch's edits change the shape of a weight."""
    return any(
        edit.shape != weight.shape for name, todo in edits.items() for edit in todo if (weight := find(name, source.weights))
    )
