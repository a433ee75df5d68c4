"""Memory: what the process has taken at its highest, how much the user allows, and sizes in words."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path

from edgeport.errors import UnknownName

MIB = 1 << 20
STATUS = Path("/proc/self/status")
IMPORT_BYTES = 300 * MIB
"""Python, torch's CPU build, numpy and edgeport itself, before any work (VmHWM; measured by `bench/memory.py`)."""
ALLOWANCE_BYTES = 48 * MIB
"""What the plan does not count: allocator slack, thread stacks, the plan's own tables."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(size: str | int) -> int:
    """Bytes from "2GB", "512MiB", "4G", "1000" or 1000. Raises UnknownName."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
    count = float(match[1]) * UNITS.get(match[2], 0) if match else 0
    if not 1 <= count < inf:
        raise UnknownName(f"{size!r} is not a size; write for example 2GB, 512MiB or 1000000")
    return int(count)


def in_words(count: float) -> str:
    """A byte count in binary units: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The process's highest resident memory: VmHWM, since `ru_maxrss` survives exec and lies; that where there is no /proc."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory now; the highest so far where there is no /proc."""
    return _status("VmRSS")


def _status(key: str) -> int:
    if not STATUS.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def return_freed_blocks() -> None:
    """Make glibc give every freed block of 1 MiB or more back to the system at once, and what is free already now.

    Left alone its threshold grows with what is freed, and a heap of freed blocks of changing sizes stays resident. Pieces that
    fit a cache (see `grid`) are kept: fresh pages for each of them would take a third of the time of a rounding.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)
    _glibc("mallopt", M_TRIM_THRESHOLD, 4 << 20)
    trim_heap()


def trim_heap() -> None:
    """Give freed pages back to the system, where the C library is glibc."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc's own; nothing where the C library has none of that name."""
    try:
        getattr(_c_library(), function)(*arguments)
    except (AttributeError, OSError, TypeError):
        return


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def reset_peak() -> bool:
    """Start VmHWM anew from what is resident now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@dataclass(slots=True)
class Meter:
    """What a run took above what was resident when it began."""

    before: int = 0
    peak: int = 0

    @property
    def above(self) -> int:
        return max(self.peak - self.before, 0)


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure the peak of a block of code in this process."""
    reset_peak()
    meter = Meter(before=resident_bytes())
    try:
        yield meter
    finally:
        meter.peak = peak_bytes()
