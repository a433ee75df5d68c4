"""Make the demo's personal patch: ICD-10-CM triage, a LoRA on the attention projections of the old base.

python -m bench.train_triage -o edgeport/demo/adapters/triage
"""

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import prefixes, training
from bench.training import Recipe, Run
from edgeport.demo import triage

RECIPE = Recipe(
    steps=100,
    batch_size=16,
    learning_rate=1e-3,
    rank=8,
    alpha=16,
    target_modules=("k_proj", "o_proj", "q_proj", "v_proj"),
    seed=0,
)


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[PeftModel, Run]:
    """Train the patch inside `model`, on each question once."""
    asked = triage.questions("train", recipe.steps * recipe.batch_size, recipe.seed)
    tuned = training.attach_lora(model, recipe)
    fed = prefixes.batches(asked, tokenizer, recipe.batch_size)
    run = training.train(tuned, recipe, fed, lambda batch: prefixes.loss(tuned, batch))
    return tuned, run


def main() -> None:
    parser = training.command_line(__doc__, RECIPE)
    arguments = parser.parse_args()
    recipe = training.recipe_of(arguments, RECIPE)

    held_out = triage.questions("test", 400)
    model = training.load_base(arguments.base, arguments.device)
    tokenizer = training.load_tokenizer(arguments.base)
    before = training.correct_answers(model, tokenizer, held_out)
    tuned, run = fit(model, tokenizer, recipe)
    training.save_adapter(tuned, recipe, arguments.output)

    fresh = training.load_base(arguments.base, arguments.device)
    after = training.correct_answers(training.merge_adapter(fresh, arguments.output), tokenizer, held_out)
    print(f"held-out accuracy {before / 4:.2f} % -> {after / 4:.2f} %")
    training.write_record(
        arguments.output,
        arguments.base,
        "bench.train_triage",
        recipe,
        run,
        evaluation={"held_out_questions": len(held_out), "correct_before": before, "correct_after": after},
    )


if __name__ == "__main__":
    main()
