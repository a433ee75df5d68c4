"""Every bad input gets one sentence, its exit code, and nothing else: the table of `bench.bad_input`, and real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.bad_input import CASES, listing
from bench.spoiling import Answer, port, run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    argv = case.make(tmp_path)
    before = listing(tmp_path)
    with case.world():
        answer = run(argv)
    assert listing(tmp_path) == before
    assert_refused(answer, case.says, case.code)


def assert_refused(answer: Answer, says: str, code: int) -> None:
    assert answer.output == ""
    # the parser of the command line has its own way to say that an option or a verb is unknown
    if "Usage:" not in answer.error:
        assert answer.error.startswith("edgeport: ")
        assert answer.error.count("\n") == 1 and answer.error.endswith("\n")
        assert "\x1b" not in answer.error
    assert says in answer.error
    assert answer.code == code


def process(argv: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeport", *argv], cwd=ROOT, env=os.environ | environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["safetensors, huge header length", "--max-ram nonsense", "--max-ram too small"])
def test_bad_input_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    argv = CASES[name].make(tmp_path)
    before = listing(tmp_path)
    child = process(argv)
    output, error = child.communicate(timeout=120)
    assert_refused(Answer(child.returncode, output, error), CASES[name].says, CASES[name].code)
    assert listing(tmp_path) == before


SLOWED = """
import signal, sys, time
from edgeport import run
from edgeport.cli import main
edit = run.edit
def slow(*arguments):
    print("in the middle", flush=True)
    time.sleep(60)
    return edit(*arguments)
run.edit = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
main()
"""


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_port_leaves_no_output_and_the_next_one_succeeds(killer: signal.Signals, tmp_path: Path) -> None:
    argv = port(tmp_path)
    before = listing(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOWED, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    child.send_signal(killer)
    _, error = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[killer]
    assert error == ("" if killer == signal.SIGKILL else f"edgeport: stopped by {killer.name}\n")
    # nobody can clean up after SIGKILL, but the next run
    assert (tmp_path / ".out.partial").exists() is (killer == signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert run(argv).code == 0
    assert set(os.listdir(tmp_path)) == {*(name for name in before if "/" not in name), "out"}
    assert run(["verify", str(tmp_path / "out")]).code == 0
