"""The extension surface on one page: what a codec, a patch kind and a container have to be.

A new one is one file in `edgeport/codecs`, `edgeport/patches` or `converters` (or an installed package with an entry
point in the group of that name) that holds an object named `codec`, `patch_kind` or `converter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgeport.errors import ConvertError
from edgeport.tensor import Arrangement, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.checkpoint import Stored

Peek = Callable[[str], bytes]
"""The content of a small stored tensor, by name: what some formats keep there belongs into a header."""


class Source(Protocol):
    """A model on disk, opened by its headers. `read` is the only call that brings stored bytes into memory."""

    @property
    def path(self) -> Path: ...

    @property
    def container(self) -> str:
        """The converter's name."""
        ...

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Every weight by its transformers name, in the order of the file."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`, or what a container without one says in its place."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files whose bytes are the model's weights: what a manifest hashes."""
        ...

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop` of a stored tensor. Raises CorruptCheckpoint where the file ends early."""
        ...

    def assets(self, staging: Path) -> Mapping[str, Path]:
        """Config, tokenizer and generation files in transformers' form, by file name.

        A container that keeps them in another form writes them into `staging`, an empty folder, first.
        """
        ...


class Lined(Protocol):
    """What a source is, besides a `Source`, whose tensors may be stored turned (`Part.lines`)."""

    def read_lines(self, spec: TensorSpec, start: int, stop: int, lines: int) -> bytearray:
        """Bytes `start` to `stop` of each of a stored tensor's `lines` equal lines, one after the other.

        Raises CorruptCheckpoint where the file ends early.
        """
        ...


class Codec(Protocol):
    """A number format: which stored tensors spell a weight, and what a block of its rows means."""

    name: str
    formats: Mapping[str, str]
    """Format name to what it can do: "rw" read and write, "r" read only, "" copy only. "rp": read, and patched
    on the grid that a stored weight has (`edgeport.grid.Gridded`), not written from other numbers."""
    scratch: float
    """Temporary bytes an element that decode or encode takes beyond its input and output."""

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """The weights of an HF folder that are in this format, from headers, and from small tensors where it must be."""
        ...

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """How a weight of that shape is stored. Raises BlockMismatch, DecodeOnly."""
        ...

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        """Stored bytes of some rows (uint8 tensors, by part) to float32 [rows, columns], on the same device."""
        ...

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """float32 [rows, columns] to the bytes of those rows (uint8 tensors, by part).

        `importance` [columns]: mean square of each input channel, for codecs that weigh their error by it.
        A part of stride 0 is written with the first rows. What is no part of the weight is kept for `Finishing.finish`.
        """
        ...


@runtime_checkable
class Finishing(Protocol):
    """What a codec is, besides a `Codec`, that has to see a whole weight before it can write some of its parts."""

    def held_bytes(self, weight: Weight) -> int:
        """Memory that this takes while the weight passes."""
        ...

    def finish(self, weight: Weight, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole parts (uint8, by part) from what `encode` returned besides parts: all rows of it, in order, on the CPU."""
        ...


@runtime_checkable
class Cautioned(Protocol):
    """What a codec is, besides a `Codec`, whose numbers do not say all that was done to a model."""

    caution: str
    """What a user is told who patches such weights."""


class Applied(Protocol):
    def __call__(self, rows: range, matrix: Tensor) -> Tensor: ...


class Edit(Protocol):
    """What one patch does to one weight."""

    @property
    def target(self) -> str:
        """The transformers name of the weight."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The patch's tensors that this edit consumes."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape after the edit (a grown vocabulary has more rows)."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory for the edit's factors while its weight passes."""
        ...

    @property
    def semantics(self) -> str:
        """ "delta": a change is added to the new base. "operator": the base's value is computed anew or replaced."""
        ...

    @property
    def tied(self) -> bool:
        """Of an embedding that is also the head: whether the edit is meant for both."""
        ...

    def load(self, device: str) -> Applied:
        """Read the factors and return the function from (rows, float32 block) to the edited block."""
        ...


@runtime_checkable
class LowRankEdit(Protocol):
    """What an edit is, besides an `Edit`, that adds a product of two factors: an adapter can hold it."""

    @property
    def rank(self) -> int: ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """float32 up [rows, rank] and down [rank, columns], whose product is the change."""
        ...


@runtime_checkable
class Overwriting(Protocol):
    """What an edit is, besides an `Edit`, that is a change elsewhere and takes some rows as they are: those of new tokens."""

    @property
    def whole_rows(self) -> Sequence[int]: ...


class Patch(Protocol):
    """A fine-tune's change to its base, opened by its headers."""

    path: Path
    kind: str
    scale: float
    tensors: Mapping[str, TensorSpec]
    files: Sequence[Path]
    """Whatever the change depends on, the file that says its scale among them: what a manifest hashes."""
    facts: Mapping[str, Any]
    """What `inspect` shows: rank, true scaling, target modules ..."""

    def edits(self, new: Source, old: Source | None) -> Sequence[Edit]:
        """Every edit, checked against the new base's headers.

        With the `old` base, values that the patch replaces become differences to it.
        Raises TargetMissing, ShapeMismatch, UnsupportedPatch.
        """
        ...

    def assets(self) -> Mapping[str, Path]:
        """Tokenizer files that come with the patch and replace the base's (a grown vocabulary)."""
        ...


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """Two factors in an adapter's file: change of `target` = scaling * up @ down, the rows of up arranged as its."""

    target: str
    down: Stored
    up: Stored
    scaling: float
    arrangement: Arrangement


class OpenedAdapter(Protocol):
    """A low-rank patch in a container's own form."""

    arch: str
    alpha: float
    tensors: Mapping[str, Stored]

    def pairs(self, config: Mapping[str, Any]) -> Sequence[LowRankPair]:
        """Under the transformers names of the model with that config.json. Raises SourceError, UnsupportedPatch."""
        ...


@runtime_checkable
class AdapterReader(Protocol):
    """What a converter is, besides a `Converter`, whose container has a form for low-rank patches."""

    def is_adapter(self, path: Path) -> bool: ...

    def open_adapter(self, path: Path) -> OpenedAdapter: ...


class PatchKind(Protocol):
    name: str

    def detect(self, path: Path) -> bool:
        """Whether `path` looks like a patch of this kind."""
        ...

    def open(self, path: Path, scale: float) -> Patch:
        """Open by headers, to be applied `scale` times. Raises SourceError, UnsupportedPatch."""
        ...


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One output file, known to the byte before it is written.

    `blobs`: (offset, bytes) pairs known beforehand (headers, small constant tensors).
    `ranges`: offset of each stored tensor that the run will fill. What neither covers is zero padding.
    """

    name: str
    size: int
    blobs: tuple[tuple[int, bytes], ...]
    ranges: Mapping[str, int]


class Sink(Protocol):
    """A container as an output: pure, but for `finish`."""

    folder: bool
    """Whether the output is a folder (else one file, or several beside each other)."""
    importance: Mapping[str, Tensor] | None
    """[columns] of an importance matrix by weight name, where the user gave one."""

    notes: Sequence[str]
    """What the output will not do as the model does, for the user to hear before it is written."""

    def place(self, weight: Weight) -> Weight:
        """How the container will store this weight. Raises ConvertError, CodecError."""
        ...

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        """Names, sizes and byte ranges of all output files."""
        ...

    def finish(self, staging: Path) -> None:
        """Write the small companion files (config, tokenizer, index) into `staging`."""
        ...


@runtime_checkable
class Partial(Protocol):
    """What a sink is, besides a `Sink`, whose container may hold a part of the model alone; its notes say what it leaves."""

    def takes(self, name: str) -> bool:
        """Whether the weight of that name has a place in the output."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank change of one weight as an adapter stores it: down [rank, columns] and up [rows, rank], both plain."""

    target: str
    down: Weight
    up: Weight

    @property
    def rank(self) -> int:
        return self.down.rows


@runtime_checkable
class Adapting(Protocol):
    """What a sink is, besides a `Sink`, whose container has a form for a low-rank patch beside the model."""

    def factors(self, weight: Weight, rank: int) -> Factors:
        """How the adapter will store a change of the weight of that name and shape. Raises ConvertError."""
        ...

    def adapter(self, factors: Sequence[Factors], alpha: int) -> tuple[str, Sequence[FileLayout]]:
        """What an adapter of them is called, a file or folder of the output, and its files.

        Whoever loads it multiplies each product by `alpha` / rank.
        """
        ...


@runtime_checkable
class Promoting(Protocol):
    """What a sink is, besides a `Sink`, that obeys `Target.formats`."""

    def finer(self, weight: Weight) -> Sequence[Weight]:
        """How it would store the weight in finer formats than it does, the coarsest first."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What the user asked of an output container. A container refuses the options that it does not know."""

    output: Path
    quant: str | None = None
    max_shard_bytes: int | None = None
    imatrix: Path | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    formats: Mapping[str, str] = field(default_factory=dict)
    """The format of single weights, by name, whatever else is asked: what a promotion decides."""
    block_size: int | None = None
    asymmetric: bool = False
    portable: bool = False
    execution_provider: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json as it has to be after the patches (tie_word_embeddings, vocab_size)."""
    assets: Mapping[str, Path] = field(default_factory=dict)
    """Files of the patch that replace the source's own."""

    def refuse_onnx_options(self, container: str) -> None:
        """Raises ConvertError where one was given."""
        if self.block_size is not None or self.asymmetric or self.portable or self.execution_provider:
            raise ConvertError(
                f"--block-size, --asymmetric, --portable and --execution-provider are for --to onnx, not for --to {container}"
            )


class Scorer(Protocol):
    """A causal language model that says what comes next, for `edgeport.probe`."""

    @property
    def source(self) -> Source: ...

    @property
    def head(self) -> Weight:
        """The matrix of the logits: its rows are the vocabulary."""
        ...

    def hidden(self, tokens: Tensor) -> Tensor:
        """For int64 `tokens` [batch, length]: what `logits` is to be given, [batch, length, any]."""
        ...

    def logits(self, tokens: Tensor, hidden: Tensor, rows: range) -> Tensor:
        """float32 [batch, length, len(rows)]: logits of the tokens `rows` of the vocabulary."""
        ...


@runtime_checkable
class Executable(Protocol):
    """What a source is, besides a `Source`, whose container holds the program as well as the numbers."""

    @property
    def tolerance(self) -> float:
        """Mean KL to the model that it was made of, in nats, above which something is wrong."""
        ...

    def execute(self) -> Scorer:
        """The container's own program, run by its own runtime. Raises MissingExtra."""
        ...


@runtime_checkable
class Encoding(Protocol):
    """What a source is, besides a `Source`, that holds the program of an encoder."""

    @property
    def tolerance(self) -> float:
        """Error of an output, as a share of its root mean square, above which something is wrong."""
        ...

    def outputs(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The program's outputs, by name. Raises MissingExtra."""
        ...


class Converter(Protocol):
    """A container: recognises, opens and writes one."""

    name: str
    reads: bool
    writes: bool

    def detect(self, path: Path) -> bool:
        """Whether `path` looks like this container."""
        ...

    def open(self, path: Path) -> Source:
        """Open by headers. Raises SourceError."""
        ...

    def sink(self, source: Source, target: Target) -> Sink:
        """Raises ConvertError, UnknownName, before a byte is written."""
        ...
