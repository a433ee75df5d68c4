"""edgeport from Python: the CLI's verbs with the CLI's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

from edgeport import device as devices
from edgeport.checkpoint import read_json
from edgeport.errors import TargetMissing, UnknownName, WrongBase
from edgeport.hub import called
from edgeport.locate import locate, open_model, open_patch
from edgeport.manifest import Receipt, fingerprint, manifest_of, verify_hashes
from edgeport.memory import parse_bytes
from edgeport.planning import Method, Plan, make_plan
from edgeport.probing import TOKENS
from edgeport.registry import converter, miss
from edgeport.run import Progress, run, silent
from edgeport.seams import Patch, Source, Target
from edgeport.sizes import size
from edgeport.steps import Limits

if TYPE_CHECKING:
    from edgeport.diagnosis import Diagnosis
    from edgeport.extraction import Extraction, ExtractionPlan
    from edgeport.likeness import Likeness
    from edgeport.probe import Comparison

Location = str | Path


class Options(TypedDict, total=False):
    """What every output can be asked; sizes as "2GB" or in bytes."""

    to: str
    quant: str | None
    max_shard_size: str | int | None
    imatrix: Location | None
    tensor_type: Sequence[tuple[str, str]]
    output_tensor_type: str | None
    token_embedding_type: str | None
    keep_format: bool
    block_size: int | None
    asymmetric: bool
    portable: bool
    execution_provider: str | None
    calibration: Location | None
    """A text on which every matrix that goes to fewer bits is rounded so that its layer's outputs suffer least (patch-aware);
    None: only a patch on a quantized base is, on edgeport's own text."""
    max_ram: str | int | None
    max_vram: str | int | None
    device: str
    overwrite: bool
    offline: bool


class PortOptions(Options, total=False):
    """What a port can be asked beside."""

    rounding: str
    seed: int
    semantics: str | None
    promote: bool
    max_size: str | int | None
    """Of all files of the output together; what --promote may fill."""
    sidecar: bool
    residual: int | None
    probe: bool | None
    """Whether to compare what base, exact port and output say. None: where a patch is rounded and transformers is there.
    On the `calibration` text, or on edgeport's own."""


class ExtractOptions(TypedDict):
    """What an extraction can be asked; at most one of rank, energy and full."""

    old_base: Location
    tuned: Location
    output: Location
    rank: NotRequired[int | None]
    energy: NotRequired[float | None]
    full: NotRequired[bool]
    max_ram: NotRequired[str | int | None]
    overwrite: NotRequired[bool]
    offline: NotRequired[bool]


def plan(
    *,
    new_base: Location,
    output: Location,
    patch: Location | Sequence[Location] = (),
    old_base: Location | None = None,
    force: bool = False,
    **options: Unpack[PortOptions],
) -> Plan:
    """Decide everything from headers alone; nothing is written. Raises EdgeportError for every mistake in the input."""
    check_names(options, PortOptions.__optional_keys__)
    if options.get("keep_format") and options.get("quant"):
        raise UnknownName(f"--keep-format and --quant {options['quant']} contradict each other; give one of them")
    offline = options.get("offline", False)
    source = open_model(new_base, offline)
    old = open_model(old_base, offline) if old_base is not None else None
    given = [patch] if isinstance(patch, (str, Path)) else patch
    patches = [open_patch(one, offline) for one in given]
    if not force:
        check_whole(source, patches)
    if old is not None and not force:
        for one in patches:
            check_base(one, old)
    target = Target(
        output=Path(output),
        quant=options.get("quant"),
        max_shard_bytes=_bytes(options.get("max_shard_size")),
        imatrix=Path(imatrix) if (imatrix := options.get("imatrix")) else None,
        tensor_types=tuple(options.get("tensor_type", ())),
        output_tensor_type=options.get("output_tensor_type"),
        token_embedding_type=options.get("token_embedding_type"),
        block_size=options.get("block_size"),
        asymmetric=options.get("asymmetric", False),
        portable=options.get("portable", False),
        execution_provider=options.get("execution_provider"),
    )
    limits = Limits(
        _bytes(options.get("max_ram")), _bytes(options.get("max_vram")), devices.choose(options.get("device", "auto"))
    )
    chosen = converter(options.get("to", "hf"))
    method, overwrite = method_of(options), options.get("overwrite", False)
    decided = make_plan(source, patches, chosen, target, limits, old=old, overwrite=overwrite, method=method)
    if not options.get("promote"):
        if options.get("max_size") is not None:
            raise UnknownName("--max-size says how far --promote may go; give both, or neither")
        return decided
    method, target = promoted(decided, _bytes(options.get("max_size")))
    finer = make_plan(source, patches, chosen, target, limits, old=old, overwrite=overwrite, method=method)
    return replace(finer, stamps=decided.stamps)  # of before the promotion read any of it


def check_names(given: Iterable[str], known: frozenset[str]) -> None:
    """Raises TypeError: at run time Unpack takes any name, and a misspelt option would be one that was not given."""
    for name in set(given) - known:
        raise TypeError(miss(sorted(known), name, "option"))


def promoted(decided: Plan, most_bytes: int | None) -> tuple[Method, Target]:
    """Method and target with what goes up in precision. Reads some rows of each patched weight."""
    from edgeport.promotion import promotions

    if most_bytes is None or (decided.adapter is not None and decided.method.sidecar):
        raise UnknownName("--promote needs a --max-size such as 5GB, and a patch that goes into the weights (no --sidecar)")
    found = promotions(decided, most_bytes)
    formats = {one.weight: one.format for one in found}
    return replace(decided.method, promoted=tuple(found)), replace(decided.target, formats=formats)


def method_of(options: PortOptions) -> Method:
    calibration = options.get("calibration")
    return Method(
        rounding=options.get("rounding", "auto"),
        seed=options.get("seed", 0),
        semantics=options.get("semantics"),
        sidecar=options.get("sidecar", False),
        residual=options.get("residual"),
        keep_format=options.get("keep_format", False),
        probe=options.get("probe"),
        calibration=Path(calibration) if calibration is not None else None,
    )


def port(
    *,
    new_base: Location,
    output: Location,
    patch: Location | Sequence[Location],
    old_base: Location | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **options: Unpack[PortOptions],
) -> Receipt:
    """Add patches to an evolved base and write the result. `resume`: go on where an interrupted port has stopped."""
    if not patch:
        raise UnknownName("a port needs a patch, and none is given; export writes a model without one")
    decided = plan(new_base=new_base, output=output, patch=patch, old_base=old_base, force=force, **options)
    return run(decided, progress=progress, force=force, resume=resume)


def export(
    *, model: Location, output: Location, resume: bool = False, progress: Progress = silent, **options: Unpack[Options]
) -> Receipt:
    """Write a model in another container (gguf unless `to` says so) or precision: the same stream without a patch."""
    check_names(options, Options.__optional_keys__)
    options.setdefault("to", "gguf")
    return run(plan(new_base=model, output=output, **options), progress=progress, resume=resume)


def plan_extraction(
    *,
    old_base: Location,
    tuned: Location,
    output: Location,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    max_ram: str | int | None = None,
    overwrite: bool = False,
    offline: bool = False,
) -> ExtractionPlan:
    """What `extract` would do, from headers alone; nothing is written."""
    from edgeport import extraction

    keep = extraction.keep_of(rank, energy, full)
    old, new = (open_model(one, offline) for one in (old_base, tuned))
    for source in (old, new):
        check_whole(source, ())
    return extraction.plan_extraction(old, new, keep, Path(output), Limits(_bytes(max_ram)), overwrite)


def extract(*, progress: Progress = silent, **options: Unpack[ExtractOptions]) -> Extraction:
    """Take a patch out of a fine-tuned model: a PEFT adapter of 16 directions a matrix unless the options say otherwise."""
    from edgeport import extractor

    return extractor.extract(plan_extraction(**options), progress=progress)


def diagnose(
    *,
    patch: Location | Sequence[Location],
    new_base: Location,
    old_base: Location | None = None,
    force: bool = False,
    offline: bool = False,
) -> Diagnosis:
    """Say whether a patch will carry over: how far the new base has drifted from the old one, against what it changes."""
    from edgeport import diagnosis

    if not patch:
        raise UnknownName("a diagnosis is of a patch, and none is given")
    new = open_model(new_base, offline)
    old = open_model(old_base, offline) if old_base is not None else None
    patches = [open_patch(one, offline) for one in ([patch] if isinstance(patch, (str, Path)) else patch)]
    if not force:
        check_whole(new, patches)
    if old is not None and not force:
        for one in patches:
            check_base(one, old)
    return diagnosis.diagnose(new, patches, old)


def verify(output: Location) -> Mapping[str, str]:
    """Check every file of an output against its manifest; returns the hashes. Raises VerificationFailed."""
    return verify_hashes(Path(output))


def compare(output: Location, against: Location, *, tokens: int = TOKENS, offline: bool = False) -> Comparison:
    """KL and top-1 agreement of two models' next-token distributions, computed one layer at a time.

    On `tokens` of text, or as many as both models have positions for. An adapter that an output of edgeport has beside it
    belongs to it. Raises UnknownName for fewer than 2 tokens.
    """
    if tokens < 2:
        raise UnknownName(f"two models are compared on 2 tokens of text or more, not {tokens}")
    from edgeport import probe
    from edgeport.effect import open_whole

    reference, candidate = (open_whole(locate(one, offline)) for one in (against, output))
    reach = [size(source.config, "max_position_embeddings", tokens) for source in (reference, candidate)]
    return probe.compare(reference, candidate, probe.probe_tokens(reference, min(tokens, *reach)))


def liken(output: Location, against: Location, *, offline: bool = False) -> Likeness:
    """How far an encoder's outputs are from another's on the same inputs, computed one layer at a time."""
    from edgeport import likeness
    from edgeport.effect import open_whole

    reference, candidate = (open_whole(locate(one, offline)) for one in (against, output))
    return likeness.compare(reference, candidate)


def encodes(model: Location, *, offline: bool = False) -> bool:
    """Whether a model is an encoder, which `liken` is for, and not one that `compare` is for."""
    from edgeport.encoders import encoder

    return encoder(open_model(model, offline).config) is not None


def check_whole(source: Source, patches: Sequence[Patch]) -> None:
    """An adapter that is part of the base is among the patches. Raises TargetMissing."""
    path = manifest_of(source.path)
    beside = read_json(path).get("adapter") if path.is_file() else None
    if not isinstance(beside, dict):
        return
    adapter = (source.path if source.path.is_dir() else source.path.parent) / str(beside.get("path"))
    if all(patch.path.resolve() != adapter.resolve() for patch in patches):
        raise TargetMissing(
            f"{called(source.path)} has an adapter beside it that is part of it; port it with --patch {adapter}, and any other "
            "patch after that (port --force takes the base without it)"
        )


def check_base(patch: Patch, old: Source) -> None:
    """The patch's recorded base is the one given. Raises WrongBase."""
    recorded = patch.facts.get("base_fingerprint")
    if recorded and recorded != fingerprint(old):
        raise WrongBase(
            f"{called(patch.path)} was made on a base with fingerprint {recorded}, and {called(old.path)} has "
            f"{fingerprint(old)}; give the base it was made on, or --force"
        )


def _bytes(size: str | int | None) -> int | None:
    return None if size is None else parse_bytes(size)


def formats() -> dict[str, Any]:
    """Every number format, patch kind and container that the registries know, and what each can do."""
    from edgeport import registry

    return {
        "codecs": {codec.name: {format: can or "copy" for format, can in codec.formats.items()}
                   for codec in registry.codecs().values()},
        "patches": sorted(registry.patch_kinds()),
        "containers": {name: "+".join(["read"] * item.reads + ["write"] * item.writes)
                       for name, item in registry.converters().items()},
    }  # fmt: skip


def inspect(path: Location, *, offline: bool = False) -> dict[str, Any]:
    """What a model or a patch is, from its headers."""
    from edgeport.inspection import describe

    return describe(path, offline)


__all__ = ["Options", "compare", "diagnose", "export", "extract", "formats", "inspect", "liken", "plan", "port", "verify"]
