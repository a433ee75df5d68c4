"""The lane of a CUDA device, and its memory: counted without one, measured where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import edgeport
from bench.shapes import Shape, write_model, write_patch
from edgeport import device, memory, run
from edgeport.blocks import ranges
from edgeport.checkpoint import Stored
from edgeport.codecs.plain import codec as plain
from edgeport.errors import BudgetTooSmall, DeviceFailed, UnknownName
from edgeport.memory import MIB
from edgeport.patches import edits
from edgeport.steps import VRAM_FIXED_BYTES, Limits, Step, block_budget, cut

SHAPES = {"square": (4096, 4096), "embedding": (128256, 4096), "wide": (4096, 14336), "one more row": (4097, 4096)}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the CUDA storages that are alive, after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, nbytes) for key, (ref, nbytes) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return result


class Slices(TorchFunctionMode):
    """A CPU build of torch cannot slice a fake CUDA tensor by its brackets, which ask for the device; the operator can."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        for dim, some in enumerate(index if isinstance(index, tuple) else (index,)):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, some.start, some.stop)
        return tensor


def low_rank(name: str, shape: tuple[int, int], rank: int) -> edits.LowRank:
    down, up = (Stored(f"{name}.{factor}", "BF16", size, 2 * size[0] * size[1], Path("patch"), 0)
                for factor, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))))  # fmt: skip
    return edits.LowRank(name, shape, down, up, 1.0, False, False)


def step_of(shape: tuple[int, int], rank: int | None, formats: tuple[str, str], vram: int | None, edits: int = 1) -> Step:
    origin, target = (plain.layout("w", shape, format) for format in formats)
    todo = (low_rank("w", shape, rank),) * edits if rank else ()
    return cut(origin, target, todo, block_budget(Limits(None, vram, "cuda"), 0))


def counted(steps: Sequence[Step], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most device bytes at once, where the functions that `run` calls work on CUDA tensors without data.

    Uploads and downloads overlap as in `CudaLane`: the next block's bytes are there, and the last one's result still is.
    """
    monkeypatch.setattr("edgeport.blocks.finite", lambda matrix: matrix.aminmax() is not None)  # there is no value to read back
    monkeypatch.setattr(edits, "factor", lambda stored, *_: torch.empty(stored.shape))
    with torch.no_grad(), Slices(), FakeTensorMode(), LiveBytes() as live:
        for step in steps:
            applied = [edit.load("cuda:0") for edit in step.edits]
            survival = run.Survival()
            blocks = list(ranges(step.target, step.rows, step.granule))[:3]
            uploads = iter([*(upload(step, rows) for rows in blocks), dict])
            ahead, leaving = next(uploads)(), {}
            for rows in blocks:
                parts, ahead = ahead, next(uploads)()
                leaving = run.compute(step, rows, parts, applied, None, None, survival)
            del leaving, ahead, applied, survival
    return live.peak


def upload(step: Step, rows: range) -> Any:
    spans = {role: part.span(rows, step.origin.granule) for role, part in step.origin.parts.items()}
    return lambda: {role: torch.empty(stop - start, dtype=torch.uint8, device="cuda:0") for role, (start, stop) in spans.items()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("rank", "formats"),
    [(16, ("BF16", "BF16")), (64, ("BF16", "BF16")), (16, ("F32", "F32")), (64, ("F32", "BF16")), (None, ("BF16", "F32"))],
)
@pytest.mark.parametrize("vram", [130 * MIB, 200 * MIB, None], ids=["130 MiB", "200 MiB", "no limit"])
def test_device_bytes_keep_to_the_plan(
    shape: tuple[int, int], rank: int | None, formats: tuple[str, str], vram: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(shape, rank, formats, vram)
    peak = counted([step], monkeypatch)
    assert 0 < peak <= step.vram_bytes
    assert vram is None or VRAM_FIXED_BYTES + step.vram_bytes <= vram


@pytest.mark.parametrize("told", ["no kernel image is available for execution on the device", "out of memory"])
def test_a_device_that_does_not_work_is_told_of_in_a_sentence(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError(f"CUDA error: {told}\nCUDA kernel errors might be asynchronously reported at some other API call")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", failing)
    expected = pytest.raises(DeviceFailed, match=r"cannot be used \(CUDA error: .*\); give --device cpu")
    with expected, device.opened("cuda", 1, 1, None):
        pass
    with pytest.raises(ZeroDivisionError), device.unable(None):
        1 / 0  # noqa: B018


def test_two_patches_keep_to_the_plan_and_the_plan_is_not_wasteful(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of((4096, 4096), 16, ("BF16", "BF16"), None, edits=2)
    peak = counted([step], monkeypatch)
    assert step.vram_bytes / 2 < peak <= step.vram_bytes


def test_device_bytes_are_flat_in_depth_and_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    one = counted([step_of((4096, 4096), 16, ("BF16", "BF16"), None)], monkeypatch)
    many = counted([step_of((4096, 4096), 16, ("BF16", "BF16"), None)] * 12, monkeypatch)
    factors = 6 * 16 * (16 * 4096 - 4096)  # the larger weight's factor B has more rows
    large = counted([step_of((16 * 4096, 4096), 16, ("BF16", "BF16"), None)], monkeypatch)
    assert one == many
    assert large <= one + factors


def test_a_budget_below_one_block_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(BudgetTooSmall, match="--max-vram"):
        step_of((4096, 14336), 16, ("BF16", "BF16"), VRAM_FIXED_BYTES + MIB)
    with pytest.raises(BudgetTooSmall, match="allocator"):
        step_of((64, 64), None, ("BF16", "F32"), MIB)


def test_pinned_buffers_are_in_the_ram_prediction() -> None:
    weight = plain.layout("w", (4096, 4096), "BF16")
    step = cut(weight, plain.layout("w", (4096, 4096), "F32"), (), block_budget(Limits(None, None, "cuda"), 0))
    block = step.rows * 4096
    assert step.peak_bytes >= 2 * block * 2 + 2 * block * 4


def test_a_bound_on_a_device_that_is_not_used_is_said_to_be_idle(tmp_path: Path) -> None:
    base = write_model(Shape(64, 1, 64, 128, 4, 4), tmp_path / "base", None)
    notes = edgeport.plan(new_base=base, output=tmp_path / "out", device="cpu", max_vram="1GiB").notes
    assert notes == ("nothing reads --max-vram: the weights go through the CPU",)


def test_peak_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert 10 * MIB < memory.peak_bytes() < 1 << 40 and memory.resident_bytes() > 10 * MIB


def test_unknown_device() -> None:
    with pytest.raises(UnknownName, match="auto, cpu, cuda"):
        device.choose("tpu")


class Marker:
    """A stream or an event of a device whose copies are done at once."""

    def synchronize(self) -> None: ...
    def record(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """CudaLane's own logic (threads, buffers, order) on CPU tensors."""

    @contextmanager
    def stream(which: Any) -> Iterator[None]:
        yield

    for name, value in {"Stream": Marker, "Event": Marker, "current_stream": Marker, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


@pytest.mark.usefixtures("no_streams")
def test_the_lane_reads_one_block_ahead_and_writes_every_byte() -> None:
    data = bytes(range(250)) * 40
    blocks = [range(start, min(start + 700, len(data))) for start in range(0, len(data), 700)]
    read, written, found = [], {}, []

    def source(rows: range) -> dict[str, bytearray]:
        read.append(rows.start)
        return {"data": bytearray(data[rows.start : rows.stop]), "scales": bytearray([rows.start % 251])}

    buffer = device.packed_bytes([700, 1])
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        lane = device.CudaLane(reader, writer, *torch.empty(2, buffer, dtype=torch.uint8), "cpu")
        for rows, parts in lane.blocks(blocks, source):
            assert len(read) <= len(found) + 2
            found.append(rows)
            lane.store(parts, lambda role, view, start=rows.start: written.__setitem__((start, role), bytes(view)))
        lane.finish()
    assert found == blocks
    assert b"".join(written[rows.start, "data"] for rows in blocks) == data
    assert all(written[rows.start, "scales"] == bytes([rows.start % 251]) for rows in blocks)


@pytest.mark.usefixtures("no_streams")
def test_a_failed_write_is_raised() -> None:
    def fail(role: str, view: memoryview) -> None:
        raise OSError("disk full")

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        buffer = torch.empty(512, dtype=torch.uint8)
        lane = device.CudaLane(reader, writer, buffer, buffer.clone(), "cpu")
        lane.store({"data": torch.zeros(8, dtype=torch.uint8)}, fail)
        with pytest.raises(OSError, match="disk full"):
            lane.finish()


def test_max_vram_caps_torchs_allocator_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with device.capped(250):
        assert fractions == [0.25]
    assert fractions == [0.25, 1.0]


@pytest.mark.gpu
def test_cuda_port_equals_the_cpu_port_within_one_rounding(tmp_path: Path, read_tensors: Any) -> None:
    shape = Shape(1024, 4, 2816, 8192, 16, 4)
    base, patch = write_model(shape, tmp_path / "base", None), write_patch(shape, tmp_path / "patch")
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "cpu", device="cpu")
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "cuda", device="cuda", max_vram="120MiB")
    assert 0 < receipt.peak_vram_bytes <= 120 * MIB
    here, there = read_tensors(tmp_path / "cpu"), read_tensors(tmp_path / "cuda")
    for name, data in here.items():
        one, other = (torch.frombuffer(bytearray(values), dtype=torch.bfloat16).float() for values in (data, there[name]))
        assert bool(((one - other).abs() <= torch.finfo(torch.bfloat16).eps * one.abs().clamp_min(1e-30)).all()), name
