"""A model that no file holds: a base with a patch's edits applied to its weights as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeport.blocks import decode_rows, known, padded
from edgeport.registry import codec
from edgeport.seams import Applied, Edit, Lined, Source
from edgeport.tensor import TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "F32"
SUFFIX = " with its edits"


class Patched:
    """The exact port: `source` with `edits` in float32, unrounded, and at most one weight's factors in memory."""

    def __init__(
        self,
        source: Source,
        edits: Mapping[str, tuple[Weight, Sequence[Edit], tuple[int, ...]]],
        config: Mapping[str, Any],
        tokenizer: Mapping[str, Path] | None = None,
    ) -> None:
        """`edits`: by weight name, the stored weight, what is done to it in order, and the shape that it then has.

        `tokenizer`: files in the place of the source's.
        """
        self.source, self.edits, self.config, self.tokenizer = source, edits, config, tokenizer or {}
        self.path, self.container, self.files = source.path, source.container, source.files
        self.weights: Mapping[str, Weight] = {
            name: computed(name, origin, shape) if todo else origin.named(name) for name, (origin, todo, shape) in edits.items()
        }
        self.loaded: tuple[str, list[Applied]] = "", []

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        if not spec.name.endswith(SUFFIX):
            return self.source.read(spec, start, stop)
        name = spec.name.removesuffix(SUFFIX)
        part, granule = self.weights[name].parts["data"], self.weights[name].granule
        rows = range(start // part.stride * granule, min(-(-stop // part.stride) * granule, self.weights[name].rows))
        return bytearray(self.rows(name, rows).numpy().tobytes())

    def read_lines(self, spec: TensorSpec, start: int, stop: int, lines: int) -> bytearray:
        """Of a weight without edits: the others have no lines."""
        return cast(Lined, self.source).read_lines(spec, start, stop, lines)

    def rows(self, name: str, rows: range) -> Tensor:
        """float32 [len(rows), columns], edited; whole granules of the stored weight."""
        origin, todo, _ = self.edits[name]
        if self.loaded[0] != name:
            self.loaded = "", []  # the last weight's factors go before the next one's come
            self.loaded = name, [edit.load("cpu") for edit in todo]
        matrix = padded(decode_rows(self.source, origin, known(origin, rows)), rows)
        for apply in self.loaded[1]:
            matrix = apply(rows, matrix)
        return matrix

    def assets(self, staging: Path) -> Mapping[str, Path]:
        return {**self.source.assets(staging), **self.tokenizer}


def computed(name: str, origin: Weight, shape: tuple[int, ...]) -> Weight:
    """A float32 weight that is cut where the stored one may be."""
    plain = codec("plain").layout(name, shape, FORMAT)
    part, granule = plain.parts["data"], origin.row_granule
    spec = replace(part.spec, name=name + SUFFIX)
    return replace(plain, parts={"data": replace(part, spec=spec, stride=part.stride * granule)}, granule=granule)
