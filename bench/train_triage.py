"""Make the demo's personal patch: ICD-10-CM triage, a LoRA on the attention projections of the old base.

python -m bench.train_triage -o edgeport/demo/adapters/triage
"""

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import training
from bench.training import Recipe, Run
from edgeport.benchmark.questions import Asked, gold
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
IGNORED = -100  # the label that a causal language model's loss leaves out


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[PeftModel, Run]:
    """Train the patch inside `model`, on each question once."""
    asked = triage.questions("train", recipe.steps * recipe.batch_size, recipe.seed)
    tuned = training.attach_lora(model, recipe)
    fed = batches(asked, tokenizer, recipe.batch_size)
    run = training.train(tuned, recipe, fed, lambda batch: tuned(**batch).loss)
    return tuned, run


def batches(
    asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded; the loss is on the answer and the end of the turn, not on the prompt."""
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        prompts = tokenizer([question.prompt for question in some])["input_ids"]
        options = tokenizer([gold(question) for question in some])["input_ids"]
        rows = [(prompt, [*option, tokenizer.eos_token_id]) for prompt, option in zip(prompts, options, strict=True)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.eos_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        # Padding comes last, where a causal model's earlier positions cannot see it: no mask needed.
        yield {"input_ids": ids, "labels": labels}


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
