"""Where an output goes, what is made beside it on the way, and what may stand there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from edgeport.checkpoint import read_json
from edgeport.errors import CorruptCheckpoint, NotEnoughDisk, OutputExists, UnknownName
from edgeport.memory import MIB, in_words
from edgeport.seams import FileLayout

MANIFEST = "edgeport.json"
DISK_SLACK_BYTES = 16 * MIB
SPARE_HANDLES = 64
"""For inputs, pipes and libraries."""


def manifest_path(output: Path, folder: bool) -> Path:
    """Where an output's manifest lies: inside a folder, beside a file."""
    return output / MANIFEST if folder else output.with_name(f"{output.name}.{MANIFEST}")


def staging_path(output: Path) -> Path:
    """The folder in which an output is made. Its name is fixed, so that a killed run's leftover is found by the next."""
    return output.with_name(f".{output.name}.partial")


def journal_path(output: Path) -> Path:
    """What a run into that folder has done so far."""
    return output.with_name(f".{output.name}.journal")


def replaced_path(output: Path) -> Path:
    """Where what stood in the output's place waits until the new one is whole."""
    return output.with_name(f".{output.name}.replaced")


def put_aside(output: Path) -> bool:
    """Whether a run broke off while it put the old output aside. """
    replaced = replaced_path(output)
    return replaced.is_dir() and not replaced.is_symlink()


def half_placed(output: Path) -> list[str]:
    """Files beside each other that a run which broke off at its very end has put in place, and not yet their manifest."""
    place = staging_path(output)
    with suppress(CorruptCheckpoint):  # a manifest that was cut off: nothing was put in place before it was whole
        names = listed(place / manifest_path(output, False).name)
        return [name for name in names if output.with_name(name).exists() and not (place / name).exists()]
    return []


def through_links(output: Path) -> Path:
    """Where an output folder goes: a rename onto a link would leave what it leads to, perhaps on another disk, as it is."""
    return Path(os.path.realpath(output)) if output.is_symlink() or output.name in ("", "..") else output


def check_output(output: Path, folder: bool, overwrite: bool) -> None:
    """Nothing stands where the output goes, or something of ours that may be replaced. Raises OutputExists."""
    if not output.parent.is_dir():
        raise OutputExists(f"the folder {output.parent} for the output does not exist; make it first")
    if not os.access(output.parent, os.W_OK):
        raise OutputExists(f"the folder {output.parent} for the output is not writable")
    if os.path.ismount(output):
        raise OutputExists(f"{output} is a mount point, which nothing can take the place of; give a folder inside it")
    if put_aside(output):
        return  # who claims the place takes it back, and looks again
    broken_off = half_placed(output)
    # also a link that leads nowhere, as to a disk that is not mounted, or to itself
    places = (path for path in (output, manifest_path(output, folder)) if path.name not in broken_off)
    standing = (path for path in places if os.path.lexists(path))
    existing = next(standing, None)
    if existing is None:
        return
    if not overwrite:
        raise OutputExists(f"{existing} exists already; give another -o or --overwrite")
    ours = manifest_path(output, folder).is_file() or (folder and output.is_dir() and not any(output.iterdir()))
    if not ours or (output.exists() and output.is_dir() != folder):
        what = "folder" if output.is_dir() else "file"
        raise OutputExists(f"{output} is a {what} that edgeport did not write; it is not overwritten")
    if folder and output.is_dir() and not os.access(output, os.W_OK):
        raise OutputExists(f"{output} is not writable, so that nothing can take its place")
    others = sorted(entries(output) - entries_of(owned(output, folder))) if folder and output.is_dir() else []
    if others:
        raise OutputExists(f"{output / others[0]} is nothing that edgeport wrote; move it away, or give another -o")


def check_files(output: Path, files: Sequence[FileLayout], folder: bool, overwrite: bool) -> None:
    """No other file stands where one of a split set goes. Raises OutputExists."""
    if put_aside(output):
        return
    broken_off = half_placed(output)
    places = [output.with_name(file.name) for file in files if not folder and file.name not in broken_off]
    standing = [path for path in places if path.exists()]
    if standing and not overwrite:
        raise OutputExists(f"{standing[0]} exists already; give another -o or --overwrite")
    others = [path for path in standing if path.name not in owned(output, folder)]
    if others:
        raise OutputExists(f"{others[0]} is a file that edgeport did not write; it is not overwritten")


def owned(output: Path, folder: bool) -> set[str]:
    """The files of an output as its manifest says: inside a folder, or beside each other, where they begin and end as it does:
    a manifest that came from elsewhere does not make others' files ours."""
    names = listed(manifest_path(output, folder))
    if folder:
        return set(names)
    return {name for name in map(os.path.basename, names) if is_named_as(output, name)}


def is_named_as(output: Path, name: str) -> bool:
    """Whether an output, or one file of a set, has that name."""
    return name.startswith(output.stem) and name.endswith(output.suffix)


def listed(manifest: Path) -> Sequence[str]:
    """The files that a manifest names; none where it is not there, or has no table of them. Raises CorruptCheckpoint."""
    files = read_json(manifest).get("files") if manifest.is_file() else None
    return list(files) if isinstance(files, dict) else []


def check_handles(files: Sequence[FileLayout]) -> None:
    """All files of an output are open at once. Raises UnknownName where that is more than the system allows."""
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit  # which Windows lacks: it has a sentence of its own

    most = getrlimit(RLIMIT_NOFILE)[0]
    if most != RLIM_INFINITY and len(files) + SPARE_HANDLES > most:
        raise UnknownName(
            f"the output is cut into {len(files)} files, and a process may have {most} open (ulimit -n); give a larger "
            "--max-shard-size"
        )


def entries(folder: Path) -> set[Path]:
    """All files and folders in it, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*")}


def entries_of(files: Iterable[str]) -> set[Path]:
    """What an output folder of these files holds."""
    return {parent for name in (*files, MANIFEST) for parent in (Path(name), *Path(name).parents)}


def check_disk(output: Path, needed: int) -> None:
    """Raises NotEnoughDisk. What an interrupted run has taken is used again, or cleared away."""
    leftover = sum(path.lstat().st_blocks * 512 for path in staging_path(output).rglob("*"))
    free = shutil.disk_usage(output.parent).free + leftover
    if free < needed:
        raise NotEnoughDisk(f"the output takes {in_words(needed)}, and {output.parent} has {in_words(free)} free")
