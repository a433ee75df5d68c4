"""The verb `bench`: the user's own model, patch and questions, or a packaged suite; checked first, then measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgeport import api
from edgeport.benchmark.page import page
from edgeport.benchmark.questions import read_questions
from edgeport.benchmark.results import Results
from edgeport.benchmark.score import read_text
from edgeport.benchmark.suite import FOLDER_QUANTS, Bench, Case, Evolution, Precision, Say
from edgeport.benchmark.tasks import TASKS, asked
from edgeport.checkpoint import read_json
from edgeport.demo import ADAPTERS, packaged_model
from edgeport.errors import CorruptCheckpoint, MissingExtra, OutputExists, UnknownName
from edgeport.gate import gate
from edgeport.places import staging_path
from edgeport.staging import claimed

PRECISIONS = ("bf16", "Q8_0", "Q4_K_M")
SUITES = {"triage": "the demo's model, evolution and patch; ICD-10-CM triage to 8 departments"}
FILES = ("results.json", "results.md", "results.html")
WORK = "models"
RUNNERS = {"hf": ("transformers", "hf"), "gguf": ("llama_cpp", "gguf"), "onnx": ("onnxruntime", "onnx")}
"""By container the module that asks its models, with the extra that brings it."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a user measures: paths or hub names, and files."""

    model: str
    patch: str
    questions: Path
    old_base: str | None = None
    refit: str | None = None


def bench_own(own: Own, output: Path, quants: Sequence[str], *, text: Path | None, limit: int | None, overwrite: bool,
              offline: bool, command: str, say: Say) -> Results:  # fmt: skip
    """Measure a patch on a user's model. Mistakes in the input are raised before a file is made, but for a question that is
    too long for a model, which the first that is asked tells."""
    questions = read_questions(own.questions)[:limit]
    told = read_text(text) if text is not None else None
    precisions = parsed(quants)
    check_output(output, overwrite)
    # ports go into a folder that is made only when all is well; the one it will be in has the same disk
    standing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
    for base, patch, old in (
        (own.model, own.patch, own.old_base), (own.old_base, own.patch, own.old_base), (own.model, own.refit, own.model),
    ):  # fmt: skip
        if base is None or patch is None:
            continue
        plans = [
            api.plan(
                new_base=base, patch=patch, old_base=old, output=precision.path(standing, ".planned"), to=precision.container,
                quant=precision.quant, offline=offline,
            )
            for precision in precisions
        ]  # fmt: skip
        gate(plans[0], force=False)
    case = Case(readable(own.questions.stem), questions, own.patch, own.refit)
    evolution = Evolution(readable(Path(own.model).name or Path(own.model).resolve().name), own.model, own.old_base)
    tasks = [facts(case, case.name, readable(own.questions.name))]
    extra = ["--offline"] if offline else []
    with working(output) as folder:
        # what was checked is what is read, also where it came through a pipe
        if told is not None:
            text = folder / "text.txt"
            text.write_text(told, encoding="utf-8")
        failed: list[str] = []
        rows = list(Bench(folder, precisions, text, extra, say, failed).measure(evolution, [case]))
    return written(Results(readable(command), tasks, None, rows, [*map(readable, failed)]), output)


def bench_suite(name: str, output: Path, quants: Sequence[str], *, limit: int | None, seed: int, overwrite: bool, command: str,
                say: Say) -> Results:  # fmt: skip
    """A packaged suite, offline."""
    if name not in SUITES:
        known = ", ".join(f"{suite} ({what})" for suite, what in SUITES.items())
        raise UnknownName(f"no suite is called {name}; there is {known}")
    precisions = parsed(quants)
    check_output(output, overwrite)
    try:
        questions = asked("triage", "test", limit or 400, seed)
    except ValueError as error:
        raise UnknownName(f"--limit {limit} is more than there is: {error}") from error
    case = Case("triage", questions, str(ADAPTERS / "triage"))
    with working(output) as folder:
        evolved = str(folder / "evolved")
        api.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=evolved, to="hf", quant="bf16", offline=True)
        evolution = Evolution("LoRA r8", evolved, str(packaged_model()))
        rows = list(Bench(folder, precisions, None, ["--offline"], say).measure(evolution, [case]))
    return written(Results(readable(command), [facts(case, TASKS["triage"].title, TASKS["triage"].source)], seed, rows), output)


def parsed(quants: Sequence[str]) -> list[Precision]:
    """Each once, in whatever letters. Raises UnknownName, and MissingExtra for one that nothing here can ask."""
    each: dict[str, Precision] = {}
    for precision in map(Precision.parse, quants or PRECISIONS):
        each.setdefault(precision.name.lower(), precision)
    for precision in each.values():
        needs = [RUNNERS[precision.container]] if precision.container in RUNNERS else []
        if precision.container == "hf" and precision.quant.lower() in FOLDER_QUANTS:
            needs += [("accelerate", "hf"), ("bitsandbytes", "bnb")]
        for module, extra in needs:
            if find_spec(module) is None:
                raise MissingExtra(f"{module} is to ask {precision.name} and not installed: pip install 'edgeport[{extra}]'")
    return list(each.values())


def facts(case: Case, title: str, source: str) -> dict[str, object]:
    """What the report says of a task."""
    return {"name": case.name, "title": title, "source": source, "questions": len(case.questions), "floor": case.floor()}


def check_output(output: Path, overwrite: bool) -> None:
    """Raises OutputExists for results that would be replaced, and for a file where the folder should be."""
    if output.exists() and not output.is_dir():
        raise OutputExists(f"{output} is a file; give a folder for the results")
    present = [name for name in FILES if (output / name).exists()]
    if present and not overwrite:
        raise OutputExists(f"{output} has {', '.join(present)} already; give another -o or --overwrite")
    if present and not is_ours(output / FILES[0]):
        raise OutputExists(f"the {present[0]} in {output} is nothing that edgeport bench wrote; it is not overwritten")


def is_ours(path: Path) -> bool:
    """Whether these are results of a benchmark."""
    try:
        return read_json(path).keys() >= {"format", "machines", "rows"}
    except (OSError, CorruptCheckpoint):
        return False


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def working(output: Path) -> Iterator[Path]:
    """A folder for models in work, beside the results: they may be larger than what /tmp holds. A failure leaves nothing."""
    anew = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with claimed(output / WORK):
            folder = staging_path(output / WORK)
            emptied(folder)  # of what a run that was killed outright has left
            try:
                yield folder
            finally:
                emptied(folder)
    except BaseException:
        with suppress(OSError):  # something else has come into one
            for folder in anew:
                folder.rmdir()
        raise


def written(results: Results, output: Path) -> Results:
    """Write the three files, each whole or not at all."""
    contents = (json.dumps(results.to_json(), indent=1) + "\n", results.markdown(), page(results))
    for name, content in zip(FILES, [content.encode() for content in contents], strict=True):
        partial = output / f".{name}.partial"
        try:
            partial.write_bytes(content)
            partial.replace(output / name)
        finally:
            partial.unlink(missing_ok=True)
    return results


def readable(name: str) -> str:
    """A name or a command with bytes that are no text replaced, which a page could not hold."""
    return os.fsencode(name).decode(errors="replace")
