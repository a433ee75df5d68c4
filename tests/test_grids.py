"""Grids of stored blocks: their values are what gguf-py decodes, and codes move while scales stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edgeport import registry
from edgeport.codecs.ggml import TYPES, codec
from edgeport.codecs.ggml_grids import LAYOUTS
from edgeport.errors import DecodeOnly
from edgeport.grid import SMALLEST_PIECE, Grid, Gridded
from edgeport.tensor import Weight
from tests.test_device import Slices

ROWS, COLUMNS = 12, 512
FORMATS = list(LAYOUTS)


def layout(format: str, rows: int = ROWS) -> Weight:
    return codec.layout("w", (rows, COLUMNS), format)


def encoded(format: str) -> torch.Tensor:
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02
    matrix[3] = 0.0
    matrix[4, :64] = 0.01
    return codec.encode(layout(format), matrix, None)["data"]


def arbitrary(format: str) -> torch.Tensor:
    """Random bytes: scales of either sign, infinite, no numbers, subnormal."""
    return torch.randint(0, 256, (layout(format).nbytes,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


STORED = {"encoded": encoded, "arbitrary": arbitrary}


def decoded(format: str, stored: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = gguf.dequantize(stored.numpy().reshape(1, -1), gguf.GGMLQuantizationType(TYPES[format].id))
    return cast(np.ndarray, values).reshape(-1, COLUMNS)


def random_codes(grid: Grid, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(grid.levels), grid.codes.shape, generator=generator).to(torch.uint8)


def same_bits(values: torch.Tensor, reference: np.ndarray) -> bool:
    """To the sign of a zero; a NaN may be any NaN."""
    ours, known = values.numpy(), ~np.isnan(reference)
    return bool(np.isnan(ours[~known]).all() and np.array_equal(ours[known].view(np.uint32), reference[known].view(np.uint32)))


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest, format: str) -> torch.Tensor:
    return STORED[request.param](format)


def test_values_are_the_decoded_ones(format: str, stored: torch.Tensor) -> None:
    grid = codec.grid(layout(format), {"data": stored})
    assert grid.codes.dtype == torch.uint8 and grid.codes.shape == (ROWS, COLUMNS)
    assert grid.step.dtype == grid.offset.dtype == grid.levels.dtype == torch.float32
    assert grid.step.shape == grid.offset.shape == (ROWS, COLUMNS // grid.group)
    assert torch.equal(grid.levels, grid.levels.sort().values) and int(grid.codes.max()) < len(grid.levels)
    assert grid.uniform == bool((grid.levels.diff() == 1).all())
    assert same_bits(grid.values(), decoded(format, stored))


def test_own_codes_change_nothing(format: str, stored: torch.Tensor) -> None:
    parts = {"data": stored}
    before = stored.clone()
    assert torch.equal(codec.with_codes(layout(format), parts, codec.grid(layout(format), parts).codes)["data"], before)
    assert torch.equal(stored, before)


def test_other_codes_are_what_gguf_py_decodes(format: str, stored: torch.Tensor) -> None:
    grid = codec.grid(layout(format), {"data": stored})
    codes = random_codes(grid)
    before = codes.clone()
    ported = codec.with_codes(layout(format), {"data": stored}, codes)["data"]
    assert torch.equal(codes, before)
    assert same_bits(grid.values(codes), decoded(format, ported))
    after = codec.grid(layout(format), {"data": ported})
    assert torch.equal(after.codes, codes)
    assert torch.equal(after.step.view(torch.int32), grid.step.view(torch.int32))
    assert torch.equal(after.offset.view(torch.int32), grid.offset.view(torch.int32))


def test_every_bit_is_a_code_or_stays(format: str) -> None:
    """Codes of all zeros and all ones: what is equal in both is scales, of the number of bits that ggml-common.h gives."""
    weight, stored = layout(format), arbitrary(format)
    last = len(codec.grid(weight, {"data": stored}).levels) - 1
    codes = [torch.full((ROWS, COLUMNS), code, dtype=torch.uint8) for code in (0, last)]
    ported = [codec.with_codes(weight, {"data": stored}, code)["data"].view(-1, TYPES[format].nbytes) for code in codes]
    moved = (ported[0] ^ ported[1]).numpy()
    own = stored.view(-1, TYPES[format].nbytes).numpy()
    width = last.bit_length()
    bits = np.unpackbits(moved, axis=1)
    # two's complement and sign-magnitude do not flip every bit between their ends
    if format not in ("Q8_0", "MXFP4"):
        assert (bits.sum(1) == TYPES[format].size * width).all()
        assert not ((ported[0].numpy() ^ own) & ~moved).any()
    scales = TYPES[format].nbytes - TYPES[format].size * width // 8
    touched = np.bitwise_or.reduce(ported[0].numpy() ^ own | ported[1].numpy() ^ own, axis=0) != 0
    assert (~touched).sum() >= scales


def test_q4_0_by_hand() -> None:
    # d = 0.5; column 0 in the low half of the first byte, column 16 in its high half
    stored = torch.tensor(list(bytes.fromhex("0038") + bytes([0x70] + [0x88] * 15)), dtype=torch.uint8)
    weight = codec.layout("w", (1, 32), "Q4_0")
    grid = codec.grid(weight, {"data": stored})
    assert (grid.codes[0, 0], grid.codes[0, 16], grid.codes[0, 1], grid.group) == (0, 7, 8, 32)
    assert grid.values()[0, [0, 16, 1]].tolist() == [-4.0, -0.5, 0.0]
    codes = grid.codes.clone()
    codes[0, 0] = 15
    assert codec.with_codes(weight, {"data": stored}, codes)["data"].tolist() == [0x00, 0x38, 0x7F] + [0x88] * 15


def close(grid: Grid, target: torch.Tensor) -> None:
    """The contract of `bracket`, against values in double precision."""
    low, high, fraction = grid.bracket(target)
    first, second = grid.values(low).double(), grid.values(high).double()
    ends = [grid.values(torch.full_like(grid.codes, code)).double() for code in (0, len(grid.levels) - 1)]
    bottom, top = torch.minimum(*ends), torch.maximum(*ends)
    clamped = torch.maximum(torch.minimum(target.double(), top), bottom)
    usable = (grid.step.isfinite() & grid.offset.isfinite() & (grid.step != 0)).repeat_interleave(grid.group, 1)
    fine = usable & top.isfinite() & bottom.isfinite()
    # rounding of a product and a sum on the way, in units of the larger term
    ulp = 4 * torch.finfo(torch.float32).eps * torch.maximum(torch.maximum(bottom.abs(), top.abs()), clamped.abs())
    assert ((high == low) | (high == low + 1)).all() and int(high.max()) < len(grid.levels)
    assert ((fraction >= 0) & (fraction < 1)).all() and ((fraction > 0) == (high > low)).all()
    assert (torch.minimum(first, second) <= clamped + ulp)[fine].all()
    assert (torch.maximum(first, second) >= clamped - ulp)[fine].all()
    assert ((first + fraction * (second - first) - clamped).abs() <= ulp)[fine].all()
    assert torch.equal(low[~usable], grid.codes[~usable]) and torch.equal(high[~usable], grid.codes[~usable])
    # no level lies between the two that differ
    assert (high - low <= 1).all() and (first != second)[fine & (fraction > 0)].all()


def test_bracket(format: str, stored: torch.Tensor) -> None:
    grid = codec.grid(layout(format), {"data": stored})
    spread = (grid.step.abs() * (grid.levels[-1] - grid.levels[0])).nan_to_num(1.0, 1.0).repeat_interleave(grid.group, 1)
    noise = torch.randn(grid.codes.shape, generator=torch.Generator().manual_seed(4))
    for size in (0.01, 0.3, 3.0):
        close(grid, grid.values().nan_to_num(0.0, 0.0, 0.0) + noise * spread * size)


def test_bracket_of_what_is_on_the_grid(format: str, stored: torch.Tensor) -> None:
    grid = codec.grid(layout(format), {"data": stored})
    for codes in (grid.codes, random_codes(grid)):
        target = grid.values(codes)
        finite = target.isfinite()
        low, high, fraction = grid.bracket(target.nan_to_num(0.0, 0.0, 0.0))
        assert torch.equal(low, high) and not fraction.any()
        assert torch.equal(grid.values(low)[finite], target[finite])


def hand(step: float, levels: list[float], uniform: bool, offset: float = -0.0) -> Grid:
    codes = torch.arange(8, dtype=torch.uint8)[None] % len(levels)
    return Grid(torch.tensor(levels, dtype=torch.float32), torch.tensor([[step]]), torch.tensor([[offset]]), codes, uniform)


@pytest.mark.parametrize(
    ("grid", "target", "low", "high", "fraction"),
    [
        (hand(0.5, [-2, -1, 0, 1], True), 0.125, 2, 3, 0.25),
        (hand(-0.5, [-2, -1, 0, 1], True), 0.125, 1, 2, 0.75),
        (hand(-0.5, [-2, -1, 0, 1], True), 99.0, 0, 0, 0.0),
        (hand(0.5, [-2, -1, 0, 1], True), 99.0, 3, 3, 0.0),
        (hand(0.5, [-2, -1, 0, 1], True), -99.0, 0, 0, 0.0),
        (hand(0.5, [-2, -1, 0, 1], True), -0.5, 1, 1, 0.0),
        (hand(2.0, [0, 1, 2, 3], True, offset=10.0), 13.0, 1, 2, 0.5),
        (hand(2.0, [-10, -1, 1, 7], False), 8.0, 2, 3, 0.5),
        (hand(-2.0, [-10, -1, 1, 7], False), 6.5, 0, 1, 0.75),
        (hand(1.0, [-10, -1, 1, 7], False), 7.5, 3, 3, 0.0),
        (hand(1.0, [-10, -1, 1, 7], False), float("inf"), 3, 3, 0.0),
        (hand(1.0, [-1, 1], False), 0.0, 0, 1, 0.5),
        (hand(1.0, [-1, 0, 1], False), 0.25, 1, 2, 0.25),
        (hand(1.0, [-1, 0, 1, 2, 3], False), 2.25, 3, 4, 0.25),
        (hand(1.0, [-1, 0, 0, 1], False), 0.25, 2, 3, 0.25),
        (hand(1.0, [-1, 0, 0, 1], False), -0.25, 0, 1, 0.75),
    ],
)
def test_bracket_by_hand(grid: Grid, target: float, low: int, high: int, fraction: float) -> None:
    found = grid.bracket(torch.full((1, 8), target))
    assert [tensor.unique().tolist() for tensor in found] == [[low], [high], [fraction]]


@pytest.mark.parametrize("step", [0.0, -0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("uniform", [True, False])
def test_without_a_step_the_codes_stay(step: float, uniform: bool) -> None:
    grid = hand(step, [-2, -1, 0, 1], uniform, offset=0.25)
    for target in (0.25, 5.0, -5.0):
        low, high, fraction = grid.bracket(torch.full((1, 8), target))
        assert torch.equal(low, grid.codes) and torch.equal(high, grid.codes) and not fraction.any()


def test_rows_are_independent(format: str) -> None:
    stored, weight = encoded(format), layout(format)
    whole = codec.grid(weight, {"data": stored})
    codes = random_codes(whole)
    target = whole.values() + torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) * 0.003
    ported, bracketed = codec.with_codes(weight, {"data": stored}, codes)["data"], whole.bracket(target)
    stride = weight.parts["data"].stride
    for rows in (slice(0, 1), slice(1, 6), slice(6, 12)):
        own = stored[rows.start * stride : rows.stop * stride]
        grid = codec.grid(weight, {"data": own})
        assert torch.equal(grid.values(), whole.values()[rows])
        assert all(torch.equal(part, all_[rows]) for part, all_ in zip(grid.bracket(target[rows]), bracketed, strict=True))
        again = codec.with_codes(weight, {"data": own}, codes[rows])["data"]
        assert torch.equal(again, ported[rows.start * stride : rows.stop * stride])


def test_pieces_leave_no_trace() -> None:
    """More elements than are in work at a time, in rows that do not divide by them."""
    matrix = torch.randn(300, 1056, generator=torch.Generator().manual_seed(6))
    weight = codec.layout("w", (300, 1056), "Q4_1")
    stored = codec.encode(weight, matrix, None)["data"]
    grid, stride = codec.grid(weight, {"data": stored}), weight.parts["data"].stride
    rows = [codec.grid(weight, {"data": stored[i * stride : (i + 1) * stride]}) for i in range(300)]
    assert torch.equal(grid.values(), torch.cat([row.values() for row in rows]))
    found = [torch.cat(parts) for parts in zip(*(row.bracket(matrix[i, None]) for i, row in enumerate(rows)), strict=True)]
    assert all(torch.equal(*pair) for pair in zip(found, grid.bracket(matrix), strict=True))


def test_other_layouts_of_the_tensors() -> None:
    weight, stored = layout("Q4_1"), encoded("Q4_1")
    grid = codec.grid(weight, {"data": stored})
    codes, target = random_codes(grid), grid.values() + 0.001
    turned = codes.T.contiguous().T
    assert torch.equal(grid.values(turned), grid.values(codes))
    assert all(torch.equal(*pair) for pair in zip(grid.bracket(target.T.contiguous().T), grid.bracket(target), strict=True))
    ours, theirs = (codec.with_codes(weight, {"data": stored}, some)["data"] for some in (turned, codes))
    assert torch.equal(ours, theirs)


class Peak(TorchDispatchMode):
    """The most bytes at once in the storages that come to be while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor for tensor in (*args, *(kwargs or {}).values()) if isinstance(tensor, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if all(storage._cdata != tensor.untyped_storage()._cdata for tensor in given):
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, nbytes) for key, (ref, nbytes) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return result


def test_scratch_is_what_is_published(format: str) -> None:
    rows = 16 * SMALLEST_PIECE // COLUMNS
    weight = layout(format, rows)
    parts = {"data": torch.zeros(weight.nbytes, dtype=torch.uint8)}
    grid, target = codec.grid(weight, parts), torch.zeros(rows, COLUMNS)
    works: list[tuple[Callable[[], object], float]] = [
        (lambda: codec.grid(weight, parts), 1 + 8 / grid.group + codec.grid_scratch),
        (lambda: codec.with_codes(weight, parts, grid.codes), weight.nbytes / weight.elements + codec.grid_scratch),
        (grid.values, 4 + grid.scratch / 16),
        (lambda: grid.bracket(target), 6 + grid.scratch / 16),
    ]
    for work, published in works:
        with Peak() as peak:
            work()
        assert peak.peak / weight.elements <= published


def test_no_value_is_read_back_from_the_device(format: str) -> None:
    """CUDA tensors without data have none to give: nothing waits for the device, and its memory can be counted without one."""
    weight = layout(format)
    with torch.no_grad(), Slices(), FakeTensorMode():
        parts = {"data": torch.empty(weight.nbytes, dtype=torch.uint8, device="cuda:0")}
        grid = codec.grid(weight, parts)
        low, high, fraction = grid.bracket(torch.empty(ROWS, COLUMNS, device="cuda:0"))
        stored = codec.with_codes(weight, parts, high)["data"]
        assert stored.shape == (weight.nbytes,) and stored.dtype == low.dtype == torch.uint8
        assert grid.values(low).shape == fraction.shape == (ROWS, COLUMNS)
        assert {tensor.device.type for tensor in (stored, low, high, fraction, grid.values(), grid.levels)} == {"cuda"}


@pytest.mark.parametrize("format", [format for format in TYPES if format not in LAYOUTS])
def test_a_format_without_a_grid(format: str) -> None:
    weight = codec.layout("w", (1, 256), format)
    parts = {"data": torch.zeros(weight.nbytes, dtype=torch.uint8)}
    with pytest.raises(DecodeOnly, match=f"{format} does not keep one code a weight; Q4_0, "):
        codec.grid(weight, parts)
    with pytest.raises(DecodeOnly):
        codec.with_codes(weight, parts, torch.zeros(1, 256, dtype=torch.uint8))


def test_codecs_with_grids_publish_them() -> None:
    gridded: list[Gridded] = [codec for codec in registry.codecs().values() if hasattr(codec, "grids")]
    assert codec in gridded and codec.grids == frozenset(LAYOUTS) <= {f for f, block in TYPES.items() if block.can == "rw"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda(format: str, stored: torch.Tensor) -> None:
    weight, there = layout(format), {"data": stored.cuda()}
    here, grid = codec.grid(weight, {"data": stored}), codec.grid(weight, there)
    assert torch.equal(grid.codes.cpu(), here.codes) and same_bits(grid.values().cpu(), here.values().numpy())
    codes = random_codes(here)
    assert torch.equal(
        codec.with_codes(weight, there, codes.cuda())["data"].cpu(), codec.with_codes(weight, {"data": stored}, codes)["data"]
    )
    target = here.values().nan_to_num(0.0, 0.0, 0.0) + 0.001
    assert all(torch.equal(a.cpu(), b) for a, b in zip(grid.bracket(target.cuda()), here.bracket(target), strict=True))
