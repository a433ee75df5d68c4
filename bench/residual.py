"""How far is a patch from the one that training again makes? PortLLM's residual, measured against the patch itself.

python -m bench.residual lora full --refits bench-output/adapters   # pairs that `bench.full` has trained again
python -m bench.residual                                            # only what the suite's rows say of pairs measured before

D is the patch, made on the old base, D' the same recipe's on the evolved one, and R = D' - D what a port leaves out (PortLLM,
arXiv 2410.10870, which takes it for negligible). Of all weights as if they were one vector:

    again    |D'| / |D|
    R        |R| / |D|: 0 where training again makes the same patch, 1.4 where it makes an unrelated one of the same size
    top      the same of the largest singular values, the median over the weights
    cosine   <D, D'> / |D| |D'|
    W        |W| / |R|, W the old base's weights that the patch changes: the ratio in which the paper finds R small

Where REFITS has the same recipe's on the old base again, as TASK with the same seed or as seed1/TASK with another, a line of no
evolution says how far two trainings are apart by themselves. *Kept* is the suite's share of the gain, in the reference precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gate import RESULTS, agreements, earlier, publish
from bench.suite import FEW, PATCHES, STAGES, known_stage, patch_of
from edgeport.benchmark.results import PORTED, Results, Row
from edgeport.benchmark.results import shown as in_digits
from edgeport.benchmark.suite import Precision
from edgeport.benchmark.tasks import TASKS
from edgeport.blocks import decode_rows
from edgeport.demo import packaged_model
from edgeport.drift import Factors, factors, square
from edgeport.locate import open_model, open_patch
from edgeport.matching import collect_edits
from edgeport.report import say, table
from edgeport.seams import Source

FIGURES = ("again", "R", "top", "cosine", "W")
HEAD = ("task", "evolution", *FIGURES, "kept")
NONE = {0: "none, the same seed", 1: "none, another seed"}
"""What lines of no evolution are called, by the seed that trained again."""


def inner(one: Factors, other: Factors) -> float:
    """Of two products of factors, neither of which is made."""
    return float(((one.up.double().T @ other.up.double()) * (one.down.double() @ other.down.double().T)).sum())


def largest(change: Factors) -> float:
    """Its largest singular value, by those of a product of two small triangles."""
    left, right = (torch.linalg.qr(factor.double()).R for factor in (change.up, change.down.T))
    return float(torch.linalg.matrix_norm(left @ right.T, 2))


def less(one: Factors, other: Factors) -> Factors:
    """Factors of the difference of two changes."""
    return replace(one, up=torch.cat([one.up, -other.up], 1), down=torch.cat([one.down, other.down]))


def changes(base: Source, path: Path) -> dict[str, Factors]:
    """What a patch adds to each weight that it changes. Raises SystemExit where it has whole values."""
    edits = collect_edits(base, [open_patch(path, offline=True)], None)
    found = {name: change for name, (of_patch,) in edits.items() if (change := factors(of_patch))}
    if len(found) < len(edits):
        raise SystemExit(f"{path} has values that are no product of factors")
    return found


def norm_of(base: Source, names: Iterable[str]) -> float:
    """Of these weights together."""
    return sqrt(sum(square(decode_rows(base, base.weights[name], range(base.weights[name].rows))) for name in names))


def compared(ours: Mapping[str, Factors], theirs: Mapping[str, Factors], whole: float) -> dict[str, float | None]:
    """The figures of a patch and of what the same recipe made again, given the norm of the weights that they change.

    Raises SystemExit where they change different ones.
    """
    if ours.keys() != theirs.keys():
        raise SystemExit("a patch and the one that was trained again change different weights; they are not of one recipe")
    first = sum(inner(one, one) for one in ours.values())
    second = sum(inner(one, one) for one in theirs.values())
    product = sum(inner(ours[name], theirs[name]) for name in ours)
    residuals = {name: less(theirs[name], ours[name]) for name in ours}
    residual = sqrt(sum(max(inner(one, one), 0.0) for one in residuals.values()))
    return {
        "again": sqrt(second / first), "R": residual / sqrt(first),
        "top": median(largest(residuals[name]) / largest(ours[name]) for name in ours),
        "cosine": product / sqrt(first * second), "W": whole / residual if residual else None,
    }  # fmt: skip


def trained_again(task: str, stages: Sequence[str], refits: Path) -> Iterator[tuple[str, Path]]:
    """What the same recipe made again for a task, by what lies between."""
    for seed, name in NONE.items():
        yield name, (refits / f"seed{seed}" if seed else refits) / task
    for stage in stages:
        yield STAGES[stage].name, patch_of(refits, task, seed=0, stage=stage)


def measured(base: Source, stages: Sequence[str], refits: Path, patches: Path) -> Iterator[dict[str, Any]]:
    """The pairs of which both were trained."""
    for task in TASKS:
        patch = patch_of(patches, task, seed=0)
        pairs = [(name, again) for name, again in trained_again(task, stages, refits) if again.is_dir()]
        if not pairs or not patch.is_dir():
            continue
        ours = changes(base, patch)
        whole = norm_of(base, ours)
        for evolution, again in pairs:
            if not again.samefile(patch):
                say(f"{task}: {evolution}")
                yield {"task": task, "evolution": evolution, **compared(ours, changes(base, again), whole)}


def told(before: Sequence[Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of two of the same pair the later one, in the order of tasks and evolutions, with what the rows say its port keeps."""
    first = Precision.parse(FEW[0]).name
    kept = {row.key[:2]: row.gain_kept for row in rows if (row.model, row.precision, row.patch_seed) == (PORTED, first, 0)}
    names = [*NONE.values(), *(stage.name for stage in STAGES.values())]
    pairs = {(pair["task"], pair["evolution"]): pair for pair in (*before, *fresh)}
    order = sorted(pairs, key=lambda key: (list(TASKS).index(key[0]), names.index(key[1])))
    return [{**pairs[key], "kept": kept.get(key)} for key in order]


def shown(pairs: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [pair["task"], pair["evolution"], *(f"{pair[name]:.3f}" for name in FIGURES[:-1]), in_digits(pair["W"], ".0f"),
         in_digits(pair["kept"], ".0%")]
        for pair in pairs
    ]  # fmt: skip
    ported = [pair for pair in pairs if pair["kept"] is not None]
    return table(HEAD, [*lines, *([*cells, ""] for cells in agreements(ported, FIGURES, "kept"))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", type=known_stage, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--refits", type=Path, help="of what was trained again: refits/STAGE-TASK, TASK, seed1/TASK")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder of the patches that bench/adapters lacks")
    parser.add_argument("--suite", type=Path, default=RESULTS / "suite" / "results.json", help="results of bench.suite")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "residual.json")
    arguments = parser.parse_args()
    if arguments.stages and arguments.refits is None:
        parser.error("STAGE without --refits, the folder of what was trained again")
    fresh: list[dict[str, Any]] = []
    if arguments.refits:
        fresh += measured(open_model(packaged_model()), arguments.stages, arguments.refits, arguments.patches)
    pairs = told(earlier(arguments.output), fresh, Results.read(arguments.suite).rows)
    publish(pairs, shown(pairs), arguments.output)


if __name__ == "__main__":
    main()
