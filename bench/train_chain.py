"""Make three successive updates of a base: a LoRA of rank 64 on all projections, merged, and the next one trained on that.

Each update reads another book: Debian's handbook, its reference and its developers' reference, from the packages
`debian-handbook`, `debian-reference-en` and `developers-reference` (unpacked as in `bench.train_evolution`):

python -m bench.train_chain --text HANDBOOK REFERENCE DEVELOPERS -o chain

writes chain/1, chain/2 and chain/3, bf16 folders. The first is also the benchmark's LoRA drift of rank 64. An update reads
200,000 tokens: seconds on a data-centre GPU, about half an hour on two cores (--steps 40 --batch-size 2 for a small one).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import edgeport
from bench import train_evolution, training
from bench.train_evolution import CHUNK, batches

RECIPE = replace(train_evolution.RECIPE, steps=100, batch_size=8, learning_rate=5e-4, rank=64, alpha=128)


def update(base: Path, text: Path, folder: Path, recipe: training.Recipe, device: str) -> None:
    """One update: train on `text`, merge into bf16, and keep what perplexity it made of the text's held-out pages."""
    model = training.load_base(base, device)
    tokenizer = training.load_tokenizer(base)
    chunks, held_out = training.text_chunks([text], tokenizer, CHUNK)
    before = training.perplexity(model, held_out)
    evolved = training.attach_lora(model, recipe)
    run = training.train(evolved, recipe, batches(chunks, recipe), lambda ids: evolved(input_ids=ids, labels=ids).loss)
    adapter = folder.with_name(f"{folder.name}-adapter")
    training.save_adapter(evolved, recipe, adapter)
    edgeport.port(patch=adapter, new_base=base, output=folder, to="hf", quant="bf16", overwrite=True, device="cpu")
    after = training.perplexity(training.load_base(folder, device), held_out)
    print(f"{folder.name}: held-out perplexity {before:.2f} -> {after:.2f}", flush=True)
    record = {
        "recipe": asdict(recipe), f"mean_loss_of_{training.LOG_EVERY}_steps": run.losses,
        "wall_seconds": run.wall_seconds, "device": run.device,
        "held_out_perplexity": {"before": round(before, 3), "after": round(after, 3)}, "versions": training.versions(),
    }  # fmt: skip
    (adapter / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_options(parser, RECIPE)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="one page or folder of HTML pages an update")
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)
    base = arguments.base
    for number, text in enumerate(arguments.text, 1):
        folder = arguments.output / str(number)
        if not folder.exists():  # else an earlier run got this far
            update(base, text, folder, replace(recipe, seed=recipe.seed + number - 1), arguments.device)
        base = folder


if __name__ == "__main__":
    main()
