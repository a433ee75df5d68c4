"""The benchmark's models, made one at a time and asked: bases, ports and refits at every precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeport.benchmark.questions import Asked, gold, to_json, write_questions
from edgeport.benchmark.results import EVOLVED, OLD, PORTED, REFIT, TUNED, Row, with_gain_kept
from edgeport.demo import child
from edgeport.errors import EdgeportError, UnknownName
from edgeport.registry import converters

ROLES = ("keep", "against")
"""What a model may do with the distributions: see `edgeport.benchmark.score`."""
FOLDER_QUANTS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Precision:
    """What `port --to` and `--quant` are given."""

    container: str
    quant: str

    @classmethod
    def parse(cls, text: str) -> Precision:
        """`Q4_K_M`, `nf4`, or with the container before it, `onnx:int4`. Raises UnknownName."""
        before, colon, quant = text.rpartition(":")
        container = before if colon else "hf" if text.lower() in FOLDER_QUANTS else "gguf"
        able = [name for name, one in converters().items() if one.writes]
        if container not in able or not quant:
            raise UnknownName(f"--quant {text}: TYPE or CONTAINER:TYPE was expected, with a container of {', '.join(able)}")
        return cls(container, quant)

    @property
    def name(self) -> str:
        return self.quant if self.container == "gguf" else f"{self.quant} ({self.container})"

    def path(self, folder: Path, stem: str) -> Path:
        return folder / (f"{stem}.gguf" if self.container == "gguf" else stem)

    @property
    def flags(self) -> list[str]:
        return ["--to", self.container, "--quant", self.quant]


@dataclass(frozen=True, slots=True)
class Case:
    """One task: its questions, the patch that was made for it on the old base, and perhaps one made on the evolved base."""

    name: str
    questions: Sequence[Asked]
    patch: str
    refit: str | None = None
    seed: int = 0
    """Of the patch's training, where there are several."""

    def floor(self) -> float:
        """The share of right answers that the commonest answer gets."""
        return Counter(map(gold, self.questions)).most_common(1)[0][1] / len(self.questions)


@dataclass(frozen=True, slots=True)
class Evolution:
    """An evolved base, and the base that it evolved from, where there is one to compare with."""

    name: str
    base: str
    old: str | None = None


@dataclass(slots=True)
class Bench:
    """Measures cases on evolutions. `folder` holds what is in work: afterwards questions and the ports' distributions."""

    folder: Path
    precisions: Sequence[Precision]
    """The first is the reference."""
    text: Path | None = None
    extra: Sequence[str] = ()
    """Flags for every port and export."""
    say: Say = lambda text: None
    failed: list[str] | None = None
    """Where it is given, a model of another precision than the first that cannot be measured is told there, and ends nothing."""
    journal: Path | None = None
    """Where finished models are written down, so that they need not be measured again (the folder has to be kept too)."""

    def measure(self, evolution: Evolution, cases: Sequence[Case]) -> Iterator[Row]:
        """All rows of an evolution."""
        for case in cases:
            # whole at once: other processes may ask the same
            anew = self.questions(case).with_suffix(f".{os.getpid()}")
            write_questions(anew, case.questions)
            anew.replace(self.questions(case))
        reference = self.precisions[0]
        found: list[Row] = []
        todo = [(PORTED, reference), *((EVOLVED, one) for one in self.precisions)]
        if evolution.old is not None:
            todo += [(OLD, reference), (TUNED, reference)]
        todo += [(PORTED, one) for one in self.precisions[1:]] + [(REFIT, one) for one in self.precisions]
        for model, precision in todo:
            try:
                found += self.rows(evolution, cases, model, precision)
            except EdgeportError as error:  # often hours after the first
                if self.failed is None or precision == reference:
                    raise
                self.failed.append(f"{model}, {precision.name}: {error}")
                self.say(self.failed[-1])
        yield from completed(found, reference.name)

    def rows(self, evolution: Evolution, cases: Sequence[Case], model: str, precision: Precision) -> Iterator[Row]:
        """One model at one precision: a base serves all cases at once, and each patch makes a model of its own."""
        base = evolution.old if model in (OLD, TUNED) else evolution.base
        assert base is not None
        if model in (OLD, EVOLVED):
            yield from self.one(evolution.name, cases, model, precision, ["export", base])
            return
        for case in cases:
            patch = case.refit if model == REFIT else case.patch
            made_on = evolution.base if model == REFIT else evolution.old
            if patch is not None:
                # the questions judge the model better than a probe would
                command = ["port", "--no-probe", "--patch", patch, "--new-base", base]
                command += ["--old-base", made_on] if made_on else []
                yield from self.one(evolution.name, [case], model, precision, command)

    def one(
        self, evolution: str, cases: Sequence[Case], model: str, precision: Precision, command: Sequence[str]
    ) -> Iterator[Row]:
        """Make a model, put every case's questions to it, and remove it."""
        names = ", ".join(case.name for case in cases)
        told = [entry(command, precision, case, self.text) for case in cases]
        done = self.finished()
        first = model == PORTED and precision == self.precisions[0]
        if all(key in done for key in told) and not (first and not all(self.rows_file(case).exists() for case in cases)):
            yield from (replace(done[key], evolution=evolution) for key in told)
            return
        self.say(f"{evolution}: {model}, {precision.name}: {names}")
        with TemporaryDirectory(prefix="model-", dir=self.folder) as folder:
            place = precision.path(Path(folder), "model")
            arguments = [*command, "-o", str(place), *precision.flags, *self.extra]
            receipt = child(["-P", "-m", "edgeport", *arguments, "--json", "--no-progress"])
            # of other models no row says the divergence, and an old base may have another vocabulary
            found = self.ask(place, cases, "keep" if first else "against" if model == PORTED else None)
        patched = model not in (OLD, EVOLVED)
        for key, case, answers in zip(told, cases, found["tasks"], strict=True):
            right = answers["right"]
            row = Row(
                task=case.name, evolution=evolution, model=model, precision=precision.name, bytes=receipt["bytes_out"],
                correct=sum(right), total=len(right), score_seconds=answers["seconds"],
                score_peak_bytes=answers["peak_ram_bytes"], perplexity=found["perplexity"], kl=answers["kl"],
                patch_kept=(receipt["survival"] or {}).get("mean") if patched else None,
                port_seconds=receipt["seconds"] if patched else None,
                port_peak_bytes=receipt["peak_ram_bytes"] if patched else None,
                port_above_bytes=receipt["peak_above_import_bytes"] if patched else None,
                patch_seed=case.seed if patched else 0, answers="".join("01"[one] for one in right),
            )  # fmt: skip
            if self.journal:
                with self.journal.open("a") as file:
                    # a line's end before it, too: the last one may have been cut off
                    file.write("\n" + json.dumps([key, asdict(row)]) + "\n")
            yield row

    def finished(self) -> dict[str, Row]:
        """What the journal holds, by `entry`."""
        return dict(finished_rows(self.journal)) if self.journal and self.journal.exists() else {}

    def ask(self, model: Path, cases: Sequence[Case], role: str | None) -> dict[str, Any]:
        """The answers of a model. `role`: keep its distributions, compare them with those that were kept, or neither."""
        tasks = [
            {"questions": str(self.questions(case)), **{one: str(self.rows_file(case)) if one == role else None for one in ROLES}}
            for case in cases
        ]
        job = {"model": str(model), "text": str(self.text) if self.text else None, "tasks": tasks}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "edgeport.benchmark.score"], input=json.dumps(job), capture_output=True, text=True
        )
        if done.returncode:
            complaint = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and no message"]
            raise EdgeportError(f"{model.name} could not be asked: {complaint[-1]}")
        return dict(json.loads(done.stdout))

    def questions(self, case: Case) -> Path:
        return self.folder / f"{case.name}.jsonl"

    def rows_file(self, case: Case) -> Path:
        return self.folder / f"{case.name}-{digest(case.questions)[:16]}-{self.precisions[0].name}.distributions"


def finished_rows(journal: Path) -> Iterator[tuple[str, Row]]:
    """Of a journal, each by `entry`. A line that was cut off has not happened."""
    for line in journal.read_text().splitlines():
        with suppress(ValueError):
            key, row = json.loads(line)
            yield key, Row(**row)


def entry(command: Sequence[str], precision: Precision, case: Case, text: Path | None = None) -> str:
    """What names a measurement: the same model is not made twice for two evolutions of one old base."""
    read = sha256(text.read_bytes()).hexdigest() if text else None
    return json.dumps([*command, precision.name, case.name, digest(case.questions), read])


def digest(questions: Sequence[Asked]) -> str:
    return sha256(json.dumps([*map(to_json, questions)]).encode()).hexdigest()


def completed(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows with what only a comparison with other rows can tell; None where the other one is missing."""
    answers = {row.key: row.answers for row in rows if row.answers is not None}

    def one(row: Row) -> Row:
        places = [(row.task, row.evolution, model, reference, row.patch_seed) for model in (TUNED, PORTED)]
        before = next((answers[place] for place in places if place in answers), None)
        flips = None
        if row.model in (TUNED, PORTED, REFIT) and before is not None:
            flips = sum(pair == ("1", "0") for pair in zip(before, answers[row.key], strict=True))
        return replace(row, negative_flips=flips, kl=row.kl if row.model == PORTED else None)

    return with_gain_kept([one(row) for row in rows], reference)
