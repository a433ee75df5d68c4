"""Where a block is computed: on the CPU, or on a CUDA device over pinned memory and streams of its own.

    disk --read--> pinned --upload--> device: decode, edit, encode --download--> pinned --write--> disk
    '----- reader thread ----------'  '----- the caller ---------'  '------- writer thread -----------'
           block n + 1                       block n                          block n - 1
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from edgeport.blocks import as_tensor
from edgeport.errors import BudgetTooSmall, DeviceFailed, UnknownName
from edgeport.memory import in_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Upload = tuple[dict[str, "Tensor"], "torch.cuda.Event"]
"""Parts on the device, and the event after which they are there."""
Read = Callable[[range], Mapping[str, bytearray]]
"""The stored bytes of some rows, by part."""
Write = Callable[[str, memoryview], None]
"""Takes the stored bytes of a part."""

ALIGNMENT = 512
"""Parts start on such a multiple in a pinned buffer, as torch's own device allocations do: any dtype's view is aligned."""

DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""NVIDIA's, WSL's and AMD's: without any of them there is no GPU, and a plan need not import torch to ask."""


class Lane(Protocol):
    """One device's way in and out."""

    device: str

    def blocks(self, ranges: Iterable[range], read: Read) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Each range with its stored bytes (uint8, by part) on the device; the dict is the caller's to empty."""
        ...

    def store(self, stored: Mapping[str, Tensor], write: Write) -> None:
        """Bring a block's bytes home and write them, by the time `finish` returns."""
        ...

    def finish(self) -> None:
        """Wait for every write, and raise what one has raised."""
        ...

    def peak_bytes(self) -> int:
        """The most device memory that tensors have taken."""
        ...


def choose(name: str) -> str:
    """"cpu" or "cuda" for --device auto, cpu or cuda. Raises UnknownName where there is no such device."""
    if name == "cpu" or (name == "auto" and not any(map(os.path.exists, DRIVERS))):
        return "cpu"
    import torch

    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UnknownName("--device cuda: torch finds no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if name not in ("auto", "cuda"):
        raise UnknownName(f"--device {name!r} is not one of auto, cpu, cuda")
    return "cuda" if present else "cpu"


@contextmanager
def opened(device: str, upload_bytes: int, download_bytes: int, limit: int | None) -> Iterator[Lane]:
    """A lane for blocks of at most that many stored bytes each way, on a device of which `limit` bytes may be taken.

    Raises BudgetTooSmall where the device has less, or the limit is not kept.
    """
    if device == "cpu":
        yield HostLane()
        return
    import torch

    with unable(limit), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        torch.cuda.reset_peak_memory_stats()
        with capped(limit):
            yield CudaLane(reader, writer, pinned(upload_bytes), pinned(download_bytes))


def wake(device: str) -> None:
    """Make a CUDA device's context, whose host memory is a library's and no block's. Raises DeviceFailed."""
    if device == "cpu":
        return
    import torch

    with unable(None):
        torch.ones(1, device=device).add_(1).item()


@contextmanager
def unable(limit: int | None) -> Iterator[None]:
    """Tell in a sentence what a CUDA device refuses. Raises BudgetTooSmall, DeviceFailed."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        allowed = f"--max-vram {in_words(limit)}" if limit is not None else "what the device has free"
        raise BudgetTooSmall(f"a block does not fit {allowed} ({first_line(error)}); give another --max-vram") from error
    except RuntimeError as error:
        # no class of its own: a device that is full before torch allocates, that this torch is not built for, or that is gone
        if not any(told in str(error) for told in ("CUDA error", "CUDA driver", "CUBLAS_STATUS")):
            raise
        raise DeviceFailed(f"the CUDA device cannot be used ({first_line(error)}); give --device cpu") from error


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


@contextmanager
def capped(limit: int | None) -> Iterator[None]:
    """Let torch's allocator take no more than `limit` bytes of the device."""
    if limit is None:
        yield
        return
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    # what is cached from before would count against the run
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def pinned(nbytes: int) -> Tensor:
    """Host memory that a device copies from and to by itself."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def packed_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a buffer that holds parts of these sizes, each aligned."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


class HostLane:
    """The CPU: everything in turn. The hashing of the inputs reads ahead of the port, so waiting for the disk is rare."""

    device = "cpu"

    def blocks(self, ranges: Iterable[range], read: Read) -> Iterator[tuple[range, dict[str, Tensor]]]:
        for rows in ranges:
            yield rows, {role: as_tensor(data) for role, data in read(rows).items()}

    def store(self, stored: Mapping[str, Tensor], write: Write) -> None:
        for role, data in stored.items():
            write(role, memoryview(data.numpy()))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Nothing is under way."""

    def peak_bytes(self) -> int:
        return 0


class CudaLane:
    """A CUDA device: the next block's upload and the last one's download pass beside the computation.

    Each pinned buffer holds one block. It is used again when its event says that the device is done with it (upload),
    or when its bytes are written (download).
    """

    def __init__(
        self, reader: ThreadPoolExecutor, writer: ThreadPoolExecutor, going: Tensor, coming: Tensor, device: str = "cuda"
    ) -> None:
        import torch

        self.device = device
        self.reader, self.writer = reader, writer
        self.going, self.coming = going, coming
        self.up, self.down = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.written: Future[None] | None = None

    def blocks(self, ranges: Iterable[range], read: Read) -> Iterator[tuple[range, dict[str, Tensor]]]:
        ahead: deque[tuple[range, Future[Upload]]] = deque()
        for rows in ranges:
            ahead.append((rows, self.reader.submit(self._upload, rows, read)))
            if len(ahead) > 1:
                # popped before it is handed on, so that nothing here keeps the block alive
                yield self._arrived(*ahead.popleft())
        if ahead:
            yield self._arrived(*ahead.popleft())

    def _upload(self, rows: range, read: Read) -> Upload:
        """In the reader's thread."""
        import torch

        read_bytes = read(rows)
        self.uploaded.synchronize()
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        parts, start = {}, 0
        with torch.no_grad(), torch.cuda.stream(self.up):
            for role, data in read_bytes.items():
                staged = self.going[start : start + len(data)]
                staged.copy_(as_tensor(data))
                parts[role] = torch.empty_like(staged, device=self.device).copy_(staged, non_blocking=True)
                start += packed_bytes([len(data)])
            arrived.record(self.up)
        self.uploaded = arrived
        return parts, arrived

    def _arrived(self, rows: range, upload: Future[Upload]) -> tuple[range, dict[str, Tensor]]:
        import torch

        parts, event = upload.result()
        compute = torch.cuda.current_stream()
        compute.wait_event(event)
        for data in parts.values():
            # the allocator may not give the bytes to a later upload while this stream still computes with them
            data.record_stream(compute)
        return rows, parts

    def store(self, stored: Mapping[str, Tensor], write: Write) -> None:
        import torch

        self.finish()
        home, start = {}, 0
        self.down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.down):
            for role, data in stored.items():
                if data.device.type != self.device:
                    home[role] = data  # a codec that works on the CPU
                    continue
                home[role] = self.coming[start : start + data.numel()].copy_(data, non_blocking=True)
                data.record_stream(self.down)
                start += packed_bytes([data.numel()])
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.down)
        self.written = self.writer.submit(_write, event, home, write)

    def finish(self) -> None:
        if self.written is not None:
            written, self.written = self.written, None
            written.result()

    def peak_bytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated())


def _write(event: torch.cuda.Event, home: Mapping[str, Tensor], write: Write) -> None:
    """In the writer's thread."""
    event.synchronize()
    for role, data in home.items():
        write(role, memoryview(data.numpy()))  # type: ignore[arg-type]
