"""The Hugging Face hub and its cache: what is fetched by name, and what models and patches are called.

    models--org--name / snapshots / commit / the files           models--org--name / refs / branch or tag: its commit
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from edgeport.errors import NotACheckpoint, NotEnoughDisk

NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
FILES = ["*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
LEFT = ["*/*", "consolidated*", "model.*.safetensors", "training_args.bin", "optimizer.bin", "scheduler.bin"]
"""The original weights beside transformers' own, and theirs in other precisions, are a second copy, and what stands in subfolders
is of other programs."""
TWICE = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""Beside these, `.bin` files are a second copy too."""
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


def offline_set() -> bool:
    """Whether the environment forbids the network, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def fetched(name: str, offline: bool) -> Path:
    """The folder of `org/name` or `org/name@revision`: downloaded, or found in the cache when offline.

    Raises NotACheckpoint, NotEnoughDisk.
    """
    from huggingface_hub import constants, snapshot_download

    repository, _, revision = name.partition("@")
    local = offline or offline_set()
    names = () if local else listed(repository, revision or None)
    if names and not any(fnmatch(one, pattern) for one in names for pattern in FILES):
        raise NotACheckpoint(without_folder(name))
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, local_files_only=local, allow_patterns=FILES,
                ignore_patterns=left_out(names),
            )
        )
    except Exception as error:  # HTTP clients' own errors, and those of the transfer, have no common base
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # all may be there that is read; if not, what is missing is named
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = constants.HF_HUB_CACHE
            remedy = "free some of it, or set HF_HUB_CACHE to a folder on another"
            raise NotEnoughDisk(f"the disk of {cache} became full; {remedy}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = "found in the local cache, and the network is not used (offline)" if local else f"fetched from the hub: {reason}"
        raise NotACheckpoint(f"{name} is no local path, and was not {where}") from error


def listed(repository: str, revision: str | None) -> Collection[str]:
    """The files of a repository; none where the hub cannot be asked, which the download will tell, or the cache makes good."""
    from huggingface_hub import HfApi

    try:
        return [one.rfilename for one in HfApi().model_info(repository, revision=revision).siblings or ()]
    except Exception:  # as in `fetched`
        return ()


def without_folder(name: str) -> str:
    """What is said of a repository that has no model or patch in the form that is fetched."""
    return (
        f"{name} has no folder of transformers or PEFT on the hub, and nothing else is fetched by name; download its GGUF file "
        "or ONNX folder (`hf download`), and give that"
    )


def left_out(names: Collection[str]) -> list[str]:
    """Patterns of what is not downloaded of a repository that has these files."""
    return [*LEFT, "*.bin"] if not set(TWICE).isdisjoint(names) else LEFT
