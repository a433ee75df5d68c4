"""What models and patches are called: by their folder, or as on the hub where they lie in its cache.

    models--org--name / snapshots / commit / the files           models--org--name / refs / branch or tag: its commit
"""

from __future__ import annotations

from pathlib import Path

PREFIX, SNAPSHOTS, REFS, MAIN = "models--", "snapshots", "refs", "main"


def commit(path: Path) -> str | None:
    """Of a folder of the hub's cache; None for another."""
    cached = path.parent.name == SNAPSHOTS and path.parent.parent.name.startswith(PREFIX)
    return path.name if cached else None


def called(path: Path) -> str:
    """The name for messages and manifests: org/name in the hub's cache, with @revision unless that is the main branch's."""
    if commit(path) is None:
        return path.name
    folder = path.parent.parent
    name, refs = folder.name.removeprefix(PREFIX).replace("--", "/"), folder / REFS
    files = [ref for ref in sorted(refs.rglob("*")) if ref.is_file() and ref.read_text().strip() == path.name]
    known = [ref.relative_to(refs).as_posix() for ref in files]
    return name if MAIN in known else f"{name}@{next(iter(known), path.name)}"
