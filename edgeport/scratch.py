"""The file without a name in which layers' inputs on a text go from the process that runs the text to the one that rounds.

All in bfloat16: of every layer the exact port's, [tokens, columns], as long as the file is there; and behind them, of one
layer after the other, those in the port that is being made, and how the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

from edgeport.checkpoint import fill
from edgeport.staging import write_at

if TYPE_CHECKING:
    from torch import Tensor

NUMBER_BYTES = 2


class Place(NamedTuple):
    """Where what a layer is given lies, and how it was cut."""

    inputs: int
    """Offset of [tokens, columns]: in the port that is being made."""
    drift: int
    """Offset, for each `group` tokens, of [columns, group]: those inputs, less the exact port's."""
    tokens: int
    group: int


class Notes:
    """Writes the inputs of layers on a text that comes in groups of tokens."""

    def __init__(self, handle: int, groups: Sequence[Tensor]) -> None:
        self.handle = handle
        self.sizes = [group.numel() for group in groups]
        self.group = 0
        """The one that is being run."""
        self.exact_at: dict[str, int] = {}
        """Offset of the exact port's inputs, by weight."""
        self.end = 0
        self.last: dict[int, tuple[Callable[[], Tensor | None], str]] = {}
        """By group the inputs that were noted last, while they live, and of which weight: several layers are given the same."""

    def exact(self, weight: str, inputs: Tensor) -> None:
        same = self.noted_as(weight, inputs)
        if same:
            self.exact_at[weight] = self.exact_at[same]
            return
        size = NUMBER_BYTES * inputs.shape[-1]
        if weight not in self.exact_at:
            self.exact_at[weight] = self.end
            self.end += size * sum(self.sizes)
        write_at(self.handle, content(bfloat16(inputs)), self.exact_at[weight] + size * self.before)

    def port(self, weight: str, inputs: Tensor) -> Place:
        """Behind all of the exact port's inputs; what was noted there before goes."""
        import torch

        size = NUMBER_BYTES * inputs.shape[-1]
        place = Place(self.end, self.end + size * sum(self.sizes), sum(self.sizes), self.sizes[0])
        if not self.noted_as(weight, inputs):
            ours = bfloat16(inputs)
            exact = torch.empty_like(ours)
            read(exact, self.handle, self.exact_at[weight] + size * self.before)
            write_at(self.handle, content(ours), place.inputs + size * self.before)
            write_at(self.handle, content((ours - exact).T.contiguous()), place.drift + size * self.before)
        return place

    @property
    def before(self) -> int:
        """Tokens of the groups before this one."""
        return sum(self.sizes[: self.group])

    def noted_as(self, weight: str, inputs: Tensor) -> str | None:
        """The weight for which the same inputs were noted just before."""
        found, name = self.last.get(self.group, (lambda: None, ""))
        if found() is inputs:
            return name
        self.last[self.group] = ref(inputs), weight
        return None


def read_drift(handle: int, place: Place, columns: int, some: slice) -> Tensor:
    """bfloat16 [some columns, tokens], of a layer with so many columns."""
    import torch

    found = torch.empty(some.stop - some.start, place.tokens, dtype=torch.bfloat16)
    for first in range(0, place.tokens, place.group):
        group = found[:, first : first + place.group]
        piece = torch.empty(group.shape, dtype=torch.bfloat16)
        read(piece, handle, place.drift + NUMBER_BYTES * (first * columns + some.start * piece.shape[1]))
        group.copy_(piece)
    return found


def read(matrix: Tensor, handle: int, offset: int) -> None:
    """Fill a matrix that lies in one piece."""
    fill(content(matrix), handle, offset, "the layers' inputs")


def bfloat16(inputs: Tensor) -> Tensor:
    """[tokens, columns], in one piece."""
    import torch

    return inputs.reshape(-1, inputs.shape[-1]).to(torch.bfloat16).contiguous()


def content(matrix: Tensor) -> memoryview:
    """The memory of a matrix that lies in one piece."""
    import torch

    data: memoryview = matrix.view(torch.uint8).numpy().reshape(-1).data
    return data
