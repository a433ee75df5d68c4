"""The command line: the verbs, and what each prints."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport import __version__, api
from edgeport.errors import NotPortable, UnknownName, VerificationFailed
from edgeport.gate import REFUSED
from edgeport.options import (
    Asymmetric,
    BlockSize,
    Calibration,
    Device,
    DryRun,
    EmbeddingType,
    Energy,
    Force,
    Full,
    Imatrix,
    Json,
    KeepFormat,
    MaxRam,
    MaxSize,
    MaxVram,
    NewBase,
    NoProgress,
    Offline,
    OldBase,
    Output,
    OutputType,
    Overwrite,
    Patches,
    Portable,
    Probe,
    Promote,
    Provider,
    Quant,
    Quiet,
    Rank,
    Residual,
    Resume,
    Rounding,
    Seed,
    Semantics,
    ShardSize,
    Sidecar,
    TensorType,
    To,
    Verbose,
)  # fmt: skip
from edgeport.probing import TOKENS
from edgeport.process import emit, hide_downloads, mistakes, prepare
from edgeport.report import bar, say, table
from edgeport.texts import (
    changes_text,
    diagnosis_text,
    extraction_plan_text,
    extraction_text,
    plan_text,
    receipt_text,
    weights_text,
)

if TYPE_CHECKING:
    from edgeport.likeness import Likeness
    from edgeport.planning import Plan
    from edgeport.probe import Comparison

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Port a fine-tune's patch onto an updated base, in low memory, straight to HF, GGUF or ONNX.",
)

CAPABILITIES = {"rw": "read, write", "rp": "read, patch", "r": "read", "copy": "copy"}
FORCED_HELP = "Take an old base that is not the one the patch names, or a new one without its adapter."


def pairs(types: list[str] | None) -> list[tuple[str, str]]:
    """REGEX=TYPE arguments. Raises UnknownName."""
    split = [one.rpartition("=") for one in types or []]
    for pattern, equals, kind in split:
        if not (pattern and equals and kind):
            raise UnknownName(f"--tensor-type {pattern}{equals}{kind} is not of the form REGEX=TYPE")
    return [(pattern, kind) for pattern, _, kind in split]


def carry_out(
    plan: Plan, dry_run: bool, as_json: bool, force: bool, resume: bool, show: bool, quiet: bool, verbose: bool
) -> None:
    """Print the plan, or run it and print the receipt."""
    from edgeport.run import run

    if dry_run:
        emit(plan.to_json(), as_json, plan_text(plan))
        return
    for note in plan.notes:
        say(f"note: {note}", quiet)
    with bar(plan.bytes_in, show and not quiet) as progress:
        receipt = run(plan, progress=progress, force=force, resume=resume, command=["edgeport", *sys.argv[1:]])
    for note in receipt.notes[len(plan.notes) :]:
        say(f"note: {note}", quiet)
    if verbose:
        say(weights_text(receipt), quiet)
    if as_json or not quiet:
        emit(receipt.to_json(), as_json, receipt_text(receipt))


@app.command()
def port(
    patch: Patches,
    new_base: NewBase,
    output: Output,
    old_base: OldBase = None,
    to: To = "hf",
    quant: Quant = None,
    max_shard_size: ShardSize = None,
    imatrix: Imatrix = None,
    tensor_type: TensorType = None,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    keep_format: KeepFormat = False,
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    portable: Portable = False,
    execution_provider: Provider = None,
    rounding: Rounding = "auto",
    seed: Seed = 0,
    semantics: Semantics = None,
    promote: Promote = False,
    max_size: MaxSize = None,
    sidecar: Sidecar = False,
    residual: Residual = None,
    probe: Probe = None,
    calibration: Calibration = None,
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force: Force = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add patches to an evolved base and write the result."""
    with mistakes():
        hide_downloads(no_progress or quiet)
        plan = api.plan(
            patch=list(patch), new_base=new_base, output=output, old_base=old_base, to=to, quant=quant,
            max_shard_size=max_shard_size, imatrix=imatrix, tensor_type=pairs(tensor_type),
            output_tensor_type=output_tensor_type, token_embedding_type=token_embedding_type, max_ram=max_ram,
            max_vram=max_vram, device=device, overwrite=overwrite, force=force, offline=offline, rounding=rounding,
            probe=probe, calibration=calibration, sidecar=sidecar, residual=residual, keep_format=keep_format, seed=seed,
            semantics=semantics, promote=promote, max_size=max_size,
            block_size=block_size, asymmetric=asymmetric, portable=portable, execution_provider=execution_provider,
        )  # fmt: skip
        carry_out(plan, dry_run, as_json, force, resume, not no_progress, quiet, verbose)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file or a hub name.")],
    output: Output,
    to: To = "gguf",
    quant: Quant = None,
    max_shard_size: ShardSize = None,
    imatrix: Imatrix = None,
    tensor_type: TensorType = None,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    portable: Portable = False,
    execution_provider: Provider = None,
    calibration: Calibration = None,
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model in another container or precision, in the same stream as a port."""
    with mistakes():
        hide_downloads(no_progress or quiet)
        plan = api.plan(
            new_base=model, output=output, to=to, quant=quant, max_shard_size=max_shard_size, imatrix=imatrix,
            tensor_type=pairs(tensor_type), output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type, max_ram=max_ram, max_vram=max_vram, device=device,
            overwrite=overwrite, offline=offline, block_size=block_size, asymmetric=asymmetric, portable=portable,
            execution_provider=execution_provider, calibration=calibration,
        )  # fmt: skip
        carry_out(plan, dry_run, as_json, False, resume, not no_progress, quiet, verbose)


@app.command()
def extract(
    old_base: Annotated[str, typer.Option("--old-base", help="The base that was tuned: folder, .gguf file or hub name.")],
    tuned: Annotated[str, typer.Option("--tuned", help="What became of it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for the patch.")],
    rank: Rank = None,
    energy: Energy = None,
    full: Full = False,
    max_ram: MaxRam = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take a patch out of a fine-tuned model: a PEFT adapter, or with --full the exact difference."""
    with mistakes():
        hide_downloads(no_progress or quiet)
        from edgeport.extractor import extract as run_extraction

        plan = api.plan_extraction(
            old_base=old_base, tuned=tuned, output=output, rank=rank, energy=energy, full=full, max_ram=max_ram,
            overwrite=overwrite, offline=offline,
        )  # fmt: skip
        if dry_run:
            emit(plan.to_json(), as_json, extraction_plan_text(plan))
            return
        with bar(plan.bytes_in, not no_progress and not quiet) as progress:
            done = run_extraction(plan, progress=progress, command=["edgeport", *sys.argv[1:]])
        for note in done.notes:
            say(f"note: {note}", quiet)
        if verbose:
            say(changes_text(done), quiet)
        if as_json or not quiet:
            emit(done.to_json(), as_json, extraction_text(done))


@app.command()
def diagnose(
    patch: Patches,
    new_base: NewBase,
    old_base: OldBase = None,
    force: Annotated[bool, typer.Option("--force", help=FORCED_HELP)] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say whether a patch will carry over: per-layer drift of the base against the patch, and the gate's verdict."""
    with mistakes():
        found = api.diagnose(patch=list(patch), new_base=new_base, old_base=old_base, force=force, offline=offline)
        emit(found.to_json(), as_json, diagnosis_text(found))
        if found.verdict.verdict == REFUSED:
            raise typer.Exit(NotPortable.exit_code)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A model or a patch: folder, .gguf file or hub name.")],
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what a path holds: model or patch, formats, ties, rank, true scaling, fingerprint."""
    with mistakes():
        facts = api.inspect(path, offline=offline)
        rows = [[key, _plain(value)] for key, value in facts.items() if key not in ("tensors", "kind")]
        emit(facts, as_json, table([str(facts["kind"]), ""], rows))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(help="An output of edgeport.")],
    against: Annotated[str | None, typer.Option("--against", help="Compare next-token distributions with this model.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of text to compare on (default: 256).")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Fail where the mean KL to --against is above this.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Check an output's files against its manifest and, with --against, its logits against a model's."""
    with mistakes():
        given = [name for name, value in (("--tokens", tokens), ("--max-kl", max_kl)) if value is not None]
        if given and against is None:
            raise UnknownName(f"{' and '.join(given)}: nothing is compared; name the model to compare with as --against")
        checked = api.verify(output)
        content: dict[str, Any] = {"output": str(output), "files": dict(checked)}
        text = f"{output}: {len(checked)} file(s) match the manifest"
        if against is not None:
            encodes = api.encodes(against, offline=offline)
            if encodes and given:
                raise UnknownName(f"{against} is an encoder, whose outputs are not of a text; leave off {' and '.join(given)}")
            found: Comparison | Likeness
            if encodes:
                found = api.liken(output, against, offline=offline)
            else:
                found = api.compare(output, against, tokens=tokens or TOKENS, offline=offline)
            content["against"] = found.to_json()
            text += f"\nagainst {against}: {found.text()}"
        limit = (found.tolerance if max_kl is None else max_kl) if against is not None else None
        content["verified"] = limit is None or found.distance <= limit
        emit(content, as_json, text)
        if limit is not None and not content["verified"]:
            what = "the tolerance of its precision," if max_kl is None else "--max-kl"
            raise VerificationFailed(f"{found.measure} {found.distance:.4g} is above {what} {limit:g}")


@app.command()
def formats(as_json: Json = False) -> None:
    """List every number format, patch kind and container, and what each can do."""
    with mistakes():
        known = api.formats()
        rows = []
        for name, listed in known["codecs"].items():
            for can in dict.fromkeys(listed.values()):
                names = textwrap.wrap(", ".join(format for format, its in listed.items() if its == can), 76)
                rows += [["codec " + name, CAPABILITIES[can], names[0]], *(["", "", more] for more in names[1:])]
        rows += [["patch " + name, "merge", ""] for name in known["patches"]]
        rows += [["container " + name, can.replace("+", ", "), ""] for name, can in known["containers"].items()]
        emit(known, as_json, table(["what", "can", "formats"], rows))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for what the demo writes.")] = Path("edgeport-demo"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    no_progress: NoProgress = False,
) -> None:
    """The main job on a real model: evolve, port, export, run, and print accuracy against memory."""
    with mistakes():
        from edgeport.demo import show

        report = show(output, overwrite=overwrite, watch=not no_progress and not as_json)
        emit(report.to_json(), as_json, report.text())


@app.command()
def bench(
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder for results.json, results.md and results.html.")],
    model: Annotated[str | None, typer.Option(help="Your evolved base, in place of a suite.")] = None,
    patch: Annotated[str | None, typer.Option(help="Your patch.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSONL: prompt, and options with answer (a number) or target.")] = None,
    old_base: Annotated[str | None, typer.Option(help="The base that the patch was made on: adds its rows.")] = None,
    refit: Annotated[str | None, typer.Option(help="A patch trained on the evolved base itself: the ceiling.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text, UTF-8: adds each model's perplexity on it.")] = None,
    quant: Annotated[list[str] | None, typer.Option(help="TYPE or CONTAINER:TYPE; repeats, the first is the reference.")] = None,
    suite: Annotated[str | None, typer.Option(help="A packaged suite (default: triage).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask at most; of a file, its first ones.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Which questions of a suite (default: 0).")] = None,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy against memory: bases, ports and refits at several precisions, as JSON, table and web page."""
    with mistakes():
        from edgeport.benchmark.command import Own, bench_own, bench_suite

        command, watch = f"edgeport {shlex.join(sys.argv[1:])}", lambda line: say(line, no_progress)
        if model and (suite is not None or seed is not None):
            raise UnknownName("--suite and --seed are of the packaged suites; leave them off beside --model")
        if model and patch and questions:
            own = Own(model, patch, questions, old_base, refit)
            results = bench_own(own, output, quant or [], text=text, limit=limit, overwrite=overwrite, offline=offline,
                command=command, say=watch,
            )  # fmt: skip
        elif model or patch or questions or old_base or refit or text:
            raise UnknownName("your own benchmark takes --model, --patch and --questions together; without any, a suite runs")
        else:
            results = bench_suite(suite or "triage", output, quant or [], limit=limit, seed=seed or 0, overwrite=overwrite,
                command=command, say=watch,
            )  # fmt: skip
        emit(results.to_json(), as_json, f"{results.text()}\n\nThe page is {output / 'results.html'}.")


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        with mistakes():
            emit(None, False, f"edgeport {__version__}")
        raise typer.Exit()


def main() -> None:
    prepare()
    app()
