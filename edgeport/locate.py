"""From what a user types to an opened model or patch: a folder, a file, or a name on the Hugging Face hub."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

from edgeport import hub
from edgeport.errors import NotACheckpoint, UnknownName, UnsupportedPatch
from edgeport.manifest import read_manifest
from edgeport.places import manifest_path
from edgeport.registry import converters, patch_kinds
from edgeport.seams import Patch, Source


def locate(text: str | Path, offline: bool) -> Path:
    """The local path of a model or patch; a hub name is downloaded, or found in the cache when offline."""
    name = str(text)
    if not name:
        raise NotACheckpoint("an empty name was given for a model or a patch; is a variable not set?")
    path = Path(text)
    if path.exists():
        # messages and manifests call a model by its folder's name, which "." does not say
        return path if path.name not in ("", "..") else path.resolve()
    if manifest_path(path, False).is_file():
        # an output that is a set of files goes by the name it was given
        return path.parent / Path(next(iter(read_manifest(path)["files"]), path.name)).name
    if not hub.NAME.match(name):
        raise NotACheckpoint(f"{name} does not exist; give a folder, a file, or a hub name such as org/name")
    return hub.fetched(name, offline)


def open_model(text: str | Path, offline: bool = False) -> Source:
    """Open a model by its headers, in whatever container it is. Raises SourceError."""
    path = locate(text, offline)
    for candidate in converters().values():
        if candidate.reads and candidate.detect(path):
            return candidate.open(path)
    known = ", ".join(name for name, candidate in converters().items() if candidate.reads)
    hint = " (it is a patch, which a port takes as --patch)" if any(kind.detect(path) for kind in patch_kinds().values()) else ""
    if path.is_file() and (path.parent / "config.json").is_file():
        hint = f"; give the folder {path.parent}"
    raise NotACheckpoint(not_fetched(path) or f"{path} is not a model that edgeport reads ({known}){hint}")


def not_fetched(path: Path) -> str:
    """What is said of a folder of the hub's cache in which there is nothing to read; "" of another."""
    if hub.commit(path) is None:
        return ""
    return hub.without_folder(hub.called(path))


def split_scale(text: str | Path) -> tuple[str, float]:
    """`P:0.7` as path and scale; a path that exists as it stands has scale 1. Raises UnknownName."""
    head, colon, tail = str(text).rpartition(":")
    if not colon or Path(text).exists():
        return str(text), 1.0
    try:
        scale = float(tail)
    except ValueError:
        return str(text), 1.0
    if not isfinite(scale):
        raise UnknownName(f"--patch {text}: the scale {tail} is not a finite number")
    return head, scale


def open_patch(text: str | Path, offline: bool = False) -> Patch:
    """Open a patch by its headers, with the scale of `P:SCALE`. Raises SourceError, UnsupportedPatch."""
    name, scale = split_scale(text)
    return open_patch_at(locate(name, offline), scale)


def open_patch_at(path: Path, scale: float) -> Patch:
    """Open a patch by its headers, to be applied `scale` times. Raises SourceError, UnsupportedPatch."""
    for kind in patch_kinds().values():
        if kind.detect(path):
            return kind.open(path, scale)
    if any(candidate.reads and candidate.detect(path) for candidate in converters().values()):
        raise UnsupportedPatch(f"{path} is a whole model, not a patch; a PEFT adapter folder was expected")
    said = f"{path} is not a patch that edgeport reads (a folder with adapter_config.json was expected)"
    raise NotACheckpoint(not_fetched(path) or said)
