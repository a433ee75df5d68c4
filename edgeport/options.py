"""The options that several verbs of the command line share: their types, names and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The output: a folder for hf and onnx, a file for gguf.")]
To = Annotated[str, typer.Option("--to", help="Container: hf, gguf or onnx.")]
QUANT_HELP = (
    "bf16, f16, f32; for hf nf4, int8, gptq-4, awq-4, w4a16 ...; for gguf Q8_0, Q4_K_M ...; for onnx int8, int4 "
    "(default: as the base, where the output's container has its format; else bf16, and int8 in ONNX)."
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
Rounding = Annotated[str, typer.Option(help="How values become codes: auto, nearest, stochastic or patch-aware.")]
MaxRam = Annotated[str | None, typer.Option(help="Most memory of the whole process, such as 2GB; enforced.")]
MaxVram = Annotated[str | None, typer.Option(help="Most device memory of tensors, such as 1GB; enforced.")]
KeepFormat = Annotated[bool, typer.Option("--keep-format", help="Insist on the base's number formats (the default is to try).")]
SEMANTICS_HELP = "delta: add every change to the new base; operator: put values that the patch holds whole in its place."
Semantics = Annotated[str | None, typer.Option(help=SEMANTICS_HELP)]
Seed = Annotated[int, typer.Option(help="Of the draws that rounding takes; recorded in the manifest.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Leave the base as it is, and put the patch beside it as an adapter.")]
PROMOTE_HELP = "Store the patched weights that rounding harms most in finer formats, up to --max-size."
Promote = Annotated[bool, typer.Option("--promote", help=PROMOTE_HELP)]
MaxSize = Annotated[str | None, typer.Option(help="Most bytes of the output, such as 5GB, with --promote.")]
RESIDUAL_HELP = "Put what rounding lost beside the output, as an adapter of this rank."
Residual = Annotated[int | None, typer.Option(metavar="RANK", help=RESIDUAL_HELP)]
PROBE_HELP = "Run base, exact port and output on a short text (default: where a patch is rounded)."
Probe = Annotated[bool | None, typer.Option("--probe/--no-probe", help=PROBE_HELP)]
CALIBRATION_HELP = "A text to round by whatever loses bits, and to probe on (default: our own, for patches on quantized bases)."
Calibration = Annotated[Path | None, typer.Option(help=CALIBRATION_HELP)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
RESUME_HELP = "Go on where an interrupted run has stopped, and be resumable oneself: Ctrl-C then leaves what is done."
Resume = Annotated[bool, typer.Option("--resume", help=RESUME_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of edgeport.")]
Force = Annotated[bool, typer.Option("--force", help="Go past the gate and the fingerprint check; recorded in the manifest.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bar.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say what happened to each weight.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")]
Rank = Annotated[int | None, typer.Option(help="Directions that are kept of every matrix (default: 16).")]
Energy = Annotated[float | None, typer.Option(help="Keep the fewest directions that hold this share of each change, as 0.99.")]
Full = Annotated[bool, typer.Option("--full", help="Keep the exact difference, as a patch of edgeport's own.")]
OldBase = Annotated[str | None, typer.Option("--old-base", help="The base that the patch was made on.")]
Patches = Annotated[list[str], typer.Option("--patch", help="A PEFT adapter folder or another patch, P or P:SCALE; repeats.")]
NewBase = Annotated[str, typer.Option("--new-base", help="The evolved base: folder, .gguf file or hub name.")]
