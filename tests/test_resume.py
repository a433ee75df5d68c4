"""A port that is killed anywhere and resumed gives the bytes of one that was not, and does not do again what is done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgeport
from bench import bad_input, spoiling
from edgeport import run
from edgeport.errors import NotResumable
from edgeport.journal import check_same, dependencies
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch

ROOT = Path(__file__).parents[1]

DRIVER = """
import json, os, signal, sys
import torch, edgeport, edgeport.run, edgeport.staging as staging, edgeport.journal as journal, edgeport.manifest
import converters.hf, converters.gguf

def countdown(left, original):
    def wrapped(*arguments):
        left[0] -= 1
        if left[0] == 0:
            if original is write:  # half of the bytes
                handle, view, offset = arguments
                original(handle, view[: len(view) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return wrapped

write, commit, seal = staging.write_at, staging.commit, edgeport.run.write_manifest

def child(job, kill):
    if kill:
        where, count = kill
        left = [count]
        if where == "write":
            staging.write_at = countdown(left, write)
        elif where == "replace":
            os.replace = countdown(left, os.replace)
        elif where == "commit":
            staging.commit = countdown(left, commit)
        elif where == "manifest":
            edgeport.run.write_manifest = countdown(left, seal)
        else:
            def torn(self, step, *told):
                left[0] -= 1
                if left[0]:
                    return add(self, step, *told)
                with open(self.path, "a") as file:
                    file.write('{"weight": "' + step.target.name)
                os.kill(os.getpid(), signal.SIGKILL)
            add, journal.Journal.add = journal.Journal.add, torn
    edgeport.port(**job)

for line in sys.stdin:
    job, kill = json.loads(line)
    pid = os.fork()
    if not pid:
        try:
            child(job, kill)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def outcome(driver: subprocess.Popen[str], job: dict[str, Any], kill: tuple[str, int] | None = None) -> int:
    assert driver.stdin is not None and driver.stdout is not None
    driver.stdin.write(json.dumps([job, kill]) + "\n")
    driver.stdin.flush()
    return int(driver.stdout.readline())


def content(folder: Path, name: str) -> dict[str, str]:
    """Hashes of the output of that name, but for the manifest, which holds seconds and peaks."""
    found = bad_input.listing(folder)
    return {path: held for path, held in found.items() if path.startswith(name) and not path.endswith("edgeport.json")}


@pytest.fixture
def base(tiny_llama: TinyLlama) -> Path:
    return tiny_llama()


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    return save_patch(base, tmp_path / "patch")


def test_killed_anywhere_and_resumed(base: Path, patch: Path, tmp_path: Path) -> None:
    """In hf, a gguf in several files and a quantized base with an adapter beside it: the n-th write cut in half, and later
    moments."""
    nf4 = edgeport.export(model=base, output=tmp_path / "nf4", to="hf", quant="nf4").output
    common = {"patch": str(patch), "probe": False, "rounding": "stochastic", "device": "cpu"}
    jobs = {
        "out": {**common, "new_base": str(base), "old_base": str(base)},
        "set.gguf": {**common, "new_base": str(base), "to": "gguf", "quant": "Q8_0", "max_shard_size": 60_000},
        "beside": {**common, "new_base": str(nf4), "residual": 4},
    }
    kills = {
        "out": [("write", 2), ("write", 8), ("write", 17), ("journal", 5), ("commit", 1)],
        "set.gguf": [("write", 13), ("manifest", 1), ("replace", 2)],
        "beside": [("write", 9), ("write", 60)],
    }
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as driver:
        for name, job in jobs.items():
            job["output"] = str(tmp_path / name)
            assert outcome(driver, job) == 0
            whole = content(tmp_path, stem := name.removesuffix(".gguf"))
            for kill in kills[name]:
                job["output"] = str(tmp_path / f"again-{name}")
                assert outcome(driver, job, kill) == -9, kill
                assert not (tmp_path / f"again-{name}").exists()
                assert (tmp_path / f".again-{name}.journal").is_file()
                # once more, in the run that resumes
                if kill == ("write", 8):
                    assert outcome(driver, {**job, "resume": True}, kill) == -9
                assert outcome(driver, {**job, "resume": True}) == 0, kill
                assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
                again = content(tmp_path, f"again-{stem}")
                assert {path.removeprefix("again-"): held for path, held in again.items()} == whole, kill
                edgeport.verify(tmp_path / f"again-{name}")
                for path in sorted(tmp_path.glob(f"again-{stem}*")):
                    subprocess.run(["rm", "-r", path], check=True)
        assert driver.stdin is not None
        driver.stdin.close()


Job = dict[str, Any]


@pytest.fixture
def interrupted(base: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A port that Ctrl-C has stopped in the middle of its eighth patched weight."""
    job: Job = {"patch": patch, "new_base": base, "output": tmp_path / "out", "resume": True}
    with monkeypatch.context() as context:
        context.setattr(run, "edit", stopping(8))
        with pytest.raises(KeyboardInterrupt):
            edgeport.port(**job)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".out.journal", ".out.partial"]
    return job


def stopping(at: int) -> Callable[..., Any]:
    count, edit = 0, run.edit

    def stop(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return edit(*arguments)

    return stop


def test_what_is_done_is_not_done_again(interrupted: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited, seen = [], []
    edit = run.edit
    monkeypatch.setattr(run, "edit", lambda plan, step, *rest: edited.append(step.target.name) or edit(plan, step, *rest))
    receipt = edgeport.port(**interrupted, progress=lambda name, count: seen.append(count))
    assert len(edited) == 14 - 7 and len(receipt.facts) == 21
    assert sum(seen) == receipt.bytes_in and any("before an interruption" in note for note in receipt.notes)
    plain = edgeport.port(**interrupted | {"output": tmp_path / "plain", "resume": False})
    assert content(tmp_path / "out", "") == content(tmp_path / "plain", "")
    assert receipt.facts == plain.facts and receipt.survival == plain.survival
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_spoiled_bytes_are_made_anew(interrupted: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (tmp_path / ".out.journal").read_text().splitlines()
    first = next(json.loads(line)["weight"] for line in lines[1:] if '"action": "patch"' in line)
    plan = edgeport.plan(**{key: value for key, value in interrupted.items() if key != "resume"})
    with open(tmp_path / ".out.partial" / "model.safetensors", "r+b") as file:
        file.seek(plan.files[0].ranges[first] + 5)
        file.write(b"\xff\xff")
    (tmp_path / ".out.partial" / "edgeport.json").write_text("left by a later moment")
    edited: list[str] = []
    edit = run.edit
    monkeypatch.setattr(run, "edit", lambda plan, step, *rest: edited.append(step.target.name) or edit(plan, step, *rest))
    edgeport.port(**interrupted)
    assert len(edited) == 8 and first in edited
    edgeport.port(**interrupted | {"output": tmp_path / "plain", "resume": False})
    assert content(tmp_path / "out", "") == content(tmp_path / "plain", "")


def test_what_cannot_be_resumed(interrupted: Job, tmp_path: Path) -> None:
    before = bad_input.listing(tmp_path)
    with pytest.raises(NotResumable, match=r"was told otherwise .* leave off --resume to start anew"):
        edgeport.port(**interrupted, quant="bf16")
    with pytest.raises(NotResumable, match="told otherwise"):
        edgeport.port(**interrupted | {"patch": f"{interrupted['patch']}:0.5"})
    assert bad_input.listing(tmp_path) == before
    config = interrupted["patch"] / "adapter_config.json"
    told = config.read_text()
    config.write_text(json.dumps(json.loads(told) | {"lora_alpha": 60}))
    with pytest.raises(NotResumable, match=r"adapter_config\.json has changed since the run was interrupted"):
        edgeport.port(**interrupted)
    config.write_text(told)
    settings = interrupted["new_base"] / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(NotResumable, match=r"config\.json has changed since the run was interrupted"):
        edgeport.port(**interrupted)
    file = interrupted["new_base"] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(NotResumable, match=r"model\.safetensors has changed since the run was interrupted"):
        edgeport.port(**interrupted)
    receipt = edgeport.port(**interrupted | {"resume": False})
    assert any("were cleared away; with --resume" in note for note in receipt.notes)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_patches_in_another_order_are_another_port(tmp_path: Path) -> None:
    """Of two that put whole values in a weight's place, the last one counts."""
    base, first = spoiling.model(tmp_path), spoiling.patch(tmp_path)
    second = shutil.copytree(first, tmp_path / "second")
    plans = [edgeport.plan(patch=order, new_base=base, output=tmp_path / "out") for order in ((first, second), (second, first))]
    before, now = (dependencies(plan, plan.steps) for plan in plans)
    with pytest.raises(NotResumable, match="told otherwise"):
        check_same(before, now)
    # whose sums round otherwise
    elsewhere = replace(plans[0], limits=replace(plans[0].limits, device="cuda"))
    with pytest.raises(NotResumable, match="told otherwise"):
        check_same(before, dependencies(elsewhere, plans[0].steps))


def test_a_mistake_leaves_nothing_to_resume(tmp_path: Path) -> None:
    argv = bad_input.CASES["patch, infinity in the weight it changes"].make(tmp_path)
    before = bad_input.listing(tmp_path)
    assert bad_input.run([*argv, "--resume"]).code == 1
    assert bad_input.listing(tmp_path) == before


def test_a_disk_that_becomes_full_leaves_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free some of it, and --resume goes on."""
    argv = [*bad_input.port(tmp_path), "--resume"]
    written, pwrite = 0, os.pwrite

    def full(handle: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, offset)

    with monkeypatch.context() as context:
        context.setattr("os.pwrite", full)
        answer = bad_input.run(argv)
    assert answer.code == 4 and "became full on the way" in answer.error
    assert (tmp_path / ".out.journal").is_file()
    again = bad_input.run(argv)
    assert again.code == 0 and "were written before an interruption" in again.error


def test_resuming_what_was_not_begun_is_a_port(tmp_path: Path) -> None:
    argv = bad_input.port(tmp_path)
    assert bad_input.run([*argv, "--resume"]).code == 0
    assert bad_input.run(["verify", str(tmp_path / "out")]).code == 0


@pytest.mark.parametrize("resume", [False, True])
def test_a_set_of_files_is_put_in_place_whole(resume: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each is renamed on its own."""
    job: Job = {"model": base, "output": tmp_path / "out.gguf", "max_shard_size": 200_000, "resume": resume}
    before, replace = bad_input.listing(tmp_path), os.replace

    def ending(source: Path, target: Path) -> None:
        if source.name.startswith("out-00002"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr("os.replace", ending)
        with pytest.raises(KeyboardInterrupt):
            edgeport.export(**job)
    assert not list(tmp_path.glob("out*"))
    if resume:
        receipt = edgeport.export(**job)
        assert any("21 of 21 weights were written before an interruption" in note for note in receipt.notes)
        edgeport.verify(tmp_path / "out.gguf")
    else:
        assert bad_input.listing(tmp_path) == before


def test_an_end_just_after_the_last_step_leaves_no_journal(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stand beside a whole output for good, which --resume finds in its way."""
    rename = os.rename

    def last(*paths: Path) -> None:
        rename(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("os.rename", last)
        with pytest.raises(KeyboardInterrupt):
            edgeport.export(model=base, output=tmp_path / "out", to="hf", resume=True)
    edgeport.verify(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
