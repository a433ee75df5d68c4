"""A patch on a quantized base, from that base alone: which rounding keeps it, and what it costs.

`python -m bench.quantized [-o results.json] [FORMAT ...]` makes the demo's evolved base (bf16), quantizes it to each
format, and ports the triage patch onto the quantized base four ways: exactly (float32, four times the size: what the
rounding is judged against), rounded to nearest as other tools do, stochastically on the base's own grid (edgeport's
default there), and, as a bar, onto the 16-bit base first and quantized once. Printed: accuracy on the 400 held-out
questions, KL to the exact port and perplexity on edgeport's probe text, retention, and size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgeport
from edgeport.demo import ADAPTERS, child, packaged_model
from edgeport.demo.triage import accuracy_interval
from edgeport.report import table

GGUF = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0")
FOLDERS = ("nf4", "nf4-dq", "int8", "gptq-4", "awq-4")
TRIAGE = ADAPTERS / "triage"
TOKENS = 512


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
    retention: float | None
    bytes: int


def measure(format: str, evolved: Path, folder: Path) -> Iterator[Row]:
    """The five rows of one format."""
    to = "gguf" if format in GGUF else "hf"
    ending = ".gguf" if to == "gguf" else ""
    places = {way: folder / f"{way.replace(' ', '-')}{ending}" for way in ("base", "nearest", "stochastic", "16-bit first")}
    exact = folder / "exact"
    base = places["base"]
    receipts: dict[str, Any] = {"base": edgeport.export(model=evolved, output=base, to=to, quant=format)}
    receipts["exact"] = edgeport.port(patch=TRIAGE, new_base=base, output=exact, to="hf", quant="f32")
    receipts["16-bit first"] = edgeport.port(
        patch=TRIAGE, new_base=evolved, output=places["16-bit first"], to=to, quant=format, rounding="nearest", force=True,
        probe=False,
    )
    for rule in ("nearest", "stochastic"):
        receipts[rule] = edgeport.port(
            patch=TRIAGE, new_base=base, output=places[rule], to=to, rounding=rule, force=True, probe=False
        )
    for way, place in {"base": base, "exact": exact, **places}.items():
        found = edgeport.compare(place, exact, tokens=TOKENS)
        asked = ask(place, folder)
        survival = receipts[way].survival or {}
        yield Row(
            format, way, asked["correct"], asked["total"], found.mean_kl, found.candidate_perplexity, survival.get("mean"),
            receipts[way].bytes_out,
        )  # fmt: skip


def ask(model: Path, folder: Path) -> dict[str, Any]:
    """The held-out questions through llama.cpp; a folder is first written as a GGUF of its own numbers."""
    if model.is_dir():
        edgeport.export(model=model, output=folder / "asked.gguf", to="gguf", quant="f32", overwrite=True)
        model = folder / "asked.gguf"
    return child(["-m", "edgeport.demo.ask", str(model)])


def cells(row: Row) -> list[str]:
    low, high = accuracy_interval(row.correct, row.total)
    kept = "-" if row.retention is None else f"{row.retention:.3f}"
    return [
        row.format, row.way, f"{row.correct / row.total:.1%} ({low:.1%} to {high:.1%})", f"{row.kl:.4f}",
        f"{row.perplexity:.2f}", kept, f"{row.bytes / (1 << 20):.1f} MiB",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join((*GGUF, *FOLDERS))} (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        evolved = Path(scratch) / "evolved"
        edgeport.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=evolved, to="hf", quant="bf16")
        for format in arguments.formats or (*GGUF, *FOLDERS):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                for row in measure(format, evolved, Path(folder)):
                    rows.append(row)
                    print("  ".join(cells(row)), flush=True)
    head = ["base", "way", "triage accuracy (95 %)", "KL to exact", "perplexity", "kept", "size"]
    print("\n" + table(head, [cells(row) for row in rows]))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
