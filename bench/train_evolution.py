"""Make the demo's evolved base: continued pretraining of the old base on the Debian Administrator's Handbook.

The text is that of Debian's package `debian-handbook`:

apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
python -m bench.train_evolution --text handbook/usr/share/doc/debian-handbook/html/en-US \\
    -o edgeport/demo/adapters/evolution
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from bench import training
from bench.training import FullRecipe, Recipe

RECIPE = Recipe(
    steps=80,
    batch_size=2,
    learning_rate=1e-3,
    rank=8,
    alpha=16,
    target_modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    seed=0,
)
CHUNK = 256  # tokens


def batches(chunks: torch.Tensor, recipe: Recipe | FullRecipe) -> Iterator[torch.Tensor]:
    """`recipe.steps` batches; each pass over the chunks is shuffled anew."""
    draw = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    for _ in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(len(chunks), generator=draw).tolist()
        yield chunks[[order.pop() for _ in range(recipe.batch_size)]]


def main() -> None:
    parser = training.command_line(__doc__, RECIPE)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="pages, or folders of HTML pages")
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)

    model = training.load_base(arguments.base, arguments.device)
    tokenizer = training.load_tokenizer(arguments.base)
    chunks, held_out = training.text_chunks(arguments.text, tokenizer, CHUNK)
    before = training.perplexity(model, held_out)
    evolved = training.attach_lora(model, recipe)
    run = training.train(evolved, recipe, batches(chunks, recipe), lambda ids: evolved(input_ids=ids, labels=ids).loss)
    training.save_adapter(evolved, recipe, arguments.output)

    fresh = training.load_base(arguments.base, arguments.device)
    after = training.perplexity(training.merge_adapter(fresh, arguments.output), held_out)
    print(f"held-out perplexity {before:.2f} -> {after:.2f}")
    training.write_record(
        arguments.output,
        arguments.base,
        "bench.train_evolution",
        recipe,
        run,
        data={"train_split_tokens": chunks.numel(), "held_out_tokens": held_out.numel(), "chunk_tokens": CHUNK},
        evaluation={"perplexity_before": round(before, 3), "perplexity_after": round(after, 3)},
    )


if __name__ == "__main__":
    main()
