"""A patch on a quantized base, from that base alone: which rounding keeps it, and what it costs.

`python -m bench.quantized [--base FOLDER] [-o results.json] [FORMAT ...]` quantizes an evolved base to each format (the
demo's, whose numbers descend from a Q4_1 file, or one that `bench.train_full` made, which lie on no grid), and ports the
triage patch onto the quantized base in several ways: exactly (float32, four times the size: what the rounding is judged
against), rounded to nearest as other tools do, on the base's own grid stochastically and patch-aware (edgeport's default
there), and, as a bar, onto the 16-bit base first and quantized once; then at a price in size, with what rounding lost as
an adapter of rank 8 or 32 beside it, with weights promoted up to a tenth more, and the patch as a sidecar. Printed:
accuracy on the 400 held-out questions, KL to the exact port and perplexity on edgeport's probe text, retention, and size.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
WAYS = (
    "base", "exact", "nearest", "stochastic", "patch-aware", "16-bit first", "residual 8", "residual 32", "promote", "sidecar",
)  # fmt: skip
PROMOTED = 1.1
"""The size that promotion may use, relative to the base's."""


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


def ports(format: str, evolved: Path, base: Path, size: int) -> dict[str, dict[str, Any]]:
    """The ways, in the order of the table, and what makes them. `size`: bytes of the quantized base."""
    own: dict[str, Any] = {"new_base": base}
    return {
        "exact": {**own, "to": "hf", "quant": "f32"},
        "nearest": {**own, "rounding": "nearest"},
        "stochastic": {**own, "rounding": "stochastic"},
        "patch-aware": {**own, "rounding": "patch-aware"},
        "16-bit first": {"new_base": evolved, "quant": format, "rounding": "nearest"},
        "residual 8": {**own, "residual": 8},
        "residual 32": {**own, "residual": 32},
        "promote": {**own, "promote": True, "max_size": int(size * PROMOTED)},
        "sidecar": {**own, "sidecar": True},
    }


def measure(format: str, evolved: Path, folder: Path, wanted: Sequence[str], tokens: int) -> Iterator[Row]:
    """The rows of one format."""
    to = "gguf" if format in GGUF else "hf"
    ending = ".gguf" if to == "gguf" else ""
    base, exact = folder / f"base{ending}", folder / "exact"
    receipts = {"base": edgeport.export(model=evolved, output=base, to=to, quant=format)}
    places = {"base": base}
    for way, options in ports(format, evolved, base, receipts["base"].bytes_out).items():
        if way in wanted or way == "exact":
            places[way] = exact if way == "exact" else folder / f"{way.replace(' ', '-')}{ending}"
            common = {"patch": TRIAGE, "output": places[way], "to": to, "force": True, "probe": False}
            receipts[way] = edgeport.port(**common | options)
    for way, place in places.items():
        if way in wanted:
            found = edgeport.compare(place, exact, tokens=tokens)
            asked = ask(place, receipts[way].adapter, folder)
            survival = receipts[way].survival or {}
            yield Row(
                format, way, asked["correct"], asked["total"], found.mean_kl, found.candidate_perplexity, survival.get("mean"),
                receipts[way].bytes_out,
            )  # fmt: skip


def ask(model: Path, adapter: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The held-out questions through llama.cpp; a folder, or a model with an adapter, first becomes one GGUF of its numbers."""
    asked = folder / "asked.gguf"
    common: dict[str, Any] = {"new_base": model, "output": asked, "to": "gguf", "quant": "f32", "overwrite": True, "probe": False}
    if adapter:
        beside = (model if model.is_dir() else model.parent) / adapter["path"]
        edgeport.port(patch=beside, **common)
    elif model.is_dir():
        edgeport.export(model=model, output=asked, to="gguf", quant="f32", overwrite=True)
    return child(["-m", "edgeport.demo.ask", str(asked if adapter or model.is_dir() else model)])


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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="rows to make (default: all)")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="a 16-bit evolved base (default: the demo's)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the probe text")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        evolved = arguments.base or Path(scratch) / "evolved"
        if not arguments.base:
            edgeport.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=evolved, to="hf", quant="bf16")
        for format in arguments.formats or (*GGUF, *FOLDERS):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                for row in measure(format, evolved, Path(folder), arguments.ways, arguments.tokens):
                    rows.append(row)
                    print("  ".join(cells(row)), flush=True)
    head = ["base", "way", "triage accuracy (95 %)", "KL to exact", "perplexity", "kept", "size"]
    print("\n" + table(head, [cells(row) for row in rows]))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
