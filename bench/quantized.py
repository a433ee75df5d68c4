"""A patch on a quantized base, from that base alone: which rounding keeps it, and what it costs.

`python -m bench.quantized [--base FOLDER] -o results.json [FORMAT ...]` quantizes an evolved base to each format (the
demo's, whose numbers descend from a Q4_1 file, or one that `bench.train_full` made, which lie on no grid), and ports
patches onto the quantized base in several ways: exactly (float32, four times the size: what the rounding is judged
against), rounded to nearest as other tools do, on the base's own grid stochastically and patch-aware (edgeport's default
there), and, as a bar, onto the 16-bit base first and quantized once; then at a price in size, with what rounding lost as
an adapter of rank 8 or 32 beside it, with weights promoted up to a tenth more, and the patch as a sidecar.

Each patch is `TASK=FOLDER`, a packaged task and an adapter; --norms scales it so that |change| / |weight| is that on
average over its weights. Rows are made by --jobs processes, and written to -o as they come; of a file that is there
what it lacks is made, and `--table FILE ...` prints what files of several runs hold together, with --summary in a line a base.

Columns: accuracy on held-out questions, and lost and won ones beside the exact port, which has the same questions, so
that the share of the gain that is recovered has a narrow interval; the same share of the right option's log-probability;
KL to the exact port and perplexity on Python's language reference; share of the patch kept in the weights, error on what
the patch reads relative to the patch, noise relative to the weights; seconds of the port for a million patched weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgeport
from edgeport.demo import ADAPTERS, packaged_model
from edgeport.demo.triage import Z_95
from edgeport.device import choose
from edgeport.report import table

if TYPE_CHECKING:
    from torch import Tensor

    from bench.judge import Heard

GGUF = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0")
FOLDERS = ("nf4", "nf4-dq", "int8", "gptq-4", "awq-4")
PATCHES = {"triage": ADAPTERS / "triage", "family": Path(__file__).with_name("adapters") / "family"}
DRAWN = ("stochastic", "patch-aware")
SAME_SIZE = ("base", "exact", "nearest", *DRAWN, "16-bit first")
WAYS = (*SAME_SIZE, "residual 8", "residual 32", "promote", "sidecar")
REAL = "real"
PROMOTED = 1.1
"""The size that promotion may use, relative to the base's."""
MOST_QUESTIONS = 1624
"""Of triage's eight departments the smallest has 203 held-out texts."""
MANUAL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """One format, patch and norm; the rows that are asked for."""

    format: str
    task: str
    patch: Path
    norm: str
    rows: tuple[tuple[str, int], ...]
    """Way and seed of each."""
    base: Path
    """The 16-bit evolved base."""
    scratch: Path
    limit: int
    tokens: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.format} {self.task} {self.norm}"


def ports(job: Job, quantized: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Way, seed, and what makes it."""
    own: dict[str, Any] = {"new_base": quantized}
    size = sum(path.stat().st_size for path in ([quantized] if quantized.is_file() else quantized.iterdir()))
    options = {
        "nearest": {**own, "rounding": "nearest"},
        "stochastic": {**own, "rounding": "stochastic"},
        "patch-aware": {**own, "rounding": "patch-aware"},
        "16-bit first": {"new_base": job.base, "quant": job.format, "rounding": "nearest"},
        "residual 8": {**own, "residual": 8},
        "residual 32": {**own, "residual": 32},
        "promote": {**own, "promote": True, "max_size": int(size * PROMOTED)},
        "sidecar": {**own, "sidecar": True},
    }
    for way, seed in job.rows:
        if way in options:
            yield way, seed, {**options[way], "seed": seed}


def container(format: str) -> tuple[str, str]:
    """--to, and the file's ending."""
    return ("gguf", ".gguf") if format in GGUF else ("hf", "")


def carry_out(job: Job) -> list[dict[str, Any]]:
    """All rows of one job, in a process of its own."""
    from bench.judge import Judge, changed

    to, ending = container(job.format)
    with tempfile.TemporaryDirectory(dir=job.scratch) as name:
        folder = Path(name)
        quantized, exact = folder / f"base{ending}", folder / "exact"
        made = edgeport.export(model=job.base, output=quantized, to=to, quant=job.format)
        common: dict[str, Any] = {"force": True, "probe": False, "overwrite": True, "device": "cpu"}
        patch = job.patch
        onto = {"new_base": quantized, "output": exact, "to": "hf", "quant": "f32"}
        receipt = edgeport.port(patch=patch, **common | onto)
        norm = mean_norm(receipt)
        if job.norm != REAL:
            patch = scaled(job.patch, float(job.norm) / norm, folder / "patch")
            receipt = edgeport.port(patch=patch, **common | onto)
            norm = mean_norm(receipt)
        judge = Judge(exact, patch, job.task, job.limit, job.tokens, job.device)
        [base] = changed([quantized], judge.exact, job.device)
        judge.model.load_state_dict(base, strict=False, assign=True)
        unpatched = judge.hear()
        patched = sum(matrix.numel() for matrix in base.values())
        rows = []

        def add(way: str, seed: int, heard: Heard, stored: Mapping[str, Tensor], receipt: edgeport.Receipt) -> None:
            about = {"format": job.format, "task": job.task, "norm": job.norm, "mean_change": norm, "way": way, "seed": seed}
            cost = {"seconds": receipt.seconds, "patched_weights": patched, "bytes": receipt.bytes_out}
            rows.append(about | judge.figures(heard, unpatched) | judge.weights(base, stored) | cost)

        add("base", 0, unpatched, base, made)
        add("exact", 0, judge.reference, judge.exact, receipt)
        for way, seed, options in ports(job, quantized):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                output = Path(place) / f"ported{ending}"
                receipt = edgeport.port(patch=patch, output=output, to=to, **common | options)
                stored = judge.put(output)
                add(way, seed, judge.hear(), stored, receipt)
    return rows


def mean_norm(receipt: edgeport.Receipt) -> float:
    """|change| / |weight| on average over the patched weights."""
    changes: list[float] = [fact.change for fact in receipt.facts if fact.change]
    return sum(changes) / len(changes)


def scaled(patch: Path, factor: float, folder: Path) -> Path:
    """The adapter with `lora_alpha` multiplied."""
    shutil.copytree(patch, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def told(row: Mapping[str, Any], name: str) -> bool:
    """Whether the questions tell the gain from none, so that there is a share of it."""
    return row[name] is not None and Z_95 * row[f"{name}_error"] <= 1


def cells(row: Mapping[str, Any]) -> list[str]:
    def share(name: str) -> str:
        return f"{row[name]:.1%} +- {Z_95 * row[f'{name}_error']:.1%}" if told(row, name) else "-"

    seconds = row["seconds"] / row["patched_weights"] * 1e6
    return [
        row["format"], row["task"], row["norm"], row["way"], str(row["seed"]), f"{row['correct'] / row['total']:.1%}",
        f"-{row['lost']} +{row['won']}", share("gain"), share("log_gain"), f"{row['kl']['manual']:.4f}",
        f"{row['perplexity']['manual']:.2f}", f"{row['retention']:.3f}", f"{row['subspace']:.3f}", f"{row['noise']:.4f}",
        f"{seconds:.3f}", f"{row['bytes'] / (1 << 20):.1f} MiB",
    ]  # fmt: skip


HEAD = ["base", "task", "norm", "way", "seed", "accuracy", "beside exact", "gain kept (95 %)", "log-gain kept (95 %)", "KL",
        "perplexity", "kept", "subspace", "noise", "s/M", "size"]  # fmt: skip


SUMMED = ("base", "exact", "nearest", "patch-aware", "16-bit first")
SUMMARY_HEAD = ["format", "task", *SUMMED, "log-gain kept (95 %)", "KL", "of 16-bit first", "perplexity"]


def summary(rows: Mapping[tuple[Any, ...], Mapping[str, Any]], norm: str = REAL) -> list[list[str]]:
    """Of each base and patch of one norm: accuracies, and of each draw of patch-aware what it keeps, its KL, and its perplexity
    beside exact's."""
    lines = []
    for format, task in sorted({(key[0], key[1]) for key in rows}, key=lambda pair: (pair[1] != "triage", *order_of(*pair))):
        draws = {way: [rows[name] for name in sorted(rows) if name[:4] == (format, task, norm, way)] for way in SUMMED}
        if not all(draws.values()):
            continue
        ours, reference = draws["patch-aware"], draws["exact"][0]["perplexity"]["manual"]
        shares = [percents(row["correct"] / row["total"] for row in draws[way]) for way in SUMMED]
        kept = "-"
        if all(told(row, "log_gain") for row in ours):
            error = Z_95 * max(row["log_gain_error"] for row in ours)
            kept = f"{percents(row['log_gain'] for row in ours)} +- {error:.1%}"
        divergences = [" ".join(f"{row['kl']['manual']:.4f}" for row in draws[way]) for way in ("patch-aware", "16-bit first")]
        drift = " ".join(f"{row['perplexity']['manual'] / reference - 1:+.1%}" for row in ours)
        lines.append([format, task, *shares, kept, *divergences, drift])
    return lines


def percents(shares: Iterable[float]) -> str:
    """One after the other, of one draw each."""
    return " ".join(f"{share:.1%}" for share in shares)


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["format"], row["task"], row["norm"], row["way"], row["seed"]


def order_of(format: str, task: str) -> tuple[Any, ...]:
    return (*GGUF, *FOLDERS).index(format), task


def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    format, task, norm, way, seed = key(row)
    return *order_of(format, task), norm != REAL, norm, WAYS.index(way), seed


def gathered(files: Sequence[Path]) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {key(row): row for file in files if file.is_file() for row in json.loads(file.read_text())}


def jobs_of(arguments: argparse.Namespace, base: Path, scratch: Path, known: Container[tuple[Any, ...]]) -> list[Job]:
    """What is asked and not `known`: the real patch in every way, then its scaled copies at the base's size."""
    jobs = []
    for norm in sorted(arguments.norms, key=lambda norm: norm != REAL):
        ways = [way for way in WAYS if way in arguments.ways and (norm == REAL or way in SAME_SIZE)]
        asked = [(way, seed) for way in ways for seed in (arguments.seeds if way in DRAWN else [0])]
        for task, patch in arguments.patches.items():
            for format in arguments.formats or (*GGUF, *FOLDERS):
                rows = tuple(row for row in asked if (format, task, norm, *row) not in known)
                if rows:
                    jobs.append(Job(format, task, patch, norm, rows, base, scratch, arguments.limit, arguments.tokens,
                                    arguments.device))  # fmt: skip
    return jobs


def run(jobs: Sequence[Job], processes: int, output: Path, rows: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """What each job makes goes into `output` as soon as it is done, beside the `rows` that are there."""
    began = time.monotonic()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(carry_out, job): job for job in jobs}
        for count, finished in enumerate(as_completed(asked), 1):
            job = asked[finished]
            try:
                made = finished.result()
            except Exception as error:  # one job's failure is not the others'
                print(f"{job.name} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            rows |= {key(row): row for row in made}
            partial = output.with_suffix(".partial")
            partial.write_text(json.dumps(sorted(rows.values(), key=order), indent=1) + "\n")
            partial.replace(output)
            print(f"{count} of {len(jobs)}  {job.name}  {len(made)} rows  {time.monotonic() - began:.0f} s", flush=True)


def named(text: str) -> tuple[str, Path]:
    task, _, folder = text.rpartition("=")
    return task, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join((*GGUF, *FOLDERS))} (default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="rows to make (default: all)")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="a 16-bit evolved base (default: the demo's)")
    parser.add_argument("--patches", type=named, nargs="+", metavar="TASK=FOLDER", help="default: triage and family")
    parser.add_argument("--norms", nargs="+", default=[REAL], help=f"{REAL} (default), or |change| / |weight| as 0.01")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the roundings that draw")
    parser.add_argument("--limit", type=int, default=MOST_QUESTIONS, help="questions a task")
    parser.add_argument("--tokens", type=int, default=MANUAL_TOKENS, help="of Python's language reference")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share of the cores")
    parser.add_argument("--device", type=choose, default=choose("auto"), help="of the models that are asked; ports use the CPU")
    parser.add_argument("-o", "--output", type=Path, help="the figures as JSON")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print what these files hold")
    parser.add_argument("--summary", action="store_true", help="a line for each base and patch, of each of --norms")
    arguments = parser.parse_args()
    if not arguments.table:
        if not arguments.output:
            parser.error("-o or --table is needed")
        arguments.patches = dict(arguments.patches) if arguments.patches else PATCHES
        # read by the processes as they start
        os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // arguments.jobs, 1)))
        with tempfile.TemporaryDirectory() as scratch:
            base = arguments.base or Path(scratch) / "evolved"
            if not arguments.base:
                edgeport.port(patch=ADAPTERS / "evolution", new_base=packaged_model(), output=base, to="hf", quant="bf16")
            known = gathered([arguments.output])
            run(jobs_of(arguments, base, Path(scratch), known), arguments.jobs, arguments.output, known)
    rows = gathered(arguments.table or [arguments.output])
    if arguments.summary:
        print("\n\n".join(table(SUMMARY_HEAD, summary(rows, norm)) for norm in arguments.norms))
    else:
        print(table(HEAD, [cells(row) for row in sorted(rows.values(), key=order)]))


if __name__ == "__main__":
    main()
