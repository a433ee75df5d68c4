"""The whole benchmark: evolved bases, patches, their seeds and refits, then the suite, in as many processes as fit.

python -m bench.full -o bench-output --books BOOKS         # `make bench-full` does this; results: bench-output/results

What is finished has a file in OUTPUT/done, so a run that was stopped goes on where it was; what each process said is in
OUTPUT/log. Results are of all rows that are finished, with --collect at any time. In 13 minutes an H100 and 16 cores made all
evolutions, 46 trainings (eight share the GPU, 0.25 s a step) and 40 rows, of 20 to 100 s each. On two cores it is days: choose
--stages and --tasks there, and leave the refits out (--no-refits), which take most of them. Models are asked on the CPU, where
their memory is measured.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.suite import FEW, QUESTIONS, STAGES, carried, journaled, of_rows, patch_of, write
from bench.train_task import RECIPES
from edgeport.demo import ADAPTERS, packaged_model
from edgeport.device import choose

SEEDED = ("lora", "full")
"""Evolutions on which patches of further seeds are ported and trained again."""
FIRST = ("full", "chain3", "chain1", "lora", "chain2")
"""The order of stages, those that tell most first."""
CHAIN = "123"
"""The ends of the names of a chain's stages."""
ALLOCATION = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000"
"""GLIBC_TUNABLES of a training on the CPU: what a step frees stays, in huge pages, in place of new ones each time."""


@dataclass(frozen=True, slots=True)
class Job:
    """A process: what it is called, what `python -m` is given, and the jobs that have to be over before."""

    name: str
    command: Sequence[str | Path]
    needs: Sequence[str] = ()
    trains: bool = False


def evolutions(arguments: argparse.Namespace, small: Sequence[str]) -> Iterator[Job]:
    """Those that the chosen stages need."""
    books, evolved = arguments.books, arguments.output / "evolved"
    three = [books / name for name in ("handbook", "reference", "developers")]
    yield Job("full", ["bench.train_full", "--text", three[0], "-o", evolved / "full", *small], (), True)
    yield Job("chain", ["bench.train_chain", "--text", *three, "-o", evolved / "chain", *small], (), True)
    onto = ["--new-base", packaged_model(), "-o", evolved / "lora", "--quant", "bf16", "--offline", "--overwrite"]
    yield Job("lora", ["edgeport", "port", "--patch", ADAPTERS / "evolution", *onto])


def training(task: str, seed: int, stage: str | None, arguments: argparse.Namespace, small: Sequence[str]) -> Job:
    """Of a patch on the old base or, with a stage, of its refit."""
    output = patch_of(arguments.output / "adapters", task, seed, stage)
    base = ["--base", arguments.output / "evolved" / STAGES[stage].base] if stage else []
    needs = [stage.rstrip(CHAIN)] if stage else []
    name = f"train-{task}-{seed}" + (f"-{stage}" if stage else "")
    return Job(name, ["bench.train_task", task, "--seed", str(seed), "-o", output, *base, *small], needs, True)


def asking(task: str, seed: int, stage: str, quant: str, arguments: argparse.Namespace) -> Job:
    """Of a task's models of a stage, in a precision beside the reference."""
    output = arguments.output
    needs = [stage.rstrip(CHAIN), f"train-{task}-{seed}", f"train-{task}-{seed}-{stage}"]
    if quant not in FEW:
        needs.append(f"ask-{stage}-{task}-{seed}-{FEW[1]}")  # keeps the distributions that others are compared with
    name = f"ask-{stage}-{task}-{seed}-{quant.replace(':', '-')}"
    command = ["bench.suite", stage, "-o", output / "shards" / name, "--evolved", output / "evolved", "--work", output / "work",
               "--patches", output / "adapters", "--books", arguments.books, "--tasks", task, "--quant", FEW[0], quant,
               "--questions", str(arguments.questions), "--patch-seed", str(seed)]  # fmt: skip
    return Job(name, command, needs)


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """All, the most telling first."""
    small = [f"--{name}={value}" for name in ("steps", "batch-size") if (value := getattr(arguments, name.replace("-", "_")))]
    stages = [stage for stage in FIRST if stage in arguments.stages]
    pairs = [(stage, task) for task in RECIPES for stage in stages if task in STAGES[stage].tasks and task in arguments.tasks]
    seeded = [(seed, stage, task) for seed in range(1, arguments.seeds) for stage, task in pairs if stage in SEEDED]
    tasks = dict.fromkeys(task for _, task in pairs)
    found = [job for job in evolutions(arguments, small) if job.name in {stage.rstrip(CHAIN) for stage in stages}]
    found += [training(task, 0, None, arguments, small) for task in tasks if not carried(task).is_dir()]
    found += [training(task, 0, stage, arguments, small) for stage, task in pairs if arguments.refits]
    found += [asking(task, 0, stage, FEW[1], arguments) for stage, task in pairs]
    found += [training(task, seed, None, arguments, small) for seed in range(1, arguments.seeds) for task in tasks]
    found += [training(task, seed, stage, arguments, small) for seed, stage, task in seeded if arguments.refits]
    wide = [(stage, task, quant) for stage, task in pairs for quant in STAGES[stage].tasks[task] if quant not in FEW]
    found += [asking(task, seed, stage, FEW[0], arguments) for seed, stage, task in seeded]
    found += [asking(task, 0, stage, quant, arguments) for stage, task, quant in wide]
    return found


def run(todo: Sequence[Job], arguments: argparse.Namespace) -> list[str]:
    """Work through the jobs, in their order as far as cores and needs allow; returns those that failed or needed one."""
    done, logs = arguments.output / "done", arguments.output / "log"
    for folder in (done, logs, arguments.output / "evolved"):
        folder.mkdir(parents=True, exist_ok=True)
    cuda = arguments.device == "cuda"
    weights = {True: 1 if cuda else arguments.cores, False: min(arguments.threads, arguments.cores)}
    waiting = [job for job in todo if not (done / job.name).exists()]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    began = time.monotonic()
    while waiting or running:
        for name, (_, process) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    failed.append(name)
                else:
                    (done / name).touch()
                told = f"FAILED, see {logs / name}.txt" if process.returncode else "done"
                print(f"{time.monotonic() - began:6.0f} s  {name} {told}; {len(waiting)} wait, {len(running)} run", flush=True)
        for job in [job for job in waiting if set(job.needs) & set(failed)]:
            waiting.remove(job)
            failed.append(job.name)
        open_names = {job.name for job in waiting} | set(running)
        for job in list(waiting):
            used = sum(weights[one.trains] for one, _ in running.values())
            training_now = sum(one.trains for one, _ in running.values())
            full = job.trains and training_now >= (arguments.trainings if cuda else 1)
            if used + weights[job.trains] <= arguments.cores and not full and not open_names & set(job.needs):
                waiting.remove(job)
                running[job.name] = job, start(job, logs, weights[job.trains], cuda)
        time.sleep(0.2)
    return failed


def start(job: Job, logs: Path, threads: int, cuda: bool) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if job.trains and not cuda:
        environment.setdefault("GLIBC_TUNABLES", ALLOCATION)
    if cuda and not job.trains:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with (logs / f"{job.name}.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, job.command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--books", type=Path, required=True, help="folder of the three books' pages")
    parser.add_argument("--device", type=choose, default=choose("auto"), help="of the trainings: auto (default), cpu or cuda")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=2, help="of a process that asks a model")
    parser.add_argument("--trainings", type=int, default=8, help="that share a GPU")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1, help="patches of each recipe (default: 1)")
    parser.add_argument("--refits", action=argparse.BooleanOptionalAction, default=True, help="train the ceilings as well")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--steps", type=int, help="of every training, in place of the recipes'")
    parser.add_argument("--batch-size", type=int, help="likewise")
    parser.add_argument("--collect", action="store_true", help="only bring together what has been measured so far")
    arguments = parser.parse_args()
    failed = [] if arguments.collect else run(jobs(arguments), arguments)
    journal, results = arguments.output / "work" / "journal.jsonl", arguments.output / "results"
    if journal.exists():
        command = shlex.join(["python", "-m", "bench.full", *(one for one in sys.argv[1:] if one != "--collect")])
        results.mkdir(exist_ok=True)
        write(of_rows(journaled(journal, arguments.questions), command, arguments.questions, seed=0), results)
        print((results / "headline.txt").read_text())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    main()
