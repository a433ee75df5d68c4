"""int4 ONNX by how its blocks' scales are found, on the real model, beside llama.cpp's formats.

`python -m bench.onnx_int4 [-o results.json]`

KL to the model itself on the first tokens of the packaged text, through onnxruntime. The importance matrix is of the rest
of that text, so no model is measured on what it was calibrated on; llama.cpp's formats are given the same matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import edgeport
from edgeport.demo import packaged_model
from edgeport.locate import open_model
from edgeport.probe import probe_tokens
from edgeport.report import table

MEASURED, TEXT = 384, 4096
"""Tokens that are measured on, and that are read in all; the text has fewer."""
MIB = 1 << 20
FINER = {"output_tensor_type": "int8"}
WAYS: dict[str, dict[str, Any]] = {
    "int4": {}, "int4, importance": {"imatrix": True}, "int4, zero points": {"asymmetric": True},
    "int4, zero points, importance": {"asymmetric": True, "imatrix": True},
    "int4, head int8": FINER, "int4, head int8, importance": FINER | {"imatrix": True},
    "int4, head int8, zero points": FINER | {"asymmetric": True},
    "int4, head int8, zero points, importance": FINER | {"asymmetric": True, "imatrix": True},
    "int4 in blocks of 16, head int8, zero points, importance":
        FINER | {"asymmetric": True, "imatrix": True, "block_size": 16},
}  # fmt: skip
GGUF = ("Q4_0", "Q4_K_S", "Q4_K_M")


def write_importance(model: Path, path: Path) -> None:
    """llama.cpp's legacy file: the mean square of what each linear layer is given on the text after the measured part."""
    import torch
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def note(name: str, _: Any, inputs: tuple[torch.Tensor]) -> None:
        found[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).square().mean(0)

    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
             "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for name, module in peer.named_modules():
        parts = name.split(".")
        if parts[-1] in short:
            module.register_forward_pre_hook(partial(note, f"blk.{parts[2]}.{short[parts[-1]]}.weight"))
    peer.lm_head.register_forward_pre_hook(partial(note, "token_embd.weight"))
    with torch.no_grad():
        peer(probe_tokens(open_model(model), TEXT)[:, MEASURED:])
    data = struct.pack("<i", len(found))
    for name, values in found.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values)) + values.numpy().tobytes()
    path.write_bytes(data)


def run(scratch: Path) -> Iterator[dict[str, Any]]:
    real, matrix = scratch / "hf", scratch / "imatrix.dat"
    edgeport.export(model=packaged_model(), output=real, to="hf", quant="f32")
    write_importance(real, matrix)
    for way, options in WAYS.items():
        given = {name: matrix if name == "imatrix" else value for name, value in options.items()}
        receipt = edgeport.export(model=real, output=scratch / "out", to="onnx", quant="int4", overwrite=True, **given)
        yield measured(f"ONNX {way}", scratch / "out", real, receipt.bytes_out) | {"seconds": receipt.seconds}
    for quant in GGUF:
        for imatrix in (None, matrix):
            output = scratch / f"{quant}.gguf"
            receipt = edgeport.export(model=real, output=output, to="gguf", quant=quant, imatrix=imatrix, overwrite=True)
            name = f"GGUF {quant}{', importance' if imatrix else ''}"
            yield measured(name, output, real, receipt.bytes_out) | {"seconds": receipt.seconds}


def measured(name: str, output: Path, real: Path, size: int) -> dict[str, Any]:
    told = edgeport.compare(output, real, tokens=MEASURED)
    return {"output": name, "bytes": size, "kl": told.mean_kl, "top1": told.top1, "perplexity": told.candidate_perplexity}


def shown(rows: list[dict[str, Any]]) -> str:
    cells = [
        [row["output"], f"{row['bytes'] / MIB:.0f} MiB", f"{row['kl']:.3f}", f"{row['top1']:.1%}", f"{row['seconds']:.0f} s"]
        for row in rows
    ]
    return table(["output", "size", "KL", "top-1", "time"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in run(Path(scratch)):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print(shown(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
