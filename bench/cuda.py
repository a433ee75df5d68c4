"""Ports on a CUDA device beside the same on the CPU, and PEFT's merge on that device: seconds, device memory, memory.

`python -m bench.cuda [-o results.json] [JOB ...]` makes a model of a billion random weights, quantizes it, and ports a
LoRA of rank 16 on all seven projections onto it, each time in a process of its own: on the CPU, on the device with room
as the plan likes it, and on the device with `--max-vram 192MiB`. Printed: seconds of the port, the most device memory
that tensors took beside what was planned, and the process's memory above what its imports and CUDA itself take.
PEFT loads the same base onto the device and merges; it writes nothing, so its seconds are without saving.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgeport
from bench.memory import smollm_tokenizer
from bench.shapes import SHAPES, write_model, write_patch
from edgeport.memory import in_words
from edgeport.report import table

PORT = """
import json, sys, time
import torch
import edgeport.api, edgeport.run, edgeport.memory as memory
from edgeport.registry import codecs, converters, patch_kinds
codecs(), converters(), patch_kinds()
options = json.loads(sys.argv[1])
if options["device"] == "cuda":
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
planned = edgeport.api.plan(**options)
before = memory.peak_bytes()
receipt = edgeport.api.port(**options)
print(json.dumps(dict(seconds=receipt.seconds, vram=receipt.peak_vram_bytes, planned_vram=planned.peak_vram_bytes,
                      above=memory.peak_bytes() - before, planned=receipt.predicted_peak_bytes)))
"""
PEFT = """
import json, sys, time, warnings
import torch
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
import edgeport.memory as memory
options = json.loads(sys.argv[1])
torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
torch.cuda.synchronize()
torch.cuda.reset_peak_memory_stats()
before, began = memory.peak_bytes(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(options["new_base"], device_map="cuda", dtype=torch.bfloat16)
PeftModel.from_pretrained(model, options["patch"]).merge_and_unload()
torch.cuda.synchronize()
print(json.dumps(dict(seconds=time.perf_counter() - began, vram=torch.cuda.max_memory_allocated(),
                      above=memory.peak_bytes() - before)))
"""
JOBS: dict[str, tuple[str, str | None, str | None, str]] = {
    "bf16": ("hf", None, None, "nearest"),
    "bf16 to nf4": ("hf", None, "nf4", "nearest"),
    "nf4": ("hf", "nf4", None, "stochastic"),
    "nf4, patch-aware": ("hf", "nf4", None, "patch-aware"),
    "int8": ("hf", "int8", None, "stochastic"),
    "gptq-4": ("hf", "gptq-4", None, "stochastic"),
    "awq-4": ("hf", "awq-4", None, "stochastic"),
    "Q4_K_M": ("gguf", "Q4_K_M", None, "stochastic"),
    "Q4_K_M, patch-aware": ("gguf", "Q4_K_M", None, "patch-aware"),
}
"""Container, the base's format (None: bf16), the output's (None: the base's), and rounding."""
WAYS: dict[str, dict[str, Any]] = {
    "CPU": {"device": "cpu"}, "CUDA": {"device": "cuda"}, "CUDA, 192 MiB": {"device": "cuda", "max_vram": "192MiB"},
}  # fmt: skip
MERGED = ("bf16", "nf4")
"""Jobs that PEFT does, too."""


def measure(name: str, plain: Path, patch: Path, folder: Path) -> list[dict[str, Any]]:
    """The rows of one job."""
    to, stored, quant, rounding = JOBS[name]
    ending = ".gguf" if to == "gguf" else ""
    base, output = plain, folder / f"out{ending}"
    if stored:
        base = folder / f"{stored}{ending}"
        if not base.exists():
            edgeport.export(model=plain, output=base, to=to, quant=stored, device="cpu")
    options = {
        "patch": str(patch), "new_base": str(base), "output": str(output), "to": to, "quant": quant, "rounding": rounding,
        "overwrite": True, "force": True, "probe": False,
    }  # fmt: skip
    rows = [{"job": name, "way": way, **child(PORT, options | settings)} for way, settings in WAYS.items()]
    if name in MERGED:
        rows.append({"job": name, "way": "PEFT on CUDA", **child(PEFT, options)})
    return rows


def child(script: str, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", script, json.dumps(options)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{options}: {done.stderr[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cells(row: dict[str, Any]) -> list[str]:
    planned = row.get("planned_vram")
    return [
        row["job"], row["way"], f"{row['seconds']:.1f} s", in_words(row["vram"]) if row["vram"] else "-",
        in_words(planned) if planned else "-", in_words(row["above"]),
    ]  # fmt: skip


def machine() -> dict[str, Any]:
    import torch

    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--layers", type=int, help="of the model (default: 16)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="its files (default: the packaged model's)")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    shape = replace(SHAPES["1B"], layers=arguments.layers or SHAPES["1B"].layers)
    about, rows = machine(), []
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = write_model(shape, folder / "base", arguments.tokenizer or smollm_tokenizer(folder / "tokenizer"))
        patch = write_patch(shape, folder / "patch")
        for name in arguments.jobs or JOBS:
            for row in measure(name, plain, patch, folder):
                rows.append(row)
                print("  ".join(cells(row)), flush=True)
            if arguments.output:  # after each job: the next may not fit the device
                arguments.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print("\n" + table(["base", "way", "time", "device memory", "planned", "memory above import"], [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
