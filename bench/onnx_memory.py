"""The memory that an export to ONNX takes, beside other exporters on the same models in the same run.

`python -m bench.onnx_memory [SHAPE ...] [--patience SECONDS] [--interop .venv-interop/bin/python] [-o results.json]`

Each export is a process of its own. Its peak is VmHWM as the kernel has it; "above imports" is what it takes beyond the
libraries, which it reports once they are loaded. A program that holds whole models is given the shapes of `BEARABLE`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.memory import smollm_tokenizer
from bench.shapes import Shape, write_model
from edgeport.report import table

SHAPES = {
    "0.14 B": Shape(576, 30, 1536, 49152, 9, 3),
    "1 B": Shape(2048, 16, 8192, 49152, 32, 8),
    "3 B": Shape(3072, 28, 8192, 49152, 24, 8),
}
MIB = 1 << 20
# every script: model, output, precision
IMPORTED = """
import sys
def told(name):
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    sys.stderr.write(f"{name} {int(line.split()[1]) * 1024}\\n")
"""
EDGEPORT = """
import torch, numpy, onnx, onnxruntime
import edgeport.api, edgeport.run
from edgeport.registry import codecs, converters, patch_kinds
codecs(), converters(), patch_kinds()
told("imports")
edgeport.api.export(model=sys.argv[1], output=sys.argv[2], to="onnx", quant=sys.argv[3])
"""
BUILDER = """
import runpy
import torch, transformers, onnx, onnxruntime, onnxruntime_genai.models.builder
from transformers import AutoModelForCausalLM, AutoTokenizer
told("imports")
model, output, precision = sys.argv[1:]
sys.argv = ["builder", "-m", "model", "-i", model, "-o", output, "-p", precision, "-c", output + "-cache", "-e", "cpu"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""
OPTIMUM = """
from optimum.onnxruntime import ORTModelForCausalLM
import optimum.exporters.onnx
told("imports")
ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
told("imports")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.arange(3, 12)[None].repeat(2, 1)
mask = torch.ones_like(ids)
mask[0, 0] = 0  # without a 0 the exported graph has no mask
given = {"input_ids": ids, "attention_mask": mask}
OnnxExporter().export_for_generation(model, given, OnnxConfig(dynamic=True)).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Program:
    name: str
    script: str
    precision: str
    bearable: tuple[str, ...] = tuple(SHAPES)
    """The shapes that it is given."""
    elsewhere: bool = False
    """Whether it runs in the environment of `make test-interop`."""


PROGRAMS = (
    *(Program("edgeport", EDGEPORT, quant) for quant in ("fp32", "bf16", "int8", "int4")),
    *(Program("genai builder", BUILDER, quant, ("0.14 B", "1 B")) for quant in ("fp32", "int4")),
    Program("optimum", OPTIMUM, "its own", ("0.14 B",), elsewhere=True),
    Program("transformers", TRANSFORMERS, "fp32", ("0.14 B",)),
)


def measure(program: Program, python: str, model: Path, output: Path, patience: int) -> dict[str, Any]:
    """Peak and seconds of one export, or why there are none."""
    script = IMPORTED + program.script + '\ntold("peak")\n'
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [python, "-c", script, str(model), str(output), program.precision], capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {patience} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]}
    found = (line.split() for line in done.stderr.splitlines() if line.startswith(("peak ", "imports ")))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return {"seconds": time.perf_counter() - began, "size": size, **{name: int(count) for name, count in found}}


def run(shapes: list[str], interop: str, patience: int, scratch: Path) -> Iterator[dict[str, Any]]:
    tokenizer = smollm_tokenizer(scratch / "tokenizer")
    for name in shapes:
        model = write_model(SHAPES[name], scratch / "model", tokenizer)
        for program in PROGRAMS:
            if name not in program.bearable:
                continue
            found = measure(program, interop if program.elsewhere else sys.executable, model, scratch / "out", patience)
            yield {"shape": name, "program": program.name, "precision": program.precision, **found}
            for folder in ("out", "out-cache"):
                shutil.rmtree(scratch / folder, ignore_errors=True)
        shutil.rmtree(model)


def shown(rows: list[dict[str, Any]]) -> str:
    cells = [
        [row["shape"], row["program"], row["precision"], f"{(row['peak'] - row['imports']) / MIB:.0f} MiB",
         f"{row['peak'] / MIB:.0f} MiB", f"{row['size'] / MIB:.0f} MiB", f"{row['seconds']:.0f} s"]
        for row in rows if "peak" in row
    ]  # fmt: skip
    failed = [f"{row['program']} at {row['shape']}: {row['failed']}" for row in rows if "failed" in row]
    left = [
        f"{program.name} is not given {', '.join(name for name in SHAPES if name not in program.bearable)}: it holds whole models"
        for program in {each.name: each for each in PROGRAMS}.values() if len(program.bearable) < len(SHAPES)
    ]  # fmt: skip
    head = ["shape (bf16)", "program", "to", "above imports", "peak", "output", "time"]
    return "\n".join([table(head, cells), "", *failed, *left])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--patience", type=int, default=900, help="seconds that a program is given")
    parser.add_argument("--interop", default=".venv-interop/bin/python", help="of `make test-interop`, for optimum")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in run(arguments.shapes or list(SHAPES), arguments.interop, arguments.patience, Path(scratch)):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(shown(rows))


if __name__ == "__main__":
    main()
