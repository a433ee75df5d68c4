"""Accuracy against memory over tasks, evolutions and precisions: `edgeport bench` on all that this folder can make.

python -m bench.suite -o bench-output lora                   # of the demo's evolution: needs nothing else
python -m bench.suite -o bench/results/suite --evolved DIR --text HANDBOOK    # all stages; `make bench-full` does this

DIR holds what `bench.train_full` and `bench.train_chain` write: DIR/full and DIR/chain/1 to 3. Patches are in
`bench/adapters`, made by `bench.train_task`; those in `bench/adapters/refits` were trained again on an evolved base, and
where one is there it is the ceiling. A stage replaces its own rows in the results that are there already and keeps others;
one that was interrupted goes on from its journal, which a change of the program makes worthless: delete the work folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench.pages import page_text
from edgeport.benchmark.command import facts, written
from edgeport.benchmark.results import MODELS, PORTED, Results, Row
from edgeport.benchmark.suite import Bench, Case, Evolution, Precision
from edgeport.benchmark.tasks import TASKS, asked
from edgeport.demo import ADAPTERS, child, packaged_model
from edgeport.memory import in_words
from edgeport.report import say, table

PATCHES = Path(__file__).with_name("adapters")
WIDE = ("bf16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "nf4", "int8")
SOME = ("bf16", "Q8_0", "Q4_K_M", "Q4_0")
FEW = ("bf16", "Q4_K_M")
QUESTIONS = 500


@dataclass(frozen=True, slots=True)
class Stage:
    """An evolution, where its base is within DIR (the demo's is made here), and tasks with their precisions."""

    name: str
    base: str
    tasks: dict[str, Sequence[str]]


STAGES = {
    "lora": Stage("LoRA r8", "", {"triage": WIDE, "legs": FEW, "family": FEW, "chapters": FEW, "syllogism": FEW}),
    "full": Stage("full parameters", "full", {"triage": SOME, "family": FEW, "legs": FEW}),
    "chain1": Stage("chain 1 (LoRA r64)", "chain/1", {"triage": FEW, "family": FEW}),
    "chain2": Stage("chain 2", "chain/2", {"triage": FEW, "family": FEW}),
    "chain3": Stage("chain 3", "chain/3", {"triage": FEW, "family": FEW}),
}


def case(task: str, stage: str, questions: int, seed: int) -> Case | None:
    """A task with its patch, and its refit if there is one; None without a patch."""
    patch = ADAPTERS / "triage" if task == "triage" else PATCHES / task
    refit = PATCHES / "refits" / f"{stage}-{task}"
    if not patch.is_dir():
        return None
    return Case(task, asked(task, "test", questions, seed), str(patch), str(refit) if refit.is_dir() else None)


def held_out(pages: Path) -> str:
    """The text of every tenth page, which no evolution has read."""
    return "".join(page_text(page) for page in sorted(pages.glob("*.html"))[::10])


def measure(key: str, arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows of a stage."""
    stage = STAGES[key]
    base = str(arguments.evolved / stage.base) if stage.base else str(folder / "evolved")
    if not Path(base).exists():
        ported = ["port", "--patch", ADAPTERS / "evolution", "--new-base", packaged_model(), "-o", base, "--quant", "bf16"]
        child(["-m", "edgeport", *map(str, ported), "--offline", "--json", "--no-progress"])
    text = None
    if arguments.text:
        text = folder / "held-out.txt"
        text.write_text(held_out(arguments.text), encoding="utf-8")
    evolution = Evolution(stage.name, base, str(packaged_model()))
    rows: list[Row] = []
    for quants in dict.fromkeys(tuple(one) for one in stage.tasks.values()):
        names = [task for task, its in stage.tasks.items() if tuple(its) == quants and task in arguments.tasks]
        cases = [one for name in names if (one := case(name, key, arguments.questions, arguments.seed))]
        wanted = [Precision.parse(quant) for quant in quants if not arguments.quant or quant in arguments.quant]
        if cases:
            rows += Bench(folder, wanted, text, ["--offline"], say, folder.parent / "journal.jsonl").measure(evolution, cases)
    return rows


def before(output: Path) -> list[Row]:
    """The rows of results that are there already."""
    path = output / "results.json"
    names = [one.name for one in fields(Row)]
    return [Row(**{name: row[name] for name in names}) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--evolved", type=Path, help="folder of the evolved bases")
    parser.add_argument("--work", type=Path, help="for models in work and the journal of finished ones (default: in OUTPUT)")
    parser.add_argument("--text", type=Path, help="the handbook's pages: adds perplexity on those that were held out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quant", nargs="+", help="only these precisions")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "bench.suite", *sys.argv[1:]])
    for key in arguments.stages or STAGES:
        folder = (arguments.work or arguments.output / "work") / key
        folder.mkdir(parents=True, exist_ok=True)
        fresh = measure(key, arguments, folder)
        measured = {(row.evolution, row.task) for row in fresh}
        rows = [row for row in before(arguments.output) if (row.evolution, row.task) not in measured] + fresh
        names = [stage.name for stage in STAGES.values()]
        rows.sort(key=lambda row: (list(TASKS).index(row.task), names.index(row.evolution)))
        results = Results(command, tasks(rows, arguments.questions, arguments.seed), arguments.seed, rows)
        written(results, arguments.output)
        (arguments.output / "headline.txt").write_text(headline(rows) + "\n")
    print((arguments.output / "headline.txt").read_text())


def headline(rows: Sequence[Row]) -> str:
    """PortLLM's table: one line for each evolution and task, all models in the first precision, and the port in 4 bits."""
    found = {(row.task, row.evolution, row.model, row.precision): row for row in rows}
    lines = []
    for task, evolution in dict.fromkeys((row.task, row.evolution) for row in rows):
        of = [found.get((task, evolution, model, FEW[0])) for model in MODELS]
        small = found.get((task, evolution, PORTED, FEW[1]))
        kept = of[MODELS.index(PORTED)]
        lines.append(
            [task, evolution, *("-" if row is None else f"{row.accuracy:.1%}" for row in of),
             "-" if kept is None or kept.gain_kept is None else f"{kept.gain_kept:.0%}",
             "-" if small is None else f"{small.accuracy:.1%}", "-" if small is None else in_words(small.bytes)]
        )  # fmt: skip
    return table(["task", "evolution", *MODELS, "gain kept", f"ported {FEW[1]}", "its size"], lines)


def tasks(rows: Sequence[Row], questions: int, seed: int) -> list[dict[str, object]]:
    return [
        facts(Case(name, asked(name, "test", questions, seed), ""), TASKS[name].title, TASKS[name].source)
        for name in dict.fromkeys(row.task for row in rows)
    ]


if __name__ == "__main__":
    main()
