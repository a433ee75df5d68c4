"""Do the gate's figures tell what a port will lose? `edgeport diagnose` on pairs of the suite, beside what their ports lost.

python -m bench.gate lora                                    # the demo's evolution, which this makes itself
python -m bench.gate chain1 chain3 --evolved DIR             # those that `bench.full` or a bench.train_* made
python -m bench.gate                                         # only what the suite's rows say of pairs that were diagnosed before

Pairs that the suite's results have no port of are left out; those that an earlier run wrote down keep its figures. *Lost* is the
share of what the patch brings on its own base: (tuned old base - ported) / (tuned old base - old base), in the reference
precision, and needs no refit. At the table's foot is each figure's rank correlation with it, over all pairs, and over the
evolutions that one patch meets (the mean over the tasks that have three or more).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import StatisticsError, correlation, mean
from tempfile import TemporaryDirectory
from typing import Any

import edgeport
from bench.suite import FEW, PATCHES, STAGES, evolved_of, known_stage, patch_of
from edgeport.benchmark.results import OLD, PORTED, TUNED, Results, Row
from edgeport.benchmark.results import shown as in_digits
from edgeport.benchmark.suite import Precision
from edgeport.demo import packaged_model
from edgeport.report import say, table

RESULTS = Path(__file__).with_name("results")
FIGURES = ("change", "drift", "cosine", "read", "written", "along")
FEWEST = 3
"""Pairs of a task that can tell an order."""
HEAD = ("task", "evolution", *FIGURES, "verdict", "tuned old base", "ported", "lost")


def outcome_of(rows: Sequence[Row], task: str, evolution: str) -> dict[str, float] | None:
    """Accuracies of a pair's first patch and the share that its port loses; None where a model was not asked, or tuning has
    changed no accuracy that could be lost."""
    first = Precision.parse(FEW[0]).name
    ours = [row for row in rows if row.key[:2] == (task, evolution) and row.precision == first and not row.patch_seed]
    found = {row.model: row.accuracy for row in ours}
    if not found.keys() >= {OLD, TUNED, PORTED} or found[TUNED] == found[OLD]:
        return None
    share = (found[TUNED] - found[PORTED]) / (found[TUNED] - found[OLD])
    return {"tuned": found[TUNED], "ported": found[PORTED], "lost": share}


def measured(key: str, base: Path, old: Path, patches: Path, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The pairs of a stage that have rows, on its base and the one that it comes from."""
    stage = STAGES[key]
    for task in stage.tasks:
        patch, outcome = patch_of(patches, task, seed=0), outcome_of(rows, task, stage.name)
        if outcome is not None and patch.is_dir():
            say(f"{stage.name}: {task}")
            told = edgeport.diagnose(patch=patch, new_base=base, old_base=old, offline=True).to_json()
            yield {"task": task, "evolution": stage.name, "verdict": told["verdict"], **told["all"], **outcome}


def merged(before: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of two of the same pair the later one, in the order of evolutions and tasks."""
    names = [stage.name for stage in STAGES.values()]
    found = {(pair["evolution"], pair["task"]): pair for pair in (*before, *fresh)}
    return [found[key] for key in sorted(found, key=lambda key: (names.index(key[0]), key[1]))]


def told_anew(pairs: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """The pairs, with what the rows say of those that they know."""
    return [{**pair, **(outcome_of(rows, pair["task"], pair["evolution"]) or {})} for pair in pairs]


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the least; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def agreement(pairs: Sequence[Mapping[str, Any]], figure: str, outcome: str = "lost") -> float | None:
    """Spearman's rank correlation of a figure with what comes out; None where one of them does not vary."""
    try:
        return correlation(ranks([pair[figure] for pair in pairs]), ranks([pair[outcome] for pair in pairs]))
    except StatisticsError:
        return None


def within(pairs: Sequence[Mapping[str, Any]], figure: str, outcome: str = "lost") -> float | None:
    """The mean of the tasks' own agreements: does it order what one patch meets?"""
    of_tasks = ([pair for pair in pairs if pair["task"] == task] for task in {pair["task"] for pair in pairs})
    found = [agreement(some, figure, outcome) for some in of_tasks if len(some) >= FEWEST]
    told = [one for one in found if one is not None]
    return mean(told) if told else None


def shown(pairs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [pair["task"], pair["evolution"], *(f"{pair[name]:.4f}" for name in FIGURES), pair["verdict"],
         f"{pair['tuned']:.1%}", f"{pair['ported']:.1%}", f"{pair['lost']:.0%}"]
        for pair in pairs
    ]  # fmt: skip
    return table(HEAD, [*lines, *([*cells, "", "", "", ""] for cells in agreements(pairs, FIGURES))])


def agreements(pairs: Sequence[Mapping[str, Any]], figures: Sequence[str], outcome: str = "lost") -> list[list[str]]:
    """A table's foot: each figure's rank correlation with what comes out, over all pairs and within tasks."""
    return [
        ["", name, *(in_digits(of(pairs, figure, outcome), ".2f") for figure in figures)]
        for name, of in (("rank correlation", agreement), ("within a task", within))
    ]


def earlier(output: Path) -> list[dict[str, Any]]:
    """The pairs that a run before wrote there."""
    found: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    return found


def publish(pairs: Sequence[Mapping[str, Any]], text: str, output: Path) -> None:
    """Write the pairs, and their table beside them, and print it."""
    output.write_text(json.dumps(pairs, indent=1) + "\n")
    output.with_suffix(".txt").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", type=known_stage, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--evolved", type=Path, help="folder of the evolved bases")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder of those that bench/adapters lacks")
    parser.add_argument("--suite", type=Path, default=RESULTS / "suite" / "results.json", help="results of bench.suite")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "gate.json")
    arguments = parser.parse_args()
    rows = Results.read(arguments.suite).rows
    fresh: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        for key in arguments.stages:
            base = evolved_of(key, arguments.evolved, Path(work))
            fresh += measured(key, base, packaged_model(), arguments.patches, rows)
    pairs = told_anew(merged(earlier(arguments.output), fresh), rows)
    publish(pairs, shown(pairs), arguments.output)


if __name__ == "__main__":
    main()
