"""What can go wrong, as one tree.

EdgeportError                     for users: one sentence, the CLI prints it and exits with `exit_code`
|-- SourceError                   NotACheckpoint, CorruptCheckpoint, MissingTensor
|-- PatchError                    UnsupportedPatch, TargetMissing, ShapeMismatch, WrongBase, NotPortable,
|                                 NonFiniteResult, PatchLost
|-- CodecError                    BlockMismatch, DecodeOnly, AmbiguousFormat
|-- ConvertError                  UnsupportedArchitecture, UnmappedTensor
|-- OutputError                   OutputExists, IncompleteOutput, VerificationFailed, NotResumable, BrokenOff,
|                                 NotEnoughDisk, BudgetTooSmall
|-- DeviceFailed                  a CUDA device that is there and does not work
`-- UnknownName                   a registry miss: the nearest match and the known names
PlanViolation(RuntimeError)       a converter wrote what it had not planned: a bug of ours, with its traceback
MissingExtra(ImportError)         an optional package is absent: the sentence says what to install

A message says what was expected, what came, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


class EdgeportError(Exception):
    """A mistake that its user can mend. `tensor` names the tensor it happened in, where there is one."""

    exit_code = 1
    tensor: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.tensor}: {text}" if self.tensor and self.tensor not in text else text


class SourceError(EdgeportError):
    """A model or patch on disk cannot be read."""


class NotACheckpoint(SourceError):
    """The path holds nothing that edgeport knows how to read."""


class CorruptCheckpoint(SourceError):
    """The file contradicts itself or its own size."""


class MissingTensor(SourceError):
    """A tensor that the checkpoint promises is not in it."""


class PatchError(EdgeportError):
    """A patch cannot be applied to this base."""


class UnsupportedPatch(PatchError):
    """A patch kind, or an option of one, that edgeport does not merge."""


class TargetMissing(PatchError):
    """The patch changes a weight that the base does not have."""


class ShapeMismatch(PatchError):
    """The patch was made for a weight of another shape."""


class WrongBase(PatchError):
    """The old base is not the one that the patch was made on."""


class NotPortable(PatchError):
    """The portability gate refuses the patch."""

    exit_code = 3


class NonFiniteResult(PatchError):
    """NaN or infinity in a base, in a patch, or in what they add up to."""


class PatchLost(PatchError):
    """Rounding to the output's format would erase the patch."""


class CodecError(EdgeportError):
    """A number format cannot hold, or cannot be read as, what is asked."""


class BlockMismatch(CodecError):
    """A row does not divide into the format's blocks."""


class DecodeOnly(CodecError):
    """The format can be read and not written."""


class AmbiguousFormat(CodecError):
    """The stored tensors do not say which number format they are in."""


class ConvertError(EdgeportError):
    """A model cannot be expressed in the output's container."""


class UnsupportedArchitecture(ConvertError):
    """The container has no table for this model family."""


class UnmappedTensor(ConvertError):
    """The container has no name for this tensor."""


class OutputError(EdgeportError):
    """The output cannot be written, or is not what it should be."""


class OutputExists(OutputError):
    """Something stands where the output should go."""


class IncompleteOutput(OutputError):
    """An output lacks a file, or a file lacks bytes."""


class VerificationFailed(OutputError):
    """An output differs from its manifest or from its reference."""


class NotResumable(OutputError):
    """An interrupted run was of other inputs, or was told otherwise."""


class BrokenOff(OutputError):
    """A process of ours ended before its work, as another program's hunger for memory ends it; the same run would go on."""


class NotEnoughDisk(OutputError):
    """The plan needs more disk than there is."""

    exit_code = 4


class BudgetTooSmall(OutputError):
    """The plan does not fit the memory it was given."""

    exit_code = 4


class DeviceFailed(EdgeportError):
    """A CUDA device cannot be used."""


class UnknownName(EdgeportError):
    """A name, a number or a size of the command line that means nothing: a mistake of usage."""

    exit_code = 2


class PlanViolation(RuntimeError):
    """A converter wrote what it had not planned."""


class MissingExtra(ImportError):
    """An optional package is not installed."""


@contextmanager
def about(tensor: str) -> Iterator[None]:
    """Name `tensor` in every edgeport error that passes, so that no function need carry the name along."""
    try:
        yield
    except EdgeportError as error:
        error.tensor = error.tensor or tensor
        raise
    except Exception as error:
        error.add_note(f"while working on {tensor}")
        raise


def need(module: str, extra: str) -> ModuleType:
    """Import an optional `module`, or say which of edgeport's extras brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is not installed: pip install 'edgeport[{extra}]'") from error
