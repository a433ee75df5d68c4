"""An output that appears whole or not at all: ranges written into a hidden sibling, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.checkpoint import read_lines, read_range
from edgeport.errors import NotEnoughDisk, OutputExists, PlanViolation
from edgeport.places import (
    check_files,
    check_output,
    half_placed,
    is_named_as,
    journal_path,
    manifest_path,
    owned,
    put_aside,
    replaced_path,
    staging_path,
)
from edgeport.seams import FileLayout
from edgeport.tensor import TensorSpec

if TYPE_CHECKING:
    from edgeport.journal import Journal

if sys.platform == "win32":
    raise ImportError("edgeport writes by positioned writes, which Windows lacks; use WSL")
import fcntl

FULL = "the disk of {} became full on the way; free some of it, or give an -o on another"
NO_ROOM = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    # FAT has none of 4 GiB; or ulimit -f
    errno.EFBIG: "{} takes no file of the output's size; cut it (--max-shard-size 4GB, in hf and gguf), or give another disk",
}


@dataclass(slots=True)
class Staging:
    """Files of known size being filled by tensor name and offset, in any order."""

    folder: Path
    files: dict[str, int]
    layouts: Sequence[FileLayout]
    missing: dict[str, int] = field(default_factory=dict)

    def expect(self, tensor: str, nbytes: int) -> None:
        self.missing[tensor] = nbytes

    def has(self, tensor: str) -> None:
        """A tensor was written by the interrupted run whose files these are."""
        self.missing[tensor] = 0

    def write(
        self, tensor: str, offset: int, data: memoryview | bytes | bytearray, lines: int = 1, pitch: int = 0
    ) -> None:
        """Write `data` at byte `offset` of a stored tensor, or an equal piece of it at that byte of each of its `lines`.

        `pitch`: bytes from one line to the next. Raises PlanViolation outside of what was planned.
        """
        layout = self.layout(tensor)
        view = memoryview(data).cast("B")
        self.missing[tensor] -= len(view)
        if self.missing[tensor] < 0:
            raise PlanViolation(f"{tensor} got more bytes than planned")
        handle, width, begin = self.files[layout.name], len(view) // lines, layout.ranges[tensor] + offset
        for line in range(lines):
            write_at(handle, view[line * width : (line + 1) * width], begin + line * pitch)

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        """Bytes `start` to `stop` of a stored tensor that has been written."""
        layout = self.layout(spec.name)
        return bytearray(os.pread(self.files[layout.name], stop - start, layout.ranges[spec.name] + start))

    def read_lines(self, spec: TensorSpec, start: int, stop: int, lines: int) -> bytearray:
        """Bytes `start` to `stop` of each of a stored tensor's `lines` equal lines, one after the other."""
        layout = self.layout(spec.name)
        begin = layout.ranges[spec.name] + start
        return read_lines(self.folder / layout.name, begin, stop - start, lines, spec.nbytes // lines)

    def written(self) -> Written:
        return Written.of(self.folder, self.layouts)

    def layout(self, tensor: str) -> FileLayout:
        """The file that has a place for a tensor. Raises PlanViolation."""
        for layout in self.layouts:
            if tensor in layout.ranges:
                return layout
        raise PlanViolation(f"{tensor} has no planned place in the output")

    def close(self) -> None:
        for handle in self.files.values():
            os.close(handle)
        self.files.clear()


@dataclass(frozen=True, slots=True)
class Written:
    """The same files for reading, by whoever knows their paths. `places`: file and offset of each stored tensor."""

    places: Mapping[str, tuple[Path, int]]

    @classmethod
    def of(cls, folder: Path, layouts: Iterable[FileLayout]) -> Written:
        return cls({tensor: (folder / layout.name, start) for layout in layouts for tensor, start in layout.ranges.items()})

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        path, begin = self.places[spec.name]
        return read_range(path, begin + start, begin + stop)

    def read_lines(self, spec: TensorSpec, start: int, stop: int, lines: int) -> bytearray:
        path, begin = self.places[spec.name]
        return read_lines(path, begin + start, stop - start, lines, spec.nbytes // lines)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """In the block the place where `output` is made is there, and no other run's. Raises OutputExists where it is.

    The system lets go of the lock when the process ends, however it ends. A place that is left empty is removed.
    """
    place = staging_path(output)
    try:
        place.mkdir(exist_ok=True)
        # what a link leads to is not ours to clear
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):
            raise
        raise OutputExists(f"{place}, where {output} is to be made, is a link or a file; move it away") from None
    try:
        lock(handle, output)  # who does not get it leaves the place, which is another's even while it is empty
        try:
            if not is_at(handle, place):
                raise OutputExists(
                    f"another run into {output} has ended at this moment; see what it has written, and start again"
                )
            take_back(output)
            yield
        finally:
            if is_at(handle, place):
                with suppress(OSError):
                    place.rmdir()
    finally:
        os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """Whether what is open still has that name."""
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def lock(handle: int, output: Path) -> None:
    """Raises OutputExists where another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputExists(f"another run is writing {output} at this moment; wait for it, or give another -o") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise


@contextmanager
def staged(
    output: Path, layouts: Sequence[FileLayout], folder: bool, overwrite: bool, journal: Journal | None = None
) -> Iterator[Staging]:
    """Files filled in the block appear as `output` when it ends, and leave nothing behind when it fails.

    `output` is claimed. With a journal that has weights in it, the files of the interrupted run are filled further. Raises
    OutputExists where something has come to stand there meanwhile.
    """
    place = staging_path(output)
    sweep(place, (layout.name for layout in layouts) if journal and journal.done else ())
    staging, kept, done = Staging(place, {}, layouts), False, False
    try:
        for layout in layouts:
            (place / layout.name).parent.mkdir(exist_ok=True)
            handle = os.open(place / layout.name, os.O_RDWR | os.O_CREAT, 0o666)
            staging.files[layout.name] = handle
            os.truncate(handle, layout.size)
            for offset, blob in layout.blobs:
                write_at(handle, memoryview(blob), offset)
        yield staging
        short = {tensor: left for tensor, left in staging.missing.items() if left}
        planned = {tensor for layout in layouts for tensor in layout.ranges}
        if short or set(staging.missing) != planned:
            raise PlanViolation(f"planned bytes were not written: {short or planned ^ set(staging.missing)}")
        staging.close()
        for path in (*place.rglob("*"), place):
            _sync(path)
        check_output(output, folder, overwrite)
        check_files(output, layouts, folder, overwrite)
        commit(place, output, folder)
        done = True
    except BaseException as error:
        kept = journal is not None and journal.outlives(error)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise NotEnoughDisk(NO_ROOM[error.errno].format(output.absolute().parent)) from error
        raise
    finally:
        staging.close()
        if not done:  # else the place may be the next run's by now
            with suppress(OutputExists):  # it stays aside, and the next run says so
                take_back(output)
            if not kept:
                journal_path(output).unlink(missing_ok=True)
                shutil.rmtree(place, ignore_errors=True)


def take_back(output: Path) -> None:
    """Undo a commit that broke off, if there is one: what it was to replace stands where it stood. After a whole one that
    goes for good. Raises OutputExists where anything of anybody else's is in the way."""
    place, replaced, record = staging_path(output), replaced_path(output), manifest_path(output, False).name
    for name in half_placed(output):
        os.replace(output.with_name(name), place / name)
    if not os.path.lexists(replaced):
        return
    old = sorted(replaced.iterdir()) if put_aside(output) else None
    if old is None or any(path.name != record and not is_named_as(output, path.name) for path in old):
        raise OutputExists(f"{replaced} is nothing that a run into {output} has left there; move it away")
    finished = manifest_path(output, (replaced / output.name).is_dir())
    if not finished.is_file() or (place / finished.name).exists():
        others = [path.name for path in old if os.path.lexists(output.with_name(path.name))]
        if others:
            raise OutputExists(
                f"{output.with_name(others[0])} has come where an interrupted run had put the old output aside, into {replaced}; "
                "move one of them away"
            )
        for path in old:
            os.replace(path, output.with_name(path.name))
    shutil.rmtree(replaced, ignore_errors=True)
    if replaced.exists():
        raise OutputExists(f"{replaced}, which the last run into {output} has replaced, cannot be removed; remove it yourself")


def sweep(place: Path, files: Iterable[str]) -> None:
    """Remove what an interrupted run has put beside these files."""
    keep = {place / name for name in files}
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir():
            with suppress(OSError):  # some of them are in it
                path.rmdir()
        elif path not in keep:
            path.unlink()


def commit(place: Path, output: Path, folder: bool) -> None:
    """Rename into place what is synced. What stood there, and may be replaced, is put aside first and goes last.

    The journal goes before the last step: beside a whole output there is nothing left to go on with.
    """
    # the manifest goes last: an output without one is not done
    record, replaced = manifest_path(output, False).name, replaced_path(output)
    before = [output.name] if folder else [*sorted(owned(output, False)), record]
    standing = [path for name in before if (path := output.with_name(name)).exists()]
    if standing:
        replaced.mkdir()
    for path in standing:
        os.replace(path, replaced / path.name)
    if folder:
        journal_path(output).unlink(missing_ok=True)
        os.rename(place, output)
    else:
        for path in sorted(place.iterdir(), key=lambda path: path.name == record):
            if path.name == record:
                journal_path(output).unlink(missing_ok=True)
            os.replace(path, output.with_name(path.name))
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(output.parent)


def write_at(handle: int, view: memoryview, offset: int) -> None:
    """Write all of it, in as many calls as the system takes."""
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
