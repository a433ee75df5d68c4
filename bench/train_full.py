"""Make an evolved base by full-parameter training, whose weights lie on no 4-bit grid and near none.

The old base comes out of a Q4_1 file, so its weights, and what a few LoRA steps make of them, sit on that file's grid.
Here every matrix first gets uniform noise of up to half a Q4_1 step either way, which leaves nothing of the grid, and then
all parameters are trained on the pages of `bench.train_evolution`. Repair and continued pretraining are one:

python -m bench.train_full --text handbook/usr/share/doc/debian-handbook/html/en-US -o full-evolved

That is some 820,000 tokens, under a minute on a data-centre GPU and an hour or two on two cores (--steps 160 --batch-size 2
is a tenth of it).

Printed and kept in training.json: held-out perplexity of the old base, with the noise, and after training; and how far
the weights are from the grids of Q4_1, Q5_1 and NF4, on average a quarter of a step for numbers never quantized.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

import edgeport
from bench import training
from bench.train_evolution import CHUNK, batches
from bench.training import FullRecipe, Run
from edgeport.blocks import arrange, decode_rows, encode_rows
from edgeport.grid import Gridded
from edgeport.locate import open_model
from edgeport.registry import codec
from edgeport.seams import Source

RECIPE = FullRecipe(steps=400, batch_size=8, learning_rate=2e-4, seed=0)
BLOCK, STEPS = 32, 15  # of Q4_1: columns that share a scale, and the steps between their least and greatest value
GRIDS = {"Q4_1": "ggml", "Q5_1": "ggml", "NF4": "bnb4"}
BINS = 10
EVERY = 6  # layers that the report looks at


def dither(model: PreTrainedModel, seed: int) -> None:
    """Add uniform noise of up to half a Q4_1 step to every matrix, in place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in (weight for weight in model.parameters() if weight.ndim == 2):
            blocks = matrix.view(-1, BLOCK)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / STEPS
            blocks += (torch.rand(blocks.shape, generator=draw).to(blocks.device) - 0.5) * step


def distances(source: Source, format: str) -> Iterator[torch.Tensor]:
    """Of each projection's values in some layers: steps to the nearest point of the grid that encoding finds for its block."""
    owner = codec(GRIDS[format])
    for weight in source.weights.values():
        if weight.name.endswith("_proj.weight") and int(weight.name.split(".")[2]) % EVERY == 0:
            matrix = decode_rows(source, weight, range(weight.rows))
            target = owner.layout(weight.name, weight.shape, format)
            grid = cast(Gridded, owner).grid(target, encode_rows(target, matrix))
            _, _, fraction = grid.bracket(arrange(matrix, target))
            yield torch.minimum(fraction, 1 - fraction)


def grid_report(source: Source) -> dict[str, dict[str, object]]:
    """Mean distance to each grid in steps, and the shares of values at 0 to 0.05, 0.05 to 0.1 ... 0.45 to 0.5 steps.

    The least and greatest value of a block lie on its grid by the encoder's choice: 2 of 32, so that numbers which were
    never quantized have a mean of 0.234 (NF4: 1 of 64, 0.246).
    """
    report: dict[str, dict[str, object]] = {}
    for format in GRIDS:
        total, counts, values = 0.0, torch.zeros(BINS, dtype=torch.float64), 0
        for steps in distances(source, format):
            total += steps.sum(dtype=torch.float64).item()
            counts += torch.histc(steps, BINS, 0, 0.5)
            values += steps.numel()
        report[format] = {"mean_steps": round(total / values, 4), "shares": [round(x / values, 4) for x in counts.tolist()]}
    return report


def save(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """The base's folder of config, tokenizer and weights, with the model's weights in their place."""
    edgeport.export(model=base, output=folder, to="hf", quant="bf16", overwrite=True)
    (folder / "edgeport.json").unlink()  # is of the weights now replaced
    parameters = {name: weight.contiguous() for name, weight in model.named_parameters()}  # a tied head once
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_options(parser, RECIPE)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="pages, or folders of HTML pages")
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)

    model = training.load_base(arguments.base, arguments.device)
    tokenizer = training.load_tokenizer(arguments.base)
    chunks, held_out = training.text_chunks(arguments.text, tokenizer, CHUNK)
    perplexity = {"old base": training.perplexity(model, held_out)}
    dither(model, recipe.seed)
    perplexity["with noise"] = training.perplexity(model, held_out)
    print(perplexity, flush=True)
    run = training.train(model, recipe, batches(chunks, recipe), lambda ids: model(input_ids=ids, labels=ids).loss)
    save(model.cpu().bfloat16(), arguments.base, arguments.output)
    perplexity["trained, bf16"] = training.perplexity(training.load_base(arguments.output, arguments.device), held_out)
    report(arguments.base, arguments.output, recipe, run, perplexity)


def report(base: Path, folder: Path, recipe: FullRecipe, run: Run, perplexity: dict[str, float]) -> None:
    """Write training.json and print its figures."""
    record = {
        "command": shlex.join(["python", "-m", "bench.train_full", *sys.argv[1:]]),
        "recipe": asdict(recipe),
        f"mean_loss_of_{training.LOG_EVERY}_steps": run.losses,
        "wall_seconds": run.wall_seconds,
        "device": run.device,
        "held_out_perplexity": {name: round(value, 3) for name, value in perplexity.items()},
        "grid_distance": {
            "old base": grid_report(open_model(base)), "trained, bf16": grid_report(open_model(folder)),
        },
        "versions": training.versions(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("held_out_perplexity", "grid_distance")}, indent=1))


if __name__ == "__main__":
    main()
