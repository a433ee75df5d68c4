"""What a path holds: a model or a patch, its tensors, formats and identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeport.errors import CorruptCheckpoint
from edgeport.hub import called
from edgeport.locate import locate, open_model, open_patch
from edgeport.manifest import fingerprint, manifest_of, read_manifest
from edgeport.places import MANIFEST
from edgeport.registry import patch_kinds
from edgeport.seams import Patch, Source
from edgeport.survival import telling
from edgeport.ties import is_tied

WORST = 5
"""Weights that kept least, named one by one."""


def describe(text: str | Path, offline: bool) -> dict[str, Any]:
    """Facts as `inspect --json` prints them. Raises SourceError."""
    path = locate(text, offline)
    if any(kind.detect(path) for kind in patch_kinds().values()):
        return describe_patch(open_patch(path, offline))
    return describe_model(open_model(path, offline))


def describe_model(source: Source) -> dict[str, Any]:
    weights = source.weights.values()
    facts: dict[str, Any] = {
        "kind": "model",
        "path": str(source.path),
        "container": source.container,
        "model_type": source.config.get("model_type"),
        "weights": len(source.weights),
        "parameters": sum(weight.elements for weight in weights),
        "bytes": sum(weight.nbytes for weight in weights),
        "formats": dict(Counter(weight.format for weight in weights).most_common()),
        "codecs": sorted({weight.codec for weight in weights}),
        "tied_head": is_tied(source.weights, source.config),
        "fingerprint": fingerprint(source),
        "tensors": {weight.name: {"shape": list(weight.shape), "format": weight.format} for weight in weights},
    }
    if manifest_of(source.path).is_file():
        manifest = read_manifest(source.path)
        facts["made_by"] = {key: manifest[key] for key in ("command", "method", "inputs") if key in manifest}
        facts |= {key: manifest[key] for key in ("adapter", "probe") if manifest.get(key)}
        try:
            facts["survival"] = survival(manifest)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpoint(
                f"{MANIFEST} of {called(source.path)} tells of its weights (per_weight, survival) what edgeport did not write"
            ) from error
    return facts


def survival(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an output keeps of its patches, weight by weight in sum; None where none was added."""
    patched = [fact for fact in manifest.get("per_weight", ()) if fact.get("retention") is not None]
    if not patched or not manifest.get("survival"):
        return None
    changes = [fact["change"] for fact in patched if fact["change"] is not None]  # none of a base of zeros
    kept = {fact["weight"]: float(fact["retention"]) for fact in patched}
    # manifests of before have no standard errors
    worst = sorted(telling({fact["weight"]: fact.get("chance") or 0.0 for fact in patched}), key=kept.__getitem__)[:WORST]
    return {
        **manifest["survival"],
        "weights": len(patched),
        "mean_change": sum(changes) / len(changes) if changes else None,
        "mean_error": sum(fact["error"] for fact in patched) / len(patched),
        "rounding": dict(Counter(fact["rounding"] or "none" for fact in patched).most_common()),
        "formats": dict(Counter(fact["stored"] for fact in patched).most_common()),
        "least": {name: kept[name] for name in worst},
    }


def describe_patch(patch: Patch) -> dict[str, Any]:
    return {
        "kind": "patch",
        "path": str(patch.path),
        "patch_kind": patch.kind,
        **patch.facts,
        "bytes": sum(spec.nbytes for spec in patch.tensors.values()),
        "tensors": {name: {"shape": list(spec.shape), "format": spec.dtype} for name, spec in patch.tensors.items()},
    }
