"""Whose tokenizer an output gets: the new base's, or that of a patch that brings tokens of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeport.errors import ConvertError
from edgeport.hub import called
from edgeport.manifest import sha256
from edgeport.patches.edits import ReplaceRows
from edgeport.patches.names import find
from edgeport.seams import Edit, Patch, Source
from edgeport.ties import is_end

TOKENIZER = "tokenizer.json"


def tokenizer_files(
    source: Source, patches: Sequence[Patch], edits: Mapping[str, list[list[Edit]]]
) -> tuple[dict[str, Path], list[str]]:
    """The files that take the place of the source's own, by name, and what there is to be said of those that do not.

    `edits`: by target, one list a patch.
    """

    @cache
    def known() -> bytes:
        with TemporaryDirectory() as staging, suppress(ConvertError):
            return text_of(source.assets(Path(staging)))
        return b""

    taken: dict[str, Path] = {}
    notes = []
    for index, patch in enumerate(patches):
        files = patch.assets()
        own = {target: parts[index] for target, parts in edits.items()}
        if grows(source, own):
            taken |= files
        # nearly always the same file, which is not worth the memory that its tokens take as objects
        elif (text := text_of(files)) and text != known():
            theirs, ours = rows_of(text), rows_of(known())
            if not theirs or not ours or theirs == ours:
                continue
            new = {row for text, row in theirs.items() if ours.get(text) != row}
            if trained(own, new, new - set(ours.values())):
                taken |= files
            else:
                other = sorted(dict(theirs.items() ^ ours.items()))
                brought = "whose rows it brings, and for which the base has other names"
                brought = brought if trained(own, new, new) else "which the patch brings no rows for"
                notes.append(
                    f"the tokenizer beside {called(patch.path)} has other tokens than the new base's ({', '.join(other[:3])}"
                    f"{' ...' if len(other) > 3 else ''}), {brought}; the base's is kept, so copy the other into the output "
                    "if it is meant"
                )
    return taken, notes


def grows(source: Source, edits: Mapping[str, Sequence[Edit]]) -> bool:
    """Whether one patch's edits change the shape of a weight."""
    return any(
        edit.shape != weight.shape for name, todo in edits.items() for edit in todo if (weight := find(name, source.weights))
    )


def trained(edits: Mapping[str, Sequence[Edit]], new: set[int], unused: set[int]) -> bool:
    """Whether one patch's edits change rows of the vocabulary for its sake: single ones that stand for `new` tokens, or all of
    a vocabulary of which the base has left these `unused`."""
    todo = [edit for name in edits if is_end(name) for edit in edits[name]]
    return any(
        new.intersection(edit.indices) if isinstance(edit, ReplaceRows) else unused.intersection(range(edit.shape[0]))
        for edit in todo
    )


def other_tokens(one: Source, other: Source) -> bool:
    """Whether two folders' tokenizers have other tokens, or the same in other rows, as far as both can be read."""
    files = [source.path / TOKENIZER for source in (one, other)]
    if not all(path.is_file() for path in files) or sha256(files[0]) == sha256(files[1]):
        return False
    first, second = (rows_of(path.read_bytes()) for path in files)
    return bool(first and second) and first != second


def text_of(files: Mapping[str, Path]) -> bytes:
    return files[TOKENIZER].read_bytes() if TOKENIZER in files else b""


def rows_of(text: bytes) -> Mapping[str, int]:
    """The rows of a tokenizer.json's tokens, added ones among them; none where they cannot be read."""
    # what else may stand there is for those to judge who use it
    with suppress(ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        told = json.loads(text)
        listed = told["model"]["vocab"]
        pairs = [*(listed.items() if isinstance(listed, dict) else ((piece[0], row) for row, piece in enumerate(listed)))]
        pairs += [(added["content"], added["id"]) for added in told["added_tokens"]]
        return {str(text): int(row) for text, row in pairs}
    return {}
