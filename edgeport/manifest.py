"""The receipt of a port, and the manifest `edgeport.json` that it becomes: what went in, what came out, what it cost."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeport.checkpoint import read_json
from edgeport.errors import CorruptCheckpoint, IncompleteOutput, NotACheckpoint, VerificationFailed
from edgeport.hub import called, commit
from edgeport.places import MANIFEST, entries, entries_of, listed, manifest_path
from edgeport.seams import Source
from edgeport.survival import Kept, overall

if TYPE_CHECKING:
    from edgeport.effect import Effect

HASH_CHUNK = 1 << 16
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WeightFact:
    """What happened to one weight. `retention`: share of the patch's change that the stored result keeps,
    <stored - base, change> / <change, change>. `error`: |stored - exact| / |exact|. None where nothing was patched."""

    weight: str
    action: str
    shape: tuple[int, ...]
    origin: str
    stored: str
    rounding: str | None = None
    """How values became codes: "nearest" with fresh scales, or a rule on the base's own grid or one made anew."""
    semantics: str | None = None
    change: float | None = None
    """|change| / |base|; None of a base of zeros"""
    retention: float | None = None
    error: float | None = None
    norm: float | None = None
    """|change|"""
    chance: float | None = None
    """Standard error of the retention, were what rounding does independent of the change (`survival.Kept`)."""
    beside: bool = False
    """Whether the patch, or what rounding lost of it, is in the adapter beside the model; it counts as stored."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a run did and cost."""

    output: Path
    files: Mapping[str, int]
    bytes_in: int
    bytes_out: int
    facts: tuple[WeightFact, ...]
    seconds: float
    peak_ram_bytes: int
    peak_above_import_bytes: int
    device: str
    peak_vram_bytes: int
    predicted_peak_bytes: int
    coverage: Mapping[str, int]
    gate: Mapping[str, str]
    notes: tuple[str, ...]
    method: Mapping[str, Any]
    """What the user asked of the way: rounding, seed, semantics."""
    adapter: Mapping[str, Any] | None = None
    """The low-rank patch beside the model that belongs to it: its name in the output, what it holds, rank and alpha."""
    calibration: Mapping[str, Any] | None = None
    """Of the text that guided the rounding: its tokens, and the peak of the process that ran it beside this one."""
    probe: Effect | None = None
    probe_skipped: str | None = None

    @property
    def survival(self) -> dict[str, Any] | None:
        """Retention of the patch as a whole, and the weight that kept least, as `survival.overall` tells them."""
        return overall({
            fact.weight: Kept(fact.retention, fact.norm, fact.chance) for fact in self.facts
            if fact.retention is not None and fact.norm is not None and fact.chance is not None
        })  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "files": dict(self.files),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "weights": len(self.facts),
            "patched": sum(fact.action == "patch" or fact.beside for fact in self.facts),
            "copied": sum(fact.action == "copy" for fact in self.facts),
            "seconds": round(self.seconds, 3),
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_above_import_bytes": self.peak_above_import_bytes,
            "device": self.device,
            "peak_vram_bytes": self.peak_vram_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "survival": self.survival,
            "adapter": dict(self.adapter) if self.adapter else None,
            "calibration": dict(self.calibration) if self.calibration else None,
            "probe": asdict(self.probe) if self.probe else {"skipped": self.probe_skipped},
            "coverage": dict(self.coverage),
            "gate": dict(self.gate),
            "notes": list(self.notes),
            "method": dict(self.method),
        }


def sha256(path: Path) -> str:
    """The file's hash, read a piece at a time and not kept in memory."""
    digest = hashlib.sha256()
    buffer = bytearray(HASH_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def in_background(task: Callable[[], Result]) -> Future[Result]:
    """The task's result, from a thread that neither an error nor the process's end waits for: hashes take minutes."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(paths)}


def stamps(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files, by path: what tells another file without reading it."""
    # a link by its own name, so that another that takes its place is noticed, however its folder was told
    return {str(path.parent.resolve() / path.name): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def check_unchanged(before: Mapping[str, Sequence[int]]) -> None:
    """Raises CorruptCheckpoint where a file is not what it was when it was stamped."""
    changed = next(
        (name for name, facts in before.items() if not os.path.exists(name) or stamps([Path(name)])[name] != facts), None
    )
    if changed:
        raise CorruptCheckpoint(
            f"{Path(changed).name} has changed while it was read, and what was made of it is of neither version; start again, "
            "when nothing writes it"
        )


def fingerprint(source: Source) -> str:
    """A short identity of a model: names, shapes, formats and the first bytes of every weight.

    Cheap enough to check before every port, and different for a retrained or quantized copy of the same model.
    """
    digest = hashlib.sha256()
    for name in sorted(source.weights):
        weight = source.weights[name]
        digest.update(f"{name} {weight.shape} {weight.format}\n".encode())
        for part in weight.parts.values():
            digest.update(source.read(part.spec, 0, min(part.spec.nbytes, 256)))
    return digest.hexdigest()[:32]


def named(path: Path) -> dict[str, str]:
    """What a model or patch is called, and its commit where it is one of the hub's."""
    revision = commit(path)
    return {"name": called(path)} | ({"revision": revision} if revision else {})


def described(models: Mapping[str, Source]) -> dict[str, Any]:
    """Name, fingerprint and hashes of models that went in, by their role."""
    return {
        role: {**named(source.path), "fingerprint": fingerprint(source), "sha256": hashes(source.files)}
        for role, source in models.items()
    }


def versions() -> dict[str, str]:
    """Versions of what had a part in the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("edgeport", "torch", "safetensors", "gguf", "llama-cpp-python", "transformers", "onnx", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(receipt: Receipt, folder: bool, staging: Path, inputs: Mapping[str, Any], command: Sequence[str]) -> None:
    """Write the manifest of a port among the staged files."""
    facts = {key: value for key, value in receipt.to_json().items() if key not in ("files", "output")}
    facts["per_weight"] = [asdict(fact) for fact in receipt.facts if fact.action != "copy" or fact.beside]
    write_record(staging, manifest_path(receipt.output, folder).name, inputs, command, facts)


def write_record(
    staging: Path, name: str, inputs: Mapping[str, Any], command: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Write a manifest of these facts among the staged files, with a hash of each of them."""
    content = {
        "edgeport": 1,
        "versions": versions(),
        "command": list(command),
        "inputs": dict(inputs),
        "files": {str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                  for path in sorted(staging.rglob("*")) if path.is_file()},
        **facts,
    }  # fmt: skip
    (staging / name).write_text(json.dumps(content, indent=1) + "\n")


def manifest_of(output: Path) -> Path:
    """Where the manifest of an output is: of a folder, of a file, or of the set that a file is one of."""
    own = manifest_path(output, output.is_dir())
    if own.is_file() or not output.is_file():
        return own
    # the files of a set begin as the output that they are: out.gguf is out-00001-of-00003.gguf ...
    sets = [path for path in sorted(output.parent.glob(f"*.{MANIFEST}")) if output.name.startswith(path.name.partition(".")[0])]
    return next((path for path in sets if output.name in listed(path)), own)


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of an output folder or file. Raises NotACheckpoint where there is none."""
    path = manifest_of(output)
    if not path.is_file() and not output.exists():
        raise NotACheckpoint(f"{output} does not exist; give what the output was called when it was written")
    if not path.is_file():
        raise NotACheckpoint(f"{output} has no manifest ({path.name}): it is not an output of edgeport, or not a finished one")
    content = read_json(path)
    files = content.get("files")
    is_table = isinstance(files, dict) and files and all(_is_entry(entry) for entry in files.values())
    if content.get("edgeport") != 1 or not is_table:
        raise CorruptCheckpoint(f"{path.name} is not a manifest of edgeport")
    return content


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def verify_hashes(output: Path) -> dict[str, str]:
    """Every file of the output against its manifest. Raises IncompleteOutput, VerificationFailed."""
    content = read_manifest(output)
    base = output if output.is_dir() else output.parent
    if output.is_file() and output.name not in content["files"]:
        raise VerificationFailed(
            f"the manifest beside {output.name} is of {', '.join(content['files'])}: {output.name} is not what edgeport wrote, "
            "or has another name since"
        )
    found = {}
    for name, entry in content["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or (not output.is_dir() and os.path.basename(name) != name):
            raise CorruptCheckpoint(f"the manifest names {name!r}, which is not a file beside it")
        path = base / name
        if not path.is_file():
            raise IncompleteOutput(f"{name} is in the manifest and not in {base}")
        if path.stat().st_size != entry["bytes"]:
            raise VerificationFailed(f"{name} has {path.stat().st_size} bytes; its manifest says {entry['bytes']}")
        found[name] = sha256(path)
        if found[name] != entry["sha256"]:
            raise VerificationFailed(f"{name} has changed since edgeport wrote it: its sha256 differs from the manifest's")
    extra = sorted(entries(output) - entries_of(found)) if output.is_dir() else []
    if extra:
        raise VerificationFailed(f"{', '.join(map(str, extra))} in {output} is not in the manifest")
    return found
