"""ONNX outputs: how right, and how fast to run, beside onnxruntime-genai's builder and llama.cpp.

`python -m bench.onnx_models [logits] [speed] [cuda] [-o results.json]` (default: the first two)

logits  every family and precision on tiny random models, and the real one, against transformers: text in two chunks, then
        twenty tokens one by one; largest error as a share of the largest logit, mean KL in nats, top-1 agreement
speed   milliseconds a token on the real model, the programs taking turns token by token
cuda    both on a CUDA device, in half precision: logits against transformers' in fp32, milliseconds a token and a
        prompt, beside the builder's graphs and transformers; --model names another model than the packaged one
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeport
from edgeport.demo import packaged_model
from edgeport.report import table
from edgeport.runtime import Runner

FIRST, SECOND, SINGLE = 9, 5, 20
SMALL = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama"},
    "Llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "Mistral, window of 8": {"model_type": "mistral", "sliding_window": 8},
    "Gemma 2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8,
                "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Qwen2": {"model_type": "qwen2"},
    "Qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"quant": "fp32"}, "fp32, portable": {"quant": "fp32", "portable": True}, "fp16": {"quant": "fp16"},
    "bf16": {"quant": "bf16"}, "int8": {"quant": "int8"}, "int4": {"quant": "int4"},
    "int4, zero points": {"quant": "int4", "asymmetric": True},
    "int4, head int8": {"quant": "int4", "output_tensor_type": "int8"},
}  # fmt: skip
BUILDER = """
import runpy, sys
options = zip(("-i", "-o", "-p", "-c", "-e"), sys.argv[1:])
sys.argv = ["builder", "-m", "model", *(word for pair in options for word in pair)]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


def text(vocabulary: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, vocabulary, (1, FIRST + SECOND + SINGLE))


def distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, float, float]:
    """Largest error over largest logit; mean KL(theirs || ours) in nats; share of equal first choices."""
    logs = [logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
            for logits in (theirs, ours)]  # fmt: skip
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return float(error), float(max(kl, 0.0)), float((ours.argmax(-1) == theirs.argmax(-1)).mean())


def spoken(output: Path, tokens: NDArray[np.int64], runner: Runner | None = None) -> NDArray[np.float32]:
    """Logits, in two chunks and token by token."""
    runner = runner or Runner(output, threads=1)
    edges = [0, FIRST, *range(FIRST + SECOND, tokens.shape[1] + 1)]
    return np.concatenate([runner.step(tokens[:, start:stop]) for start, stop in pairwise(edges)], axis=1)


def random_model(settings: Mapping[str, Any]) -> Any:
    """transformers' model of these settings, of weights so far from zero and from each other that a mistake in one shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    told = deepcopy(dict(settings))  # which transformers changes
    causal: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(told.pop("model_type"), **told)
        model = causal.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            # norms and biases that are not all alike, and logits that are not all about zero
            parameter.data = parameter.data * 3 if parameter.ndim > 1 else parameter.data + torch.randn_like(parameter) * 0.1
    return model


def saved_model(facts: Mapping[str, Any], folder: Path) -> Any:
    """A tiny one of the family that `facts` name, which `folder` then has as well."""
    model = random_model({**SMALL, **facts})
    model.save_pretrained(folder)
    return model


def models(folder: Path) -> Iterator[tuple[str, Path, Any]]:
    """A tiny random model of each family, and the real one: name, folder, and transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, facts in FAMILIES.items():
        yield name, folder / name, saved_model(facts, folder / name)
    real = folder / "real"
    edgeport.export(model=packaged_model(), output=real, to="hf", quant="f32")
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32, attn_implementation="eager")
    yield "SmolLM2-135M (real, of Q4_1)", real, model


def logits(scratch: Path) -> Iterator[dict[str, Any]]:
    import torch

    for name, folder, model in models(scratch):
        tokens = text(model.config.vocab_size)
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens)).logits.numpy()
        for way, options in WAYS.items():
            output = scratch / "out"
            edgeport.export(model=folder, output=output, to="onnx", overwrite=True, **options)
            error, kl, same = distance(spoken(output, tokens), theirs)
            yield {"model": name, "precision": way, "error": error, "kl": kl, "top1": same}


def build_with_genai(*arguments: str) -> None:
    """Model, output, precision, cache, execution provider. Raises CalledProcessError."""
    done = subprocess.run([sys.executable, "-c", BUILDER, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()


@dataclass(frozen=True, slots=True)
class Racer:
    name: str
    step: Callable[[int], object]
    pace: str
    """Of the program that it is compared with."""


def speed(scratch: Path, tokens: int = 60) -> Iterator[dict[str, Any]]:
    """Each program in turn makes two tokens, there and back again, so that whatever else the machine does falls on all
    alike; the ratio is the median over the turns. Processor time tells more than the clock where cores are shared.
    """
    real = scratch / "hf"
    edgeport.export(model=packaged_model(), output=real, to="hf", quant="f32")
    edgeport.export(model=real, output=scratch / "Q4_K_M.gguf", to="gguf", quant="Q4_K_M")
    for quant in ("fp32", "int8", "int4"):
        edgeport.export(model=real, output=scratch / quant, to="onnx", quant=quant)
        build_with_genai(str(real), str(scratch / f"genai-{quant}"), quant, str(scratch / "cache"), "cpu")
    for threads in (1, 2):
        racers = [
            racer(program, scratch / f"{prefix}{quant}", threads, f"genai builder {quant}")
            for quant in ("fp32", "int8", "int4")
            for program, prefix in ((f"genai builder {quant}", "genai-"), (f"edgeport {quant}", ""))
        ]
        racers.append(Racer("llama.cpp Q4_K_M", llama(scratch / "Q4_K_M.gguf", threads), "genai builder int4"))
        wall: dict[str, list[float]] = {each.name: [] for each in racers}
        busy: dict[str, list[float]] = {each.name: [] for each in racers}
        for turn in range(tokens):
            for each in racers if turn % 2 else racers[::-1]:
                each.step(100 + turn)  # brings its own weights back into the cache
                began, used = time.perf_counter(), time.process_time()
                each.step(200 + turn)
                each.step(300 + turn)
                wall[each.name].append((time.perf_counter() - began) / 2)
                busy[each.name].append((time.process_time() - used) / 2)
        for each in racers:
            ratios = {
                name: median(ours / theirs for ours, theirs in zip(spent[each.name], spent[each.pace], strict=True))
                for name, spent in (("ratio", wall), ("cpu_ratio", busy))
            }
            yield {"program": each.name, "threads": threads, "median": median(wall[each.name]), "least": min(wall[each.name]),
                   "cpu": median(busy[each.name]), **ratios}  # fmt: skip


def racer(name: str, model: Path, threads: int, pace: str) -> Racer:
    runner = Runner(model, threads=threads, head_dim=64)
    runner.step(text(40000))
    return Racer(name, lambda token: runner.step([[token]]), pace)


def llama(model: Path, threads: int) -> Callable[[int], object]:
    from llama_cpp import Llama

    loaded = Llama(str(model), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    loaded.eval(text(40000)[0].tolist())
    return lambda token: loaded.eval([token])


PROMPT = 512
CUDA = ("fp16", "bf16", "int8", "int4")


def cuda(scratch: Path, model: Path | None = None, tokens: int = 100) -> Iterator[dict[str, Any]]:
    """One row a program, as soon as it is measured: here nothing else runs, and programs need not take turns."""
    import torch
    from transformers import AutoModelForCausalLM

    real = scratch / "hf"
    edgeport.export(model=model or packaged_model(), output=real, to="hf", quant="f32")
    causal: Any = AutoModelForCausalLM
    peer = causal.from_pretrained(real, dtype=torch.float32)
    asked = text(peer.config.vocab_size)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(asked)).logits.numpy()
    halved = peer.half().cuda()
    yield {"program": "transformers fp16", **timed(Transformers(halved), peer.config.vocab_size, tokens)}
    for program, quant in [*(("edgeport", quant) for quant in CUDA), ("genai builder", "fp16"), ("genai builder", "int4")]:
        output = scratch / "out"
        try:
            if program == "edgeport":
                edgeport.export(model=real, output=output, to="onnx", quant=quant, execution_provider="cuda")
            else:
                build_with_genai(str(real), str(output), quant, str(scratch / "cache"), "cuda")
            runner = Runner(output, provider="cuda", head_dim=peer.config.head_dim)
            error, kl, same = distance(spoken(output, asked, runner), theirs)
            times = timed(runner, peer.config.vocab_size, tokens)
        except Exception as reason:  # of one program: the others go on
            sys.stderr.write(f"{program} {quant}: {reason}\n")
            continue
        yield {"program": f"{program} {quant}", "error": error, "kl": kl, "top1": same, **times}
        shutil.rmtree(output, ignore_errors=True)


class Transformers:
    """transformers with its own cache, stepped as a Runner is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def step(self, ids: Any) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            made = self.model(torch.tensor(ids, device=self.model.device), past_key_values=self.cache)
        return np.asarray(made.logits.float().cpu().numpy())


def timed(runner: Runner | Transformers, vocabulary: int, tokens: int) -> dict[str, float]:
    """Median seconds of a prompt of `PROMPT` tokens and of each token after it, their logits on the CPU."""
    prompt = np.random.default_rng(1).integers(3, vocabulary, (1, PROMPT)).tolist()
    prompts: list[float] = []
    for _ in range(5):
        runner.reset()
        began = time.perf_counter()
        runner.step(prompt)
        prompts.append(time.perf_counter() - began)
    singles: list[float] = []
    for turn in range(tokens):
        began = time.perf_counter()
        runner.step([[100 + turn]])
        singles.append(time.perf_counter() - began)
    return {"prompt": median(prompts), "median": median(singles), "least": min(singles)}


MIB = 1 << 20
Rows = list[dict[str, Any]]


def shown(found: Mapping[str, Rows]) -> str:
    """The tables, one below the other."""
    pieces = []
    if rows := found.get("logits"):
        cells = [[r["model"], r["precision"], f"{r['error']:.1e}", f"{r['kl']:.1e}", f"{r['top1']:.0%}"] for r in rows]
        pieces.append(table(["model", "precision", "largest error", "KL", "top-1"], cells))
    if rows := found.get("speed"):
        cells = [
            [r["program"], str(r["threads"]), *(f"{1e3 * r[key]:.1f}" for key in ("median", "least", "cpu")),
             f"{r['ratio']:.2f}", f"{r['cpu_ratio']:.2f}"]
            for r in rows
        ]  # fmt: skip
        pieces.append(table(["program", "threads", "ms a token", "least", "of CPU", "to the builder", "of CPU"], cells))
    if rows := found.get("cuda"):
        cells = [
            [r["program"], *([f"{r['error']:.1e}", f"{r['kl']:.1e}", f"{r['top1']:.0%}"] if "kl" in r else ["-"] * 3),
             *(f"{1e3 * r[key]:.2f}" for key in ("prompt", "median", "least"))]
            for r in rows
        ]  # fmt: skip
        heads = ["program", "largest error", "KL", "top-1", f"ms for {PROMPT} tokens", "ms a token", "least"]
        pieces.append(table(heads, cells))
    return "\n\n".join(pieces)


PARTS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {"logits": logits, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join([*PARTS, 'cuda'])}")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--model", type=Path, help="of the part cuda, in place of the packaged model")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found: dict[str, Rows] = {}
    for part in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            found[part] = []
            for row in cuda(Path(scratch), arguments.model) if part == "cuda" else PARTS[part](Path(scratch)):
                found[part].append(row)
                print(row, file=sys.stderr, flush=True)
    print(shown(found))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
