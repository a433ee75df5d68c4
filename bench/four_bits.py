"""4-bit outputs by how their blocks are found, on the real model: ONNX, GGUF, bitsandbytes, GPTQ and AWQ.

`python -m bench.four_bits [-o results.json] [--only WORD ...]`

From 16 bits each format is made of the numbers alone; with an importance matrix, where the format takes one; and with
`--calibration`, by the text itself. KL to the model itself on the first tokens of the packaged text, computed a layer at a
time, through onnxruntime for ONNX. Matrix and text are the rest of that text, so no model is measured on what it was
calibrated on; llama.cpp's formats are given the same matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import edgeport
from edgeport.demo import packaged_model
from edgeport.locate import open_model
from edgeport.probe import packaged_text, probe_tokens
from edgeport.report import table

MEASURED, TEXT = 384, 4096
"""Tokens that are measured on, and that are read in all; the text has fewer."""
MIB = 1 << 20
FINER, ZEROS = {"output_tensor_type": "int8"}, {"asymmetric": True}
MATRIX, BY_TEXT = {"imatrix": True}, {"calibration": True}
CONTAINERS = {"ONNX": "onnx", "GGUF": "gguf", "folder": "hf"}
WAYS: dict[str, dict[str, Any]] = {
    "ONNX int4": {}, "ONNX int4, importance": MATRIX, "ONNX int4, text": BY_TEXT,
    "ONNX int4, zero points": ZEROS, "ONNX int4, zero points, importance": ZEROS | MATRIX,
    "ONNX int4, head int8": FINER, "ONNX int4, head int8, importance": FINER | MATRIX,
    "ONNX int4, head int8, zero points": FINER | ZEROS,
    "ONNX int4, head int8, zero points, importance": FINER | ZEROS | MATRIX,
    "ONNX int4, head int8, zero points, importance, text": FINER | ZEROS | MATRIX | BY_TEXT,
    "ONNX int4, in blocks of 16, head int8, zero points, importance": FINER | ZEROS | MATRIX | {"block_size": 16},
    **{f"GGUF {quant}{name}": ways for quant in ("Q4_0", "Q4_K_M")
       for name, ways in (("", {}), (", importance", MATRIX), (", text", BY_TEXT), (", importance, text", MATRIX | BY_TEXT))},
    **{f"folder {quant}{name}": ways for quant in ("nf4", "gptq-4", "awq-4") for name, ways in (("", {}), (", text", BY_TEXT))},
}  # fmt: skip


def write_importance(model: Path, path: Path) -> None:
    """llama.cpp's legacy file: the mean square of what each linear layer is given on the text after the measured part."""
    import torch
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
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


def run(scratch: Path, ways: Iterable[str]) -> Iterator[dict[str, Any]]:
    real, matrix, text = scratch / "hf", scratch / "imatrix.dat", scratch / "text.txt"
    edgeport.export(model=packaged_model(), output=real, to="hf", quant="f32")
    write_importance(real, matrix)
    text.write_text(packaged_text())
    for way in ways:
        container, quant = way.split(",")[0].split(" ")
        files = {"imatrix": matrix, "calibration": text}
        given: dict[str, Any] = {name: files.get(name, value) for name, value in WAYS[way].items()}
        output = scratch / ("out.gguf" if container == "GGUF" else f"out-{container}")
        receipt = edgeport.export(model=real, output=output, to=CONTAINERS[container], quant=quant, overwrite=True, **given)
        yield measured(way, output, real, receipt.bytes_out) | {"seconds": receipt.seconds}


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
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="outputs whose names hold one of these")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in run(Path(scratch), [way for way in WAYS if any(word in way for word in arguments.only)]):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print(shown(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
