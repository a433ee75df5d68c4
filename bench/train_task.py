"""Make a task's patch: a LoRA on the attention projections, on the old base or, as a refit, on an evolved one.

python -m bench.train_task family -o bench/adapters/family
python -m bench.train_task family --base full-evolved -o refit-family

The triage patch that edgeport carries was made by `bench.train_triage`, in more steps; with `--steps 100 --batch-size 16`
this is the same training in less time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from bench import train_triage, training
from bench.train_triage import IGNORED, batches
from edgeport.benchmark.tasks import TASKS

RECIPE = replace(train_triage.RECIPE, steps=60, batch_size=8)


def loss(tuned: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """That of transformers, with logits for the answers' tokens alone."""
    base = tuned.get_base_model()
    hidden = base.model(batch["input_ids"]).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    answers = labels != IGNORED
    return cross_entropy(base.lm_head(hidden[answers]), labels[answers])


def main() -> None:
    parser = training.command_line(__doc__, RECIPE)
    parser.add_argument("task", choices=TASKS)
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)

    asked = TASKS[arguments.task].make("train", recipe.steps * recipe.batch_size, recipe.seed)
    model = training.load_base(arguments.base)
    tokenizer = training.load_tokenizer(arguments.base)
    tuned = training.attach_lora(model, recipe)
    torch.set_float32_matmul_precision("medium")  # products in bf16, sums in fp32
    fed = batches(asked, tokenizer, recipe.batch_size)
    run = training.train(tuned, recipe, fed, lambda batch: loss(tuned, batch))
    training.save_adapter(tuned, recipe, arguments.output)
    training.write_record(arguments.output, arguments.base, "bench.train_task", recipe, run, data={"questions": len(asked)})


if __name__ == "__main__":
    main()
