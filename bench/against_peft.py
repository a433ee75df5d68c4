"""A patch on a bitsandbytes 4-bit base: PEFT's `merge_and_unload` beside `edgeport port`, on the same base and questions.

`python -m bench.against_peft [-o results.json] [FORMAT ...]` makes the demo's evolved base in each format, and lets each
tool put the triage patch into it in a process of its own. Printed: accuracy on the 400 held-out questions, KL to the
exact port and perplexity on edgeport's probe text, the process's peak memory (VmHWM, imports included), and its seconds.

PEFT's model is taken as it is right after the merge: on CPUs with AVX512-BF16 the first forward turns the weights over
in place, after which their codes mean nothing. Its 4-bit numbers are written out as float32, since transformers 5.23 does not
save a model that it has loaded from a bitsandbytes checkpoint; that writing is in neither its time nor its peak. Of edgeport
both are of the whole process, from the interpreter's start to the synced output, but for the probe of the result; what the
process that runs the rounding's text takes at its highest is added.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgeport
from edgeport.demo import ADAPTERS, child, packaged_model
from edgeport.demo.triage import accuracy_interval
from edgeport.locate import open_model
from edgeport.memory import in_words, peak_bytes
from edgeport.report import table

FORMATS = ("nf4", "nf4-dq")
TRIAGE = ADAPTERS / "triage"
TOKENS = 512
"""Of the probe text."""


@dataclass(frozen=True, slots=True)
class Row:
    format: str
    way: str
    correct: int
    total: int
    kl: float
    """Mean over the probe text's positions, in nats: KL(exact port on the same base || this)."""
    perplexity: float
    """On the probe text."""
    peak_bytes: int | None = None
    seconds: float | None = None


def merge(base: Path, output: Path) -> dict[str, Any]:
    """Merge as PEFT's documentation has it, in this process; then write what the merged weights are."""
    began = time.perf_counter()
    import bitsandbytes
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    warnings.simplefilter("ignore")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, TRIAGE).merge_and_unload()
    found = {"seconds": time.perf_counter() - began, "peak_bytes": peak_bytes()}
    quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    tensors = {}
    for name, parameter in model.named_parameters():
        if name in quantized:
            values = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        else:
            values = parameter.data
        tensors[name] = values.to(torch.float32).contiguous()
    source = open_model(base)
    output.mkdir()
    for name, path in source.assets(output).items():
        (output / name).write_bytes(path.read_bytes())
    config = {key: value for key, value in source.config.items() if key != "quantization_config"} | {"dtype": "float32"}
    (output / "config.json").write_text(json.dumps(config))
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return found


def measure(format: str, evolved: Path, folder: Path) -> list[Row]:
    """The rows of one format."""
    base, exact, ours, theirs = (folder / name for name in ("base", "exact", "ours", "theirs"))
    edgeport.export(model=evolved, output=base, to="hf", quant=format)
    edgeport.port(patch=TRIAGE, new_base=base, output=exact, to="hf", quant="f32")
    began = time.perf_counter()
    port = ["port", "--patch", str(TRIAGE), "--new-base", str(base), "-o", str(ours), "--no-probe", "--json", "--no-progress"]
    receipt = child(["-m", "edgeport", *port])
    whole = time.perf_counter() - began
    peak = receipt["peak_ram_bytes"] + (receipt["calibration"] or {"peak_ram_bytes": 0})["peak_ram_bytes"]
    merged = child(["-m", "bench.against_peft", "--merge", str(base), str(theirs)])
    costs: dict[str, tuple[int | None, float | None]] = {
        "base": (None, None), "exact": (None, None), "PEFT": (merged["peak_bytes"], merged["seconds"]),
        "edgeport": (peak, whole),
    }  # fmt: skip
    rows = []
    for way, place in {"base": base, "exact": exact, "PEFT": theirs, "edgeport": ours}.items():
        against, asked = edgeport.compare(place, exact, tokens=TOKENS), ask(place, folder)
        figures = (asked["correct"], asked["total"], against.mean_kl, against.candidate_perplexity)
        rows.append(Row(format, way, *figures, *costs[way]))
        print("  ".join(cells(rows[-1])), flush=True)
    return rows


def ask(model: Path, folder: Path) -> dict[str, Any]:
    """The held-out questions through llama.cpp, put to the GGUF of a folder's numbers."""
    asked = folder / "asked.gguf"
    edgeport.export(model=model, output=asked, to="gguf", quant="f32", overwrite=True)
    return child(["-m", "edgeport.demo.ask", str(asked)])


def cells(row: Row) -> list[str]:
    low, high = accuracy_interval(row.correct, row.total)
    return [
        row.format, row.way, f"{row.correct / row.total:.1%} ({low:.1%} to {high:.1%})", f"{row.kl:.4f}",
        f"{row.perplexity:.2f}", "-" if row.peak_bytes is None else in_words(row.peak_bytes),
        "-" if row.seconds is None else f"{row.seconds:.1f} s",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="of nf4, nf4-dq, fp4, fp4-dq (default: the first two)")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--merge", nargs=2, type=Path, metavar=("BASE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        sys.stdout.write(json.dumps(merge(*arguments.merge)) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        evolved = Path(scratch) / "evolved"
        edgeport.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=evolved, to="hf", quant="bf16")
        for format in arguments.formats or FORMATS:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                rows += measure(format, evolved, Path(folder))
    head = ["base", "way", "triage accuracy (95 %)", "KL to exact", "perplexity", "peak RAM", "time"]
    print("\n" + table(head, [cells(row) for row in rows]))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
