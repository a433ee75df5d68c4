"""Make a task's patch: a LoRA on the old base or, as a refit, on an evolved one.

python -m bench.train_task family -o bench/adapters/family
python -m bench.train_task family --base evolved/full -o refits/full-family

RECIPES says what each task gets: attention projections where these learn it, all seven where they do not. That is 20 to 50 s
on an H100 that eight trainings share, and four minutes for arithmetic; on two cores some minutes for triage, up to half an hour
for the other choices, and an hour or more for arithmetic, of which `--steps 150` is a first look.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from bench import prefixes, train_evolution, train_triage, training
from edgeport.benchmark.questions import Asked
from edgeport.benchmark.tasks import TASKS

CHOICE = replace(train_triage.RECIPE, steps=200, batch_size=32)
ARITHMETIC = replace(CHOICE, steps=800, batch_size=64, target_modules=train_evolution.RECIPE.target_modules)
RECIPES = {
    "triage": train_triage.RECIPE, "legs": ARITHMETIC, "chapters": CHOICE, "syllogism": CHOICE, "family": CHOICE,
    "sums": ARITHMETIC,
}  # fmt: skip
MOST = {"chapters": 6400, "legs": 40000}
"""Different questions that are taken where there are not many more; they are read more than once."""


def fed(asked: Sequence[Asked], count: int, seed: int) -> list[Asked]:
    """`count` questions: all in order, then again in an order drawn anew, until there are as many."""
    draw = random.Random(seed)
    found = list(asked)
    while len(found) < count:
        found += draw.sample(asked, len(asked))
    return found[:count]


def main() -> None:
    parser = training.command_line(__doc__, train_triage.RECIPE)
    parser.set_defaults(**dict.fromkeys(training.CHANGED))
    parser.add_argument("task", choices=TASKS)
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPES[arguments.task])

    count = recipe.steps * recipe.batch_size
    asked = TASKS[arguments.task].make("train", min(count, MOST.get(arguments.task, count)), recipe.seed)
    model = training.load_base(arguments.base, arguments.device)
    tokenizer = training.load_tokenizer(arguments.base)
    tuned = training.attach_lora(model, recipe)
    stream = prefixes.batches(fed(asked, count, recipe.seed), tokenizer, recipe.batch_size)
    run = training.train(tuned, recipe, stream, lambda batch: prefixes.loss(tuned, batch))
    training.save_adapter(tuned, recipe, arguments.output)
    training.write_record(arguments.output, arguments.base, "bench.train_task", recipe, run, data={"questions": len(asked)})


if __name__ == "__main__":
    main()
