"""Tensors and weights as headers know them: names, formats, shapes and byte counts, and no data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
"""The two weights that a model may tie: a tied model has no head of its own."""
BUFFER = re.compile(r"(?:.*\.)?(?:rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|self_attn\.[qkv]_scale)")


def is_buffer(name: str) -> bool:
    """Whether it is a table that old checkpoints store (Llama 2's) and every program computes for itself, or the scale of
    an 8-bit cache (compressed-tensors' kv_cache_scheme), which a program whose cache has 16 bits has no use for."""
    return BUFFER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor before it is read. `dtype` is the container's own word for its format."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a weight, and how its bytes follow the weight's rows.

    A granule of rows takes `stride` bytes, in order; a stride of 0 means a table that every row needs whole.
    A tensor that is stored turned, with the weight's rows along its columns, is so many `lines`: each has its piece
    of every granule, and the pieces of all lines together, one after the other, spell the rows.

        lines = 3:   | granule 0 | granule 1 | ... |      rows of granule 1: the second piece of each line
                     | granule 0 | granule 1 | ... |
                     | granule 0 | granule 1 | ... |
    """

    spec: TensorSpec
    stride: int
    lines: int = 1

    @property
    def pitch(self) -> int:
        """Bytes from the start of one line to the next."""
        return self.spec.nbytes // self.lines

    def span(self, rows: range, granule: int) -> tuple[int, int]:
        """The byte range, in each line, that spells `rows`, which start at a multiple of `granule`."""
        if not self.stride:
            return 0, self.spec.nbytes
        return rows.start // granule * self.stride, min(-(-rows.stop // granule) * self.stride, self.pitch)

    def size(self, rows: range, granule: int) -> int:
        """Bytes that spell `rows`."""
        start, stop = self.span(rows, granule)
        return (stop - start) * self.lines


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a container arranges a weight's values, relative to transformers: stored = permuted(value) + shift.

    `heads`: the rows of each of so many attention heads go from two halves to interleaved pairs, as GGUF keeps
    the q and k of the Llama family (0: as they are). `shift`: GGUF keeps Gemma's norm weights with 1 added.
    """

    heads: int = 0
    shift: float = 0.0


AS_IS = Arrangement()


@dataclass(frozen=True, slots=True)
class OnePart(Mapping[str, Part]):
    """The parts of a weight that one stored tensor spells: a fifth of a dict's memory, and models have thousands."""

    role: str
    part: Part

    def __getitem__(self, role: str) -> Part:
        if role != self.role:
            raise KeyError(role)
        return self.part

    def __iter__(self) -> Iterator[str]:
        return iter((self.role,))

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the model under its transformers name, and the stored tensors that spell it.

    Rows are the product of all dimensions but the last; a vector is one row. Rows are read and written in
    multiples of `granule`, which is as small as the format and the arrangement allow.
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    format: str
    parts: Mapping[str, Part]
    granule: int = 1
    arrangement: Arrangement = field(default=AS_IS)
    parameters: object = None
    """What else the codec has to know of this weight (block size, bits), in a type of the codec's own."""

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.spec.nbytes for part in self.parts.values())

    @property
    def row_granule(self) -> int:
        """Rows that must stay together: the format's granule, and whole heads where rows are permuted."""
        if not self.arrangement.heads or self.rows == 1:
            return self.granule
        head = self.rows // self.arrangement.heads
        return head if head % self.granule == 0 else head * self.granule

    def named(self, name: str) -> Weight:
        """The same stored tensors under another weight's name (a tied head read from the embedding)."""
        return replace(self, name=name)
