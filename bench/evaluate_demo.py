"""Score the demo's bases and patches with PEFT in fp32: the reference that `edgeport demo` is held against.

python -m bench.evaluate_demo --refit --text handbook/usr/share/doc/debian-handbook/html/en-US \\
    -o edgeport/demo/adapters/reference.json

The text is that of `bench.train_evolution`; only its held-out pages are read here.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import train_evolution, train_triage, training
from edgeport.demo import triage

ADAPTERS = Path("edgeport/demo/adapters")
EVOLUTION, PATCH = ADAPTERS / "evolution", ADAPTERS / "triage"
MODELS = {
    "old base": (),
    "old base + patch": (PATCH,),
    "evolved base": (EVOLUTION,),
    "evolved base + ported patch": (EVOLUTION, PATCH),
}
REFIT = "evolved base + retrained patch"


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table: accuracy and its 95 % interval in percent, perplexity on the evolution's text."""

    model: str
    correct: int
    questions: int
    accuracy: float
    interval: tuple[float, float]
    perplexity: float


def models(
    base: Path, tokenizer: PreTrainedTokenizerBase, refit: bool
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Each model of the table, one at a time in memory."""
    for name, patches in MODELS.items():
        model = training.load_base(base)
        for patch in patches:
            model = training.merge_adapter(model, patch)
        yield name, model
    if refit:
        evolved = training.merge_adapter(training.load_base(base), EVOLUTION)
        tuned, _ = train_triage.fit(evolved, tokenizer, train_triage.RECIPE)
        yield REFIT, tuned.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=ADAPTERS / "reference.json")
    parser.add_argument("--base", type=Path, default=training.packaged_base(), help="GGUF of the old base")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the evolution's pages")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--refit", action="store_true", help="also train the patch again on the evolved base")
    arguments = parser.parse_args()

    asked = triage.questions("test", arguments.questions)
    tokenizer = training.load_tokenizer(arguments.base)
    _, held_out = training.text_chunks(arguments.text, tokenizer, train_evolution.CHUNK)
    scores = []
    print(f"{'model':32} {'accuracy %':>10} {'95 % interval':>15} {'perplexity':>10}")
    for name, model in models(arguments.base, tokenizer, arguments.refit):
        correct = training.correct_answers(model, tokenizer, asked)
        low, high = triage.accuracy_interval(correct, len(asked))
        score = Score(
            model=name,
            correct=correct,
            questions=len(asked),
            accuracy=round(100 * correct / len(asked), 2),
            interval=(round(100 * low, 1), round(100 * high, 1)),
            perplexity=round(training.perplexity(model, held_out), 2),
        )
        scores.append(score)
        interval = "{} to {}".format(*score.interval)
        print(f"{name:32} {score.accuracy:10.2f} {interval:>15} {score.perplexity:10.2f}", flush=True)
    reference = {
        "command": shlex.join(["python", "-m", "bench.evaluate_demo", *sys.argv[1:]]),
        "held_out_tokens": held_out.numel(),
        "scores": [asdict(score) for score in scores],
        "versions": training.versions(),
    }
    arguments.output.write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
