"""What a port of the large models takes: by the plan, from their true shapes, and measured on sparse files of those shapes.

`python -m bench.scale [-o scale.json] [--measure NAME ...]` writes each model's headers over holes (a file of 812 GB takes
a few megabytes of disk), plans the port of a rank-16 LoRA on all seven projections, and for the models that --measure
names runs the plan in a process of its own. That run reads every byte, patches and encodes every block; only the last
step, writing the file, is left out, since there is no disk for it. Hashes, which take no memory, are left out too.

Beside them: what a tool takes that has the whole model in memory to add the patch (PEFT's `merge_and_unload` in bf16;
mergekit does a LoRA through it), and what the paper gives for Mistral-7B: 28.71 GB to port and 350.61 GB to fine-tune.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from bench.shapes import LINEAR, Shape
from edgeport import api, journal, manifest, run, staging
from edgeport.checkpoint import safetensors_bytes
from edgeport.locate import open_model, open_patch
from edgeport.memory import in_words
from edgeport.planning import Plan, make_plan
from edgeport.registry import converter
from edgeport.report import table
from edgeport.seams import Target
from edgeport.steps import Limits
from edgeport.tensor import TensorSpec

GEMMA_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
# from the models' published config.json
MODELS = {
    "Mistral-7B": Shape(4096, 32, 14336, 32000, 32, 8, tied=False, family="Mistral"),
    "Llama-2-7B": Shape(4096, 32, 11008, 32000, 32, 32, tied=False),
    "Llama-3.1-8B": Shape(4096, 32, 14336, 128256, 32, 8, tied=False),
    "Gemma-2-9B": Shape(3584, 42, 14336, 256000, 16, 8, head_size=256, family="Gemma2", norms=GEMMA_NORMS),
    "Llama-3.1-70B": Shape(8192, 80, 28672, 128256, 64, 8, tied=False),
    "Llama-3.1-405B": Shape(16384, 126, 53248, 128256, 128, 8, tied=False),
}
SHARD_BYTES = 5 * 10**9
RANK = 16


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    parameters: int
    whole_model_bytes: int
    """In bf16: what PEFT and mergekit have in memory at least."""
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_bytes: int
    measured_peak_bytes: int | None = None
    """VmHWM of the process that ran the plan."""
    measured_above_import_bytes: int | None = None
    seconds: float | None = None


def write_sparse(shape: Shape, folder: Path) -> Path:
    """A sharded bf16 checkpoint whose tensors are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, dimensions in shape.tensors():
        size = 2
        for one in dimensions:
            size *= one
        if sum(spec.nbytes for spec in shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = TensorSpec(name, "BF16", dimensions, size)
    placed = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_holes(folder / file, specs)
        placed.update(dict.fromkeys(specs, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def write_holes(path: Path, specs: dict[str, TensorSpec]) -> None:
    header, _ = safetensors_bytes(specs, {"format": "pt"})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(spec.nbytes for spec in specs.values()))


def write_patch(shape: Shape, folder: Path) -> Path:
    """A LoRA of holes."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [name.rsplit(".", 1)[-1] for name in LINEAR]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    specs = {}
    for layer in range(shape.layers):
        for module in LINEAR:
            rows, columns = shape.matrix(module)
            for factor, dimensions in (("A", (RANK, columns)), ("B", (rows, RANK))):
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
                specs[name] = TensorSpec(name, "BF16", dimensions, 2 * dimensions[0] * dimensions[1])
    write_holes(folder / "adapter_model.safetensors", specs)
    return folder


def planned(folder: Path, device: str) -> Plan:
    """The plan of a port within `folder`, as if the disk were large enough."""
    usage = shutil.disk_usage(folder)._replace(free=1 << 50)
    with mock.patch("shutil.disk_usage", return_value=usage):
        return make_plan(
            open_model(folder / "base"), [open_patch(folder / "patch")], converter("hf"), Target(folder / "out"),
            Limits(device=device),
        )  # fmt: skip


def measure(folder: Path) -> dict[str, float]:
    """Run the plan of `folder` in this process, into nothing."""
    api.formats()  # imports every codec
    plan = planned(folder, "cpu")

    write = staging.write_at

    def discard(handle: int, view: memoryview, offset: int) -> None:
        """Keep the head, which says where each weight lies, and no weight."""
        if offset == 0:
            write(handle, view, offset)

    with (
        mock.patch.object(staging, "write_at", discard),
        mock.patch.object(run, "hashes", return_value={}),
        mock.patch.object(manifest, "hashes", return_value={}),
        mock.patch.object(journal, "digests", return_value={}),
    ):
        receipt = run.run(plan)
    return {"peak": receipt.peak_ram_bytes, "above": receipt.peak_above_import_bytes, "seconds": receipt.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON, and as a table beside it")
    parser.add_argument("--measure", nargs="*", default=[], choices=MODELS, help="run these, not only plan them")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    rows = []
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_sparse(shape, folder / "base")
            write_patch(shape, folder / "patch")
            cpu, cuda = planned(folder, "cpu"), planned(folder, "cuda")
            found: dict[str, float] = {}
            if name in arguments.measure:
                command = [sys.executable, "-m", "bench.scale", "--child", str(folder)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            rows.append(
                Row(
                    name, shape.parameters, 2 * shape.parameters, cpu.peak_ram_bytes, cuda.peak_vram_bytes, cpu.disk_bytes,
                    int(found["peak"]) if found else None, int(found["above"]) if found else None, found.get("seconds"),
                )
            )
            print("  ".join(cells(rows[-1])), flush=True)
    text = table(HEAD, [cells(row) for row in rows])
    print("\n" + text)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        arguments.output.with_suffix(".txt").write_text(text + "\n")


HEAD = ("model", "parameters", "whole model in bf16", "RAM, planned", "VRAM, planned", "disk", "RAM, measured", "time")


def cells(row: Row) -> list[str]:
    measured = "-" if row.measured_peak_bytes is None else in_words(row.measured_peak_bytes)
    return [
        row.model, f"{row.parameters / 1e9:.2f} G", in_words(row.whole_model_bytes), in_words(row.peak_ram_bytes),
        in_words(row.peak_vram_bytes), in_words(row.disk_bytes), measured, "-" if row.seconds is None else f"{row.seconds:.0f} s",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
