"""Accuracy against memory over tasks, evolutions and precisions: `edgeport bench` on all that this folder can make.

python -m bench.suite -o bench-output lora                   # of the demo's evolution: needs nothing else
python -m bench.suite -o full --evolved DIR --patches DIR --books DIR full --tasks triage --quant bf16 Q6_K
python -m bench.suite -o bench/results/suite --merge lora full ...      # one set of results of several

`bench.full` makes the evolved bases and the patches that are not here, and runs this in pieces. The folder of evolved bases
has `lora`, `full` and `chain/1` to `3`; that of patches has those of further tasks, `refits/STAGE-TASK`, trained again on an
evolved base, which are the ceiling, and the same under `seed1`, `seed2`; that of books has the pages of three (see the
Makefile).
A run that was interrupted goes on from its journal, which a change of the program or of a patch makes worthless: delete
the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from bench.pages import page_text
from edgeport.benchmark.command import facts, written
from edgeport.benchmark.results import EVOLVED, MODELS, OLD, PORTED, TUNED, Results, Row, share, with_gain_kept
from edgeport.benchmark.suite import Bench, Case, Evolution, Precision, completed, finished_rows
from edgeport.benchmark.tasks import TASKS, asked
from edgeport.demo import ADAPTERS, child, packaged_model
from edgeport.memory import in_words
from edgeport.report import say, table

PATCHES = Path(__file__).with_name("adapters")
FEW = ("bf16", "Q4_K_M")
WIDE = (*FEW, "Q8_0", "Q6_K", "Q4_0", "nf4", "int8", "onnx:int8", "onnx:int4")
QUESTIONS = 500


@dataclass(frozen=True, slots=True)
class Stage:
    """An evolution, where its base is among the evolved ones, the book that it has read, and tasks with their precisions."""

    name: str
    base: str
    book: str
    tasks: Mapping[str, Sequence[str]]


SOME = dict.fromkeys(("triage", "legs", "chapters", "syllogism", "family", "sums"), FEW)
ALL = {**SOME, "triage": WIDE, "legs": WIDE}
STAGES = {
    "lora": Stage("LoRA r8", "lora", "handbook", ALL),
    "full": Stage("full parameters", "full", "handbook", ALL),
    "chain1": Stage("chain 1 (LoRA r64)", "chain/1", "handbook", SOME),
    "chain2": Stage("chain 2", "chain/2", "reference", SOME),
    "chain3": Stage("chain 3", "chain/3", "developers", SOME),
}


def carried(task: str) -> Path:
    """Where a task's first patch is, if the package or this folder carries it."""
    return ADAPTERS / task if task == "triage" else PATCHES / task


def patch_of(patches: Path, task: str, seed: int, stage: str | None = None) -> Path:
    """Where the patch for a task is, made on the old base or, with a stage, on that stage's; carried ones not in `patches`."""
    if not seed and not stage and carried(task).is_dir():
        return carried(task)
    folder = patches / f"seed{seed}" if seed else patches
    return folder / "refits" / f"{stage}-{task}" if stage else folder / task


def case(task: str, stage: str, arguments: argparse.Namespace) -> Case | None:
    """A task with its patch, and its refit if there is one; None without a patch."""
    seed = arguments.patch_seed
    patch, refit = patch_of(arguments.patches, task, seed), patch_of(arguments.patches, task, seed, stage)
    if not patch.is_dir():
        return None
    questions = asked(task, "test", arguments.questions, arguments.seed)
    return Case(task, questions, str(patch), str(refit) if refit.is_dir() else None, seed)


def held_out(pages: Path) -> str:
    """The text of every tenth page, which no evolution has read."""
    return "".join(page_text(page) for page in sorted(pages.glob("*.html"))[::10])


def evolved_of(key: str, evolved: Path | None, work: Path) -> Path:
    """A stage's base among the evolved ones; without any the demo's evolution, which is made in `work`."""
    base = (evolved or work / "evolved") / STAGES[key].base
    if key == "lora" and not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        ported = ["port", "--patch", ADAPTERS / "evolution", "--new-base", packaged_model(), "-o", base, "--quant", "bf16"]
        child(["-m", "edgeport", *map(str, ported), "--offline", "--json", "--no-progress"])
    return base


def known_stage(name: str) -> str:
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage is called {name}; there are {', '.join(STAGES)}")
    return name


def measure(key: str, arguments: argparse.Namespace) -> list[Row]:
    """All rows of a stage; of another patch than the first, those that the patch has a part in."""
    stage = STAGES[key]
    work = arguments.work or arguments.output / "work"
    folder = work / (f"{key}-seed{arguments.patch_seed}" if arguments.patch_seed else key)
    folder.mkdir(parents=True, exist_ok=True)
    base = evolved_of(key, arguments.evolved, work)
    text = None
    if arguments.books:
        text = folder / "held-out.txt"
        anew = text.with_suffix(f".{os.getpid()}")  # whole at once: another process may read it
        anew.write_text(held_out(arguments.books / stage.book), encoding="utf-8")
        anew.replace(text)
    evolution = Evolution(stage.name, str(base), str(packaged_model()))
    rows: list[Row] = []
    for quants in dict.fromkeys(tuple(one) for one in stage.tasks.values()):
        names = [task for task, its in stage.tasks.items() if tuple(its) == quants and task in arguments.tasks]
        cases = [one for name in names if (one := case(name, key, arguments))]
        wanted = [Precision.parse(quant) for quant in quants if not arguments.quant or quant in arguments.quant]
        if cases and wanted:
            rows += Bench(folder, wanted, text, ["--offline"], say, journal=work / "journal.jsonl").measure(evolution, cases)
    return [row for row in rows if not arguments.patch_seed or row.model not in (OLD, EVOLVED)]


def merged(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """All rows, in the order of tasks, evolutions and models; of two of the same key the later one.

    A share of the gain is taken anew, since a base or a refit may be in another part.
    """
    rows = {row.key: row for part in parts for row in part}
    names = [stage.name for stage in STAGES.values()]

    def place(row: Row) -> tuple[int, ...]:
        return list(TASKS).index(row.task), names.index(row.evolution), MODELS.index(row.model), row.patch_seed

    return with_gain_kept(sorted(rows.values(), key=place), Precision.parse(FEW[0]).name)


def journaled(journal: Path, questions: int) -> list[Row]:
    """Every finished row, of tasks too that are not. The old base's serve all evolutions that have read the same text."""
    found = [(json.loads(key)[-1], row) for key, row in finished_rows(journal)]
    found = [one for one in found if one[1].total == questions]
    readers: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for text, row in found:
        readers[text, row.task].add(row.evolution)
    each = [
        replace(row, evolution=evolution)
        for text, row in found
        for evolution in (readers[text, row.task] if row.model in (OLD, TUNED) else [row.evolution])
    ]
    return merged([completed(each, Precision.parse(FEW[0]).name)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", type=known_stage, metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--evolved", type=Path, help="folder of the evolved bases")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder of those that bench/adapters lacks")
    parser.add_argument("--work", type=Path, help="for models in work and the journal of finished ones (default: in OUTPUT)")
    parser.add_argument("--books", type=Path, help="folder of books: adds perplexity on the pages that were held out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--quant", nargs="+", help=f"only these precisions, {FEW[0]} among them")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--patch-seed", type=int, default=0, help="which patches: 1 for those in seed1, and so on")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing; write the results in these folders as one")
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "bench.suite", *sys.argv[1:]])
    if arguments.quant and FEW[0] not in arguments.quant:
        parser.error(f"--quant without {FEW[0]}, from which divergences and flips are told")
    if arguments.merge:
        print(write_merged(arguments.merge, arguments.output, command))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for key in arguments.stages or STAGES:
        fresh = measure(key, arguments)
        path = arguments.output / "results.json"
        parts = [of_rows(fresh, command, arguments.questions, arguments.seed)]
        write(united([Results.read(path), *parts] if path.exists() else parts, command), arguments.output)
    print((arguments.output / "headline.txt").read_text())


def write_merged(folders: Sequence[Path], output: Path, command: str) -> str:
    """One set of results of several; returns the headline's table."""
    output.mkdir(parents=True, exist_ok=True)
    write(united([Results.read(folder / "results.json") for folder in folders], command), output)
    return (output / "headline.txt").read_text()


def united(parts: Sequence[Results], command: str) -> Results:
    """One set of results of several, perhaps of several machines."""
    machines: list[Mapping[str, Any]] = []
    for part in parts:
        machines += [one for one in part.machines if one not in machines]
    rows = merged([replace(row, machine=machines.index(part.machines[row.machine])) for row in part.rows] for part in parts)
    known = {one["name"]: one for part in parts for one in part.tasks}
    asked = {(one["name"], one["questions"], part.seed) for part in parts for one in part.tasks}
    if len(asked) > len(known):
        raise SystemExit("the parts are of other questions (another --seed, or another number of them); only models may differ")
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    chosen = [known[name] for name in TASKS if name in known]
    return Results(command, chosen, parts[0].seed, rows, notes, machines)


def write(results: Results, output: Path) -> None:
    written(results, output)
    (output / "headline.txt").write_text(headline(results.rows) + "\n")


def headline(rows: Sequence[Row]) -> str:
    """PortLLM's table: one line for each evolution and task, all models in the first precision, and the port in 4 bits.

    Accuracies are means over the patches' seeds; ± is half the way from the least to the greatest. Of the gain kept it is half of
    the 95 % interval that one patch's questions leave.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key[:4], []).append(row)
    lines = []
    reference, few = (Precision.parse(quant).name for quant in FEW)
    for task, evolution in dict.fromkeys((row.task, row.evolution) for row in rows):
        of = [found.get((task, evolution, model, reference), []) for model in MODELS]
        small = found.get((task, evolution, PORTED, few))
        kept = [row for row in of[MODELS.index(PORTED)] if row.gain_kept is not None]
        gain = [mean(getattr(row, name) for row in kept) if kept else None for name in ("gain_kept", "gain_error")]
        lines.append(
            [task, evolution, *map(spread, of), share(*gain),
             f"{small[0].accuracy:.1%}" if small else "-", in_words(small[0].bytes) if small else "-"]
        )  # fmt: skip
    return table(["task", "evolution", *MODELS, "gain kept", f"ported {few}", "its size"], lines)


def spread(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    each = [row.accuracy for row in rows]
    half = f" ± {100 * (max(each) - min(each)) / 2:.1f}" if len(each) > 1 else ""
    return f"{mean(each):.1%}{half}"


def of_rows(rows: Sequence[Row], command: str, questions: int, seed: int) -> Results:
    """Results of this machine."""
    tasks = [
        facts(Case(name, asked(name, "test", questions, seed), ""), TASKS[name].title, TASKS[name].source)
        for name in dict.fromkeys(row.task for row in rows)
    ]
    return Results(command, tasks, seed, rows)


if __name__ == "__main__":
    main()
