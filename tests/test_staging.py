"""An output that takes another's place: until it is whole the other is there, and nothing of anybody else's goes."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

import edgeport
from bench.bad_input import listing
from bench.spoiling import model
from edgeport import staging
from edgeport.errors import OutputExists, UnknownName
from edgeport.places import replaced_path
from edgeport.staging import claimed, staged
from tests.conftest import TinyLlama


@pytest.fixture
def base(tiny_llama: TinyLlama) -> Path:
    return tiny_llama()


KINDS: dict[str, dict[str, Any]] = {
    "folder": {"to": "hf", "output": "out"}, "gguf": {"to": "gguf", "output": "out.gguf"},
    "set": {"to": "gguf", "output": "out.gguf", "max_shard_size": "200KB"},
}  # fmt: skip


def renames(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often an export that takes the place of another renames."""
    count = [0]

    def counted(original: Any) -> Any:
        def rename(*paths: Any) -> None:
            count[0] += 1
            original(*paths)

        return rename

    with monkeypatch.context() as context:
        for name in ("rename", "replace"):
            context.setattr(os, name, counted(getattr(os, name)))
        edgeport.export(**job, overwrite=True)
    return count[0]


def seen(folder: Path) -> dict[str, str]:
    """What is there but for the hidden files of a run that was killed."""
    return {name: held for name, held in listing(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [False, True])
def test_whenever_it_ends_one_of_both_is_there_whole(
    kind: str, after: bool, base: Path, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename fails once, before or after it has happened; the last that has happened leaves the new output."""
    job: dict[str, Any] = {"model": base, **KINDS[kind], "output": tmp_path / KINDS[kind]["output"]}
    edgeport.export(**job)
    total, other = renames(job, monkeypatch), tiny_llama("other", seed=1)
    assert total >= 3
    before = listing(tmp_path)
    for number in range(1, total + 1):
        left = [number]

        def failing(original: Any, left: list[int] = left) -> Any:
            def rename(*paths: Any) -> None:
                left[0] -= 1
                if after:
                    original(*paths)
                if left[0] == 0:
                    raise KeyboardInterrupt
                if not after:
                    original(*paths)

            return rename

        with monkeypatch.context() as context:
            for name in ("rename", "replace"):
                context.setattr(os, name, failing(getattr(os, name)))
            with pytest.raises(KeyboardInterrupt):
                edgeport.export(**job | {"model": other}, overwrite=True)
        now = listing(tmp_path)
        if after and number == total:
            edgeport.verify(job["output"])
            assert now.keys() == before.keys() and now != before
        else:
            assert now == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_run_had_put_aside_comes_back(
    kind: str, base: Path, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the run is left to undo it: the next one does, whatever it is itself refused for."""
    job: dict[str, Any] = {"model": base, **KINDS[kind], "output": tmp_path / KINDS[kind]["output"]}
    edgeport.export(**job)
    total, other = renames(job, monkeypatch), tiny_llama("other", seed=1)
    before = seen(tmp_path)
    for number in range(1, total):
        pid = os.fork()
        if not pid:
            left = [number]

            def killing(original: Any, left: list[int] = left) -> Any:
                def rename(*paths: Any) -> None:
                    original(*paths)
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)

                return rename

            for name in ("rename", "replace"):
                setattr(os, name, killing(getattr(os, name)))
            edgeport.export(**job | {"model": other}, overwrite=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        with pytest.raises(OutputExists, match="exists already"):
            edgeport.export(**job)
        assert seen(tmp_path) == before


def test_a_run_that_is_done_leaves_the_place_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has been renamed, the lock with it: who comes while the old output is removed is another run."""
    output = tmp_path / "out"
    removed = staging.shutil.rmtree

    def slow(path: Path, **options: Any) -> None:
        monkeypatch.setattr(staging.shutil, "rmtree", removed)
        if path == replaced_path(output):
            (tmp_path / ".out.partial").mkdir()
            (tmp_path / ".out.partial" / "theirs").write_text("theirs")
        removed(path, **options)

    for text in ("old", "new"):
        with claimed(output), staged(output, [], True, True) as place:
            (place.folder / "edgeport.json").write_text(json.dumps({"edgeport": 1, "files": {}, "text": text}))
            if text == "new":
                monkeypatch.setattr(staging.shutil, "rmtree", slow)
    assert (tmp_path / ".out.partial" / "theirs").read_text() == "theirs"
    assert json.loads((output / "edgeport.json").read_text())["text"] == "new"


def test_a_link_in_the_place_where_an_output_is_made(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    (tmp_path / ".out.partial").symlink_to(mine)
    with pytest.raises(OutputExists, match=r"\.out\.partial, where .*out is to be made, is a link or a file; move it away"):
        edgeport.export(model=model(tmp_path), output=tmp_path / "out", to="hf")
    assert (mine / "letter").read_text() == "dear"


@pytest.mark.parametrize("kind", ["link", "file", "folder of another", "folder of an older edgeport"])
def test_a_stranger_in_the_place_of_what_is_replaced(kind: str, base: Path, tmp_path: Path) -> None:
    """Neither does it switch off what is asked of the output, nor is anything of it moved."""
    mine, replaced = tmp_path / "mine", replaced_path(tmp_path / "out.gguf")
    mine.mkdir()
    (mine / "config.json").write_text("theirs")
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "out.gguf").write_bytes(b"mine")
    if kind == "link":
        replaced.symlink_to(mine)
    elif kind == "file":
        replaced.write_text("mine")
    else:
        (mine if kind == "folder of another" else replaced).mkdir(exist_ok=True)
        mine.rename(replaced)
    before = listing(tmp_path)
    with pytest.raises(OutputExists, match=r"exists already|is nothing that a run into .*out.gguf has left there; move it away"):
        edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf")
    with pytest.raises(OutputExists, match=r"did not write|is nothing that a run into .*out.gguf has left there; move it away"):
        edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_where_the_old_output_was_put_aside(kind: str, base: Path, tmp_path: Path) -> None:
    """A run was killed between its two renames; then somebody puts something there."""
    job: dict[str, Any] = {"model": base, **KINDS[kind], "output": tmp_path / KINDS[kind]["output"]}
    edgeport.export(**job)
    output, replaced = job["output"], replaced_path(job["output"])
    replaced.mkdir()
    for path in sorted(tmp_path.glob("out*")):
        path.rename(replaced / path.name)
    name = sorted(path.name for path in replaced.iterdir())[0]
    (tmp_path / name).mkdir()
    before = listing(replaced)
    with pytest.raises(OutputExists, match="has come where an interrupted run had put the old output aside"):
        edgeport.export(**job, overwrite=True)
    assert listing(replaced) == before and (tmp_path / name).is_dir()
    (tmp_path / name).rmdir()
    with pytest.raises(OutputExists, match="exists already"):
        edgeport.export(**job)
    edgeport.verify(output)
    assert not replaced.exists()


def test_a_link_in_the_place_of_the_journal(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    (tmp_path / ".out.journal").symlink_to(tmp_path / "letter")
    edgeport.export(model=model(tmp_path), output=tmp_path / "out", to="hf", resume=True)
    edgeport.verify(tmp_path / "out")
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_manifest_from_elsewhere_makes_nothing_ours(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    entry = {"bytes": 3, "sha256": "0"}
    told = {"edgeport": 1, "files": {"out.gguf": entry, "notes.txt": entry, "../notes.txt": entry}}
    (tmp_path / "out.gguf.edgeport.json").write_text(json.dumps(told))
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_more_files_than_may_be_open(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (70, resource.RLIM_INFINITY))
    with pytest.raises(UnknownName, match=r"cut into \d+ files, and a process may have 70 open .* larger --max-shard-size"):
        edgeport.plan(new_base=base, output=tmp_path / "out", to="hf", max_shard_size="20KB")
