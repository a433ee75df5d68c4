"""ONNX outputs in optimum's `ORTModelForCausalLM`: `make test-interop`.

optimum-onnx pins a transformers older than edgeport's, so it has an environment of its own, whose Python is the argument.
Here tiny random models are exported; there `READER` generates greedily from each folder. The tokens have to be those of
edgeport's own runner on the same file, and for fp32 those of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import edgeport
from bench.onnx_models import saved_model
from edgeport.report import table
from edgeport.runtime import Runner

PROMPT, COUNT = [7, 110, 31, 254, 19, 88, 163, 42, 205], 20
# Gemma 2 is missing: optimum-onnx 0.1.0 cannot load it from any exporter, its own included
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral, window of 8": {"model_type": "mistral", "sliding_window": 8},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"quant": "fp32"}, "fp32, portable": {"quant": "fp32", "portable": True}, "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
}  # fmt: skip
READER = """
import json, sys, torch, transformers
from optimum.onnxruntime import ORTModelForCausalLM
prompt, count, folders = json.loads(sys.argv[1])
said = {}
for folder in folders:
    try:
        model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True)
        ids = torch.tensor([prompt])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        said[folder] = made[0, len(prompt):].tolist()
    except Exception as error:
        said[folder] = f"{type(error).__name__}: {error}"
print(json.dumps({"transformers": transformers.__version__, "said": said}))
"""


def written(model: Any) -> list[int]:
    """The tokens that transformers goes on with."""
    import torch

    made = model.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(made[0, len(PROMPT) :].tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment that has optimum-onnx")
    python = parser.parse_args().python
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        expected: dict[str, list[int]] = {}
        exact: dict[str, list[int]] = {}
        for name, facts in FAMILIES.items():
            theirs = written(saved_model(facts, Path(scratch) / name))
            for way, options in WAYS.items():
                output = Path(scratch) / f"{name}, {way}"
                edgeport.export(model=Path(scratch) / name, output=output, to="onnx", **options)
                expected[str(output)] = list(Runner(output).generate(PROMPT, COUNT))
                if options["quant"] == "fp32":
                    exact[str(output)] = theirs
        arguments = [python, "-c", READER, json.dumps([PROMPT, COUNT, list(expected)])]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if done.returncode:
            sys.stderr.write(done.stderr)
            return 1
        answer = json.loads(done.stdout.splitlines()[-1])
    for folder, tokens in expected.items():
        said = answer["said"][folder]
        same = said == tokens and tokens == exact.get(folder, tokens)
        bad += not same
        rows.append([Path(folder).name, "the same tokens" if same else f"FAILED: {said}"])
    print(f"optimum-onnx under transformers {answer['transformers']}: {COUNT} greedy tokens after {len(PROMPT)}\n")
    print(table(["model", "against edgeport's runner, and transformers for fp32"], rows))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
