"""Make a task's patch: a LoRA on the attention projections, on the old base or, as a refit, on an evolved one.

python -m bench.train_task family -o bench/adapters/family
python -m bench.train_task family --base full-evolved -o refit-family

The triage patch that edgeport carries was made by `bench.train_triage`, with the same recipe.
"""

from __future__ import annotations

from bench import training
from bench.train_triage import RECIPE, batches
from edgeport.benchmark.tasks import TASKS


def main() -> None:
    parser = training.command_line(__doc__, RECIPE)
    parser.add_argument("task", choices=TASKS)
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)

    asked = TASKS[arguments.task].make("train", recipe.steps * recipe.batch_size, recipe.seed)
    model = training.load_base(arguments.base)
    tokenizer = training.load_tokenizer(arguments.base)
    tuned = training.attach_lora(model, recipe)
    run = training.train(
        tuned, recipe, batches(asked, tokenizer, recipe.batch_size), lambda batch: tuned(**batch).loss
    )
    training.save_adapter(tuned, recipe, arguments.output)
    training.write_record(arguments.output, arguments.base, "bench.train_task", recipe, run, data={"questions": len(asked)})


if __name__ == "__main__":
    main()
