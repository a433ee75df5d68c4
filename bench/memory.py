"""Peak memory of `edgeport port`, measured as VmHWM of a child process, over depth and over size.

`python -m bench.memory [-o results.json]` makes the models (random weights of the given shapes), ports a rank-16 LoRA
on all seven projections onto each, and prints the peak above what the same imports take without any work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES, Shape, write_model, write_patch

CHILD = """
import json, sys
import torch, numpy
import edgeport.api, edgeport.run, edgeport.memory as memory
from edgeport.registry import codecs, converters, patch_kinds
codecs(), converters(), patch_kinds()
if {to!r} == "gguf":
    import gguf
imports = memory.peak_bytes()
receipt = edgeport.api.port(
    patch={patch!r}, new_base={base!r}, output={output!r}, to={to!r}, quant={quant!r}, max_ram={max_ram!r}, probe=False)
print(json.dumps(dict(imports=imports, above=memory.peak_bytes() - imports, predicted=receipt.predicted_peak_bytes,
                      seconds=receipt.seconds, bytes_out=receipt.bytes_out)))
"""
JOBS = {"bf16 to bf16 HF": ("hf", None, "out"), "bf16 to Q4_K_M GGUF": ("gguf", "Q4_K_M", "out.gguf")}


def measure(base: Path, patch: Path, job: str, folder: Path, max_ram: str | None = None) -> dict[str, Any]:
    """Port in a fresh process; bytes and seconds."""
    to, quant, name = JOBS[job]
    script = CHILD.format(
        patch=str(patch), base=str(base), output=str(folder / name), to=to, quant=quant, max_ram=max_ram
    )
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as the CLI sets it
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(done.stdout))


def smollm_tokenizer(folder: Path) -> Path:
    """The real tokenizer files, out of the packaged GGUF."""
    from edgeport.demo import packaged_model
    from edgeport.locate import open_model

    folder.mkdir(parents=True)
    open_model(packaged_model()).assets(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--depth-only", action="store_true", help="leave out the large shapes")
    arguments = parser.parse_args()
    shapes = {f"{layers} layers of width 512": Shape(512, layers, 1408, 49152, 8, 4) for layers in (8, 32, 128)}
    shapes |= {} if arguments.depth_only else {name: SHAPES[name] for name in SHAPES if name.startswith("1B")}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = smollm_tokenizer(Path(scratch) / "tokenizer")
        for name, shape in shapes.items():
            folder = Path(scratch) / name.replace(" ", "-")
            base = write_model(shape, folder / "base", tokenizer)
            patch = write_patch(shape, folder / "patch")
            for job in JOBS:
                rows.append({"shape": name, "job": job, **measure(base, patch, job, folder)})
                report(rows[-1])
            shutil.rmtree(folder)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def report(row: dict[str, Any]) -> None:
    mib = {key: row[key] / (1 << 20) for key in ("imports", "above", "predicted", "bytes_out")}
    print(
        f"{row['shape']:32} {row['job']:20} above import {mib['above']:6.1f} MiB (predicted {mib['predicted']:6.1f}), "
        f"imports {mib['imports']:5.0f}, wrote {mib['bytes_out']:7.0f} in {row['seconds']:6.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
