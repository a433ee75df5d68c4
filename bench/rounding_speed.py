"""What rounding on a grid costs: seconds for a million weights, from stored bytes to stored bytes.

`python -m bench.rounding_speed [FORMAT ...] [--device cuda] [--columns 1024 4096] [-o speed.json]` moves made-up weights by
a change of 1 %, a block of a million at a time as a port does, with each rule; patch-aware sees as many made-up tokens as a
port has real ones, and getting at those (one run of the text through the model) is not in it. The best of --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

from edgeport.blocks import encode_rows
from edgeport.calibration import TOKENS
from edgeport.device import choose
from edgeport.memory import return_freed_blocks
from edgeport.registry import codec, roundings
from edgeport.report import table
from edgeport.rounding import Inputs, on_grid
from edgeport.steps import BLOCK_ELEMENTS

FORMATS = {
    "NF4": "bnb4", "NF4_DQ": "bnb4", "LLM_INT8": "int8", "Q4_0": "ggml", "Q4_1": "ggml", "Q4_K": "ggml", "Q5_K": "ggml",
    "Q6_K": "ggml", "Q8_0": "ggml", "GPTQ_4": "gptq", "AWQ_4": "awq",
}  # fmt: skip
CHANGE = 0.01


def measure(format: str, columns: int, device: str, repeats: int) -> list[dict[str, object]]:
    """A row for each rule."""
    torch.manual_seed(0)
    owner = codec(FORMATS[format])
    weight = owner.layout("model.layers.0.mlp.up_proj.weight", (max(BLOCK_ELEMENTS // columns // 32, 1) * 32, columns), format)
    base = torch.randn(weight.rows, columns, device=device) * 0.02
    # ggml's encoder works on the CPU alone
    parts = {role: data.to(device) for role, data in encode_rows(weight, base).items()}
    grid = owner.grid(weight, parts)  # type: ignore[attr-defined]
    target = grid.values() + torch.randn(weight.rows, columns, device=device) * (0.02 * CHANGE)
    inputs = torch.randn(TOKENS, columns, device=device).bfloat16()
    rows: list[dict[str, object]] = []
    for name, rule in sorted(roundings().items()):
        best = float("inf")
        for _ in range(repeats):
            wait(device)
            began = time.perf_counter()
            codes = on_grid(rule, owner.grid(weight, parts), target, "w", 0, Inputs(inputs, 1.0))  # type: ignore[attr-defined]
            owner.with_codes(weight, parts, codes)  # type: ignore[attr-defined]
            wait(device)
            best = min(best, time.perf_counter() - began)
        place = {"format": format, "columns": columns, "rounding": name, "device": device, "threads": torch.get_num_threads()}
        cost = {"seconds_per_million": best / weight.elements * 1e6, "bytes_per_weight": weight.nbytes / weight.elements}
        rows.append(place | cost)
    return rows


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)} (default: all)")
    parser.add_argument("--columns", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--device", type=choose, default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    return_freed_blocks()
    rows = []
    with torch.no_grad():
        for format in arguments.formats or FORMATS:
            for columns in arguments.columns:
                rows += measure(format, columns, arguments.device, arguments.repeats)
    cells = [[str(row["format"]), str(row["columns"]), str(row["rounding"]), f"{row['seconds_per_million']:.4f}",
              f"{row['bytes_per_weight']:.3f}"] for row in rows]  # fmt: skip
    threads = f", {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} threads" if arguments.device == "cpu" else ""
    print(f"{arguments.device}{threads}\n" + table(["format", "columns", "rounding", "s per million", "bytes a weight"], cells))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
