"""The command line: verbs, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport import __version__, api
from edgeport.errors import EdgeportError, MissingExtra, UnknownName, VerificationFailed
from edgeport.memory import in_words
from edgeport.report import bar, say, table

if TYPE_CHECKING:
    from edgeport.effect import Effect
    from edgeport.manifest import Receipt
    from edgeport.planning import Plan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Port a fine-tune's patch onto an updated base, in low memory, straight to HF, GGUF or ONNX.",
)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The output: a folder for hf and onnx, a file for gguf.")]
To = Annotated[str, typer.Option("--to", help="Container: hf, gguf ...")]
QUANT_HELP = (
    "bf16, f16, f32; for hf nf4, int8, gptq-4, awq-4, w4a16 ...; for gguf Q8_0, Q4_K_M ...; for onnx int8, int4 "
    "(default: as the base)."
)
Quant = Annotated[str | None, typer.Option("--quant", "-p", "--precision", help=QUANT_HELP)]
ShardSize = Annotated[str | None, typer.Option("--max-shard-size", "--split-max-size", help="Largest output file, such as 5GB.")]
Imatrix = Annotated[Path | None, typer.Option(help="Importance matrix of llama.cpp.")]
TensorType = Annotated[list[str] | None, typer.Option(help="REGEX=TYPE for some tensors; repeats.")]
OutputType = Annotated[str | None, typer.Option("--output-tensor-type", help="Type of the output head.")]
EmbeddingType = Annotated[str | None, typer.Option("--token-embedding-type", help="Type of the token embedding.")]
BlockSize = Annotated[int | None, typer.Option(help="Columns that share a scale: 16, 32, 64 or 128 (onnx; default 32).")]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="A zero point for each block (onnx).")]
Portable = Annotated[bool, typer.Option("--portable", help="Plain ONNX operators, for other runtimes than onnxruntime (onnx).")]
Provider = Annotated[str | None, typer.Option(help="cpu or cuda: what the graph is made for (onnx; default cpu).")]
Rounding = Annotated[str, typer.Option(help="auto, nearest or stochastic, for patched weights of a quantized format.")]
MaxRam = Annotated[str | None, typer.Option(help="Most memory of the whole process, such as 2GB; enforced.")]
MaxVram = Annotated[str | None, typer.Option(help="Most device memory, such as 1GB; enforced.")]
KeepFormat = Annotated[bool, typer.Option("--keep-format", help="Insist on the base's number formats (the default is to try).")]
SEMANTICS_HELP = "delta: add every change to the new base; operator: put values that the patch holds whole in its place."
Semantics = Annotated[str | None, typer.Option(help=SEMANTICS_HELP)]
Seed = Annotated[int, typer.Option(help="Of the draws that rounding takes; recorded in the manifest.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Leave the base as it is, and put the patch beside it as an adapter.")]
PROMOTE_HELP = "Store the patched weights that rounding harms most in finer formats, up to --max-size."
Promote = Annotated[bool, typer.Option("--promote", help=PROMOTE_HELP)]
MaxSize = Annotated[str | None, typer.Option(help="Most bytes of the output's weights, such as 5GB, with --promote.")]
RESIDUAL_HELP = "Put what rounding lost beside the output, as an adapter of this rank."
Residual = Annotated[int | None, typer.Option(metavar="RANK", help=RESIDUAL_HELP)]
PROBE_HELP = "Run base, exact port and output on a short text (default: where a patch is rounded)."
Probe = Annotated[bool | None, typer.Option("--probe/--no-probe", help=PROBE_HELP)]
Calibration = Annotated[Path | None, typer.Option(help="A text in UTF-8 for the probe (default: edgeport's own).")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of edgeport.")]
Force = Annotated[bool, typer.Option("--force", help="Go past the gate and the fingerprint check; recorded in the manifest.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say what happened to each weight.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")]


CAPABILITIES = {"rw": "read, write", "rp": "read, patch", "r": "read", "copy": "copy"}


@contextmanager
def mistakes() -> Iterator[None]:
    """One line on stderr and the exit code of the error's kind; anything else is our bug and keeps its traceback."""
    try:
        yield
    except (EdgeportError, MissingExtra) as error:
        sys.stderr.write(f"edgeport: {error}\n")
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
    except OSError as error:
        sys.stderr.write(f"edgeport: {error.strerror or error}: {error.filename or ''}\n")
        raise typer.Exit(1) from None


def emit(content: Any, as_json: bool, text: str) -> None:
    sys.stdout.write((json.dumps(content, indent=1) if as_json else text) + "\n")


def pairs(types: list[str] | None) -> list[tuple[str, str]]:
    """REGEX=TYPE arguments. Raises UnknownName."""
    split = [one.rpartition("=") for one in types or []]
    for pattern, equals, kind in split:
        if not (pattern and equals and kind):
            raise UnknownName(f"--tensor-type {pattern}{equals}{kind} is not of the form REGEX=TYPE")
    return [(pattern, kind) for pattern, _, kind in split]


def carry_out(plan: Plan, dry_run: bool, as_json: bool, force: bool, show: bool, quiet: bool, verbose: bool) -> None:
    """Print the plan, or run it and print the receipt."""
    from edgeport.run import run

    if dry_run:
        emit(plan.to_json(), as_json, plan_text(plan))
        return
    for note in plan.notes:
        say(f"note: {note}", quiet)
    with bar(plan.bytes_in, show and not quiet) as progress:
        receipt = run(plan, progress=progress, force=force, command=["edgeport", *sys.argv[1:]])
    for note in receipt.notes[len(plan.notes) :]:
        say(f"note: {note}", quiet)
    if verbose:
        say(weights_text(receipt))
    if as_json or not quiet:
        emit(receipt.to_json(), as_json, receipt_text(receipt))


def plan_text(plan: Plan) -> str:
    actions = [step.action for step in plan.steps]
    rows = [
        ["weights", ", ".join(f"{actions.count(action)} to {action}" for action in ("patch", "recode", "copy"))],
        ["read", in_words(plan.bytes_in)],
        ["write", f"{in_words(plan.bytes_out)} in {len(plan.files)} file(s) to {plan.target.output}"],
        ["peak RAM", f"{in_words(plan.peak_ram_bytes)} ({in_words(plan.peak_above_import_bytes)} of it for blocks and headers)"],
        ["peak VRAM", in_words(plan.peak_vram_bytes)],
        ["disk", in_words(plan.disk_bytes)],
    ]
    return table(["plan", ""], rows) + "".join(f"\nnote: {note}" for note in plan.notes)


def receipt_text(receipt: Receipt) -> str:
    facts = receipt.to_json()
    rows = [
        ["output", f"{receipt.output} ({in_words(receipt.bytes_out)})"],
        ["weights", f"{facts['weights']}: {facts['patched']} patched, {facts['copied']} copied byte for byte"],
        ["time", f"{receipt.seconds:.1f} s"],
        ["peak RAM", f"{in_words(receipt.peak_ram_bytes)} ({in_words(receipt.peak_above_import_bytes)} above import)"],
    ]
    if receipt.coverage["tensors"]:
        rows.append(["patch tensors", f"{receipt.coverage['consumed']} of {receipt.coverage['tensors']} merged"])
    if promoted := receipt.method.get("promoted"):
        names = f"{', '.join(list(promoted)[:3])}{' ...' if len(promoted) > 3 else ''}"
        rows.append(["promoted", f"{len(promoted)} weights: {names}"])
    if receipt.adapter:
        kept = f"{receipt.adapter['path']} ({in_words(receipt.adapter['bytes'])}), beside the model and part of it"
        rows.append(["adapter", kept])
    if survival := receipt.survival:
        rows.append(["patch kept", f"{survival['mean']:.1%} on average, least {survival['min']:.1%} ({survival['worst']})"])
    if effect := receipt.probe:
        rows.append(["probe", effect_text(effect)])
    elif survival:
        rows.append(["probe", f"not run: {receipt.probe_skipped}"])
    return table(["written", ""], rows)


def weights_text(receipt: Receipt) -> str:
    """A line for each weight that was not merely copied."""
    rows = [
        [
            fact.weight, fact.action + " beside" * fact.beside, fact.origin, fact.stored, fact.rounding or "-",
            *("-" if figure is None else f"{figure:.4f}" for figure in (fact.change, fact.retention, fact.error)),
        ]
        for fact in receipt.facts if fact.action != "copy" or fact.beside
    ]  # fmt: skip
    return table(["weight", "action", "from", "to", "rounding", "change", "kept", "error"], rows)


def effect_text(effect: Effect) -> str:
    kept = "the patch changes nothing here" if effect.kept is None else (
        f"{effect.kept:.1%} +- {effect.kept_error:.1%} of the patch's effect kept"
    )
    perplexity = ", ".join(f"{name} {value:.2f}" for name, value in effect.perplexity.items())
    return (
        f"{kept}; KL to the exact port {effect.kl:.3g} nats (the patch: {effect.patch_kl:.3g}); perplexity {perplexity}; "
        f"{effect.tokens} tokens, {effect.seconds:.1f} s, {in_words(effect.peak_ram_bytes)}"
    )


@app.command()
def port(
    patch: Annotated[list[str], typer.Option("--patch", help="A PEFT adapter folder, P or P:SCALE; repeats.")],
    new_base: Annotated[str, typer.Option("--new-base", help="The evolved base: folder, .gguf file or hub name.")],
    output: Output,
    old_base: Annotated[str | None, typer.Option("--old-base", help="The base that the patch was made on.")] = None,
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
        plan = api.plan(
            patch=list(patch), new_base=new_base, output=output, old_base=old_base, to=to, quant=quant,
            max_shard_size=max_shard_size, imatrix=imatrix, tensor_type=pairs(tensor_type),
            output_tensor_type=output_tensor_type, token_embedding_type=token_embedding_type, max_ram=max_ram,
            max_vram=max_vram, device=device, overwrite=overwrite, force=force, offline=offline, rounding=rounding,
            probe=probe, calibration=calibration, sidecar=sidecar, residual=residual, keep_format=keep_format, seed=seed,
            semantics=semantics, promote=promote, max_size=max_size,
            block_size=block_size, asymmetric=asymmetric, portable=portable, execution_provider=execution_provider,
        )  # fmt: skip
        carry_out(plan, dry_run, as_json, force, not no_progress, quiet, verbose)


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
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model in another container or precision, in the same stream as a port."""
    with mistakes():
        plan = api.plan(
            new_base=model, output=output, to=to, quant=quant, max_shard_size=max_shard_size, imatrix=imatrix,
            tensor_type=pairs(tensor_type), output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type, max_ram=max_ram, max_vram=max_vram, device=device,
            overwrite=overwrite, offline=offline, block_size=block_size, asymmetric=asymmetric, portable=portable,
            execution_provider=execution_provider,
        )  # fmt: skip
        carry_out(plan, dry_run, as_json, False, not no_progress, quiet, verbose)


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
    tokens: Annotated[int, typer.Option(help="Tokens of text to compare on.")] = 256,
    max_kl: Annotated[float | None, typer.Option(help="Fail where the mean KL is above this.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Check an output's files against its manifest and, with --against, its logits against a model's."""
    with mistakes():
        checked = api.verify(output, offline=offline)
        content: dict[str, Any] = {"output": str(output), "files": dict(checked), "verified": True}
        text = f"{output}: {len(checked)} file(s) match the manifest"
        if against:
            found = api.compare(output, against, tokens=tokens, offline=offline)
            content["against"] = found.to_json()
            text += f"\nagainst {against}: mean KL {found.mean_kl:.3g} nats, largest {found.max_kl:.3g}, "
            text += f"top-1 agreement {found.top1:.1%}"
        emit(content, as_json, text)
        limit = (found.tolerance if max_kl is None else max_kl) if against else None
        if limit is not None and not found.mean_kl <= limit:
            what = "the tolerance of its precision," if max_kl is None else "--max-kl"
            raise VerificationFailed(f"mean KL {found.mean_kl:.4g} is above {what} {limit:g}")


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
    suite: Annotated[str, typer.Option(help="A packaged suite.")] = "triage",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions to ask at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which questions of a suite.")] = 0,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_progress: NoProgress = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy against memory: bases, ports and refits at several precisions, as JSON, table and web page."""
    with mistakes():
        from edgeport.benchmark.command import Own, bench_own, bench_suite

        command, watch = f"edgeport {shlex.join(sys.argv[1:])}", lambda line: say(line, no_progress)
        if model and patch and questions:
            own = Own(model, patch, questions, old_base, refit)
            results = bench_own(own, output, quant or [], text=text, limit=limit, overwrite=overwrite, offline=offline,
                command=command, say=watch,
            )  # fmt: skip
        elif model or patch or questions or old_base or refit or text:
            raise UnknownName("your own benchmark takes --model, --patch and --questions together; without any, a suite runs")
        else:
            results = bench_suite(suite, output, quant or [], limit=limit, seed=seed, overwrite=overwrite, command=command,
                say=watch,
            )  # fmt: skip
        emit(results.to_json(), as_json, f"{results.text()}\n\nThe page is {output / 'results.html'}.")


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"edgeport {__version__}\n")
        raise typer.Exit()


def main() -> None:
    # OpenMP's threads spin while they wait, and where cores are shared they take them from the hashing thread and others
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
