"""What a benchmark found: one row a model, task and precision; as results.json and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

from edgeport import __version__
from edgeport.demo.triage import Z_95, accuracy_interval
from edgeport.memory import cores, in_words
from edgeport.report import table

FORMAT = 2
OLD, TUNED, EVOLVED, PORTED, REFIT = "old base", "tuned old base", "evolved base", "ported", "re-tuned"
MODELS = (OLD, TUNED, EVOLVED, PORTED, REFIT)
"""The rows of PortLLM's table: the last is the ceiling, the patch trained again on the evolved base."""
PACKAGES = (
    "torch", "transformers", "llama-cpp-python", "gguf", "bitsandbytes", "onnxruntime", "simple-icd-10-cm", "reasoning-gym",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One model that was asked the questions of one task. Peaks are VmHWM of the process that did it, libraries included."""

    task: str
    evolution: str
    model: str
    precision: str
    bytes: int
    """Of the model's files of weights."""
    correct: int
    total: int
    score_seconds: float
    score_peak_bytes: int
    perplexity: float | None = None
    """On the given text."""
    negative_flips: int | None = None
    """Questions that the tuned old base (else the port in the first precision) answers right, and this model wrong."""
    kl: float | None = None
    """Mean KL in nats from the port in the first precision to this model, of the token after each of the first 256 prompts that
    are followed by one of several options."""
    gain_kept: float | None = None
    """(this - evolved base) / (re-tuned - evolved base) in accuracy, bases in the first precision; None where the questions do
    not tell the latter from none."""
    gain_error: float | None = None
    """Half of the 95 % interval of `gain_kept`; None for a refit in the first precision, which is the measure itself."""
    patch_kept: float | None = None
    """Mean share of the patch's change to the weights that the file keeps."""
    port_seconds: float | None = None
    port_peak_bytes: int | None = None
    port_above_bytes: int | None = None
    patch_seed: int = 0
    """Which of several patches of one recipe, that differ in nothing but the seed of their training."""
    machine: int = 0
    """Place in the results' `machines`: of that one are the seconds and the peaks."""
    answers: str | None = None
    """A digit for each question in order: 1 where the answer was right, else 0."""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.task, self.evolution, self.model, self.precision, self.patch_seed

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return accuracy_interval(self.correct, self.total)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy": self.accuracy, "interval": list(self.interval)}


@dataclass(frozen=True, slots=True)
class Results:
    command: str
    tasks: Sequence[dict[str, Any]]
    """name, title, source, questions, and `floor`: the share that always giving the commonest answer would get right."""
    seed: int | None
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)
    machines: Sequence[Mapping[str, Any]] = field(default_factory=lambda: (machine(),))
    """Each with the versions that it ran."""

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `to_json` gave, from a file."""
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{one.name: row[one.name] for one in fields(Row) if one.name in row}) for row in found["rows"]]
        return cls(rows=rows, **{one.name: found[one.name] for one in fields(cls) if one.name != "rows"})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "command": self.command, "seed": self.seed, "machines": list(self.machines),
            "tasks": list(self.tasks), "notes": list(self.notes), "rows": [row.to_json() for row in self.rows],
        }  # fmt: skip

    @property
    def of_first_patches(self) -> list[Row]:
        """What tables and the page show; results.json has the rows of patches with other seeds as well."""
        return [row for row in self.rows if row.patch_seed == 0]

    def text(self) -> str:
        """For a terminal."""
        return table(HEAD, [cells(row) for row in self.of_first_patches])

    def markdown(self) -> str:
        """A table of all rows."""
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        rows = ([cell.replace("|", "\\|") for cell in cells(row)] for row in self.of_first_patches)
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        told = [f"on {number}: {in_one_line(one)}" for number, one in enumerate(self.machines, 1)]
        lines += ["", *(f"- {note}" for note in (*told, *self.notes))]
        return "\n".join(lines) + "\n"


HEAD = (
    "task", "evolution", "model", "precision", "accuracy (95 %)", "size", "RAM to run", "port: time", "RAM above import",
    "flips", "KL to first", "gain kept (95 %)", "perplexity", "on",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    low, high = row.interval
    return [
        row.task, row.evolution, row.model, row.precision, f"{row.accuracy:.1%} ({low:.1%} to {high:.1%})", in_words(row.bytes),
        in_words(row.score_peak_bytes), "-" if row.port_seconds is None else f"{row.port_seconds:.1f} s",
        "-" if row.port_above_bytes is None else in_words(row.port_above_bytes), shown(row.negative_flips, "d"),
        shown(row.kl, ".4f"), share(row.gain_kept, row.gain_error), shown(row.perplexity, ".2f"), str(row.machine + 1),
    ]  # fmt: skip


def with_gain_kept(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows with their share of the gain, where the evolved base and the refit in the reference precision are there.

    Its error is that of a ratio of differences to first order (the delta method).
    """
    known = {row.key: row for row in rows}

    def one(row: Row) -> Row:
        evolved = known.get((row.task, row.evolution, EVOLVED, reference, 0))
        refit = known.get((row.task, row.evolution, REFIT, reference, row.patch_seed))
        if evolved is None or refit is None or row.model not in (PORTED, REFIT):
            return replace(row, gain_kept=None, gain_error=None)
        gain = refit.accuracy - evolved.accuracy
        if gain <= half_interval({refit: 1.0, evolved: -1.0}):
            return replace(row, gain_kept=None, gain_error=None)
        kept = (row.accuracy - evolved.accuracy) / gain
        if row.key == refit.key:
            return replace(row, gain_kept=kept, gain_error=None)
        return replace(row, gain_kept=kept, gain_error=half_interval({row: 1.0, refit: -kept, evolved: kept - 1}) / gain)

    return [one(row) for row in rows]


def half_interval(weights: Mapping[Row, float]) -> float:
    """Half of the 95 % one of a weighted sum of accuracies.

    Where all rows tell their answers it is that of the sum's mean over the questions, with two more of them spread over all
    outcomes, without which models of one mind would leave no doubt (Agresti and Min 2005, for two models). Else it is made of
    each row's own, as if each model had been asked other questions: it is too wide, since models agree on many.
    """
    answers = [row.answers for row in weights if row.answers is not None]
    if len(answers) < len(weights):
        return sqrt(sum((weight * (row.interval[1] - row.interval[0]) / 2) ** 2 for row, weight in weights.items()))
    outcomes = list(product("01", repeat=len(weights)))
    seen = Counter(zip(*answers, strict=True))
    counts = [seen[outcome] + 2 / len(outcomes) for outcome in outcomes]
    sums = [sum(weight * int(answer) for weight, answer in zip(weights.values(), outcome, strict=True)) for outcome in outcomes]
    mean, square = (sum(n * one**power for n, one in zip(counts, sums, strict=True)) / sum(counts) for power in (1, 2))
    return Z_95 * sqrt((square - mean**2) / sum(counts))


def share(kept: float | None, error: float | None) -> str:
    """Of the gain, with its error in points."""
    return shown(kept, ".0%") + ("" if error is None else f" ± {100 * error:.0f}")


def shown(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def machine() -> dict[str, Any]:
    """What seconds and peaks depend on, and the versions; nothing that names the machine or its owner."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": model, "cores": cores(), "system": platform.system(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "versions": versions(),
    }  # fmt: skip


def in_one_line(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['cores']} cores, {in_words(machine['ram_bytes'])} of memory; {versions}"


def versions() -> dict[str, str]:
    """Of edgeport, Python and every package that moves the figures and is installed."""
    found = {"edgeport": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
