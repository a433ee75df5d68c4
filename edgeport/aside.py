"""Work in a process of its own, for what takes more memory to import than a whole port does.

Both ends: a job goes in as a JSON object on one line, and lines of progress and answers, a JSON object each, come out.
After each answer the process waits for a line before it goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any

from edgeport.errors import CorruptCheckpoint, EdgeportError, MissingExtra, NonFiniteResult

GO_ON = "go on"
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""torch asks for pages of 2 MiB: to hand out small ones takes the system a good part of the time that a text takes to run."""
Watch = Callable[[str], None]
"""Called with a line of progress."""
Work = Callable[[dict[str, Any], Watch], Mapping[str, Any]]
Conversation = Callable[[dict[str, Any], Watch], Iterator[Mapping[str, Any]]]
"""Work with several answers."""


def ask(module: str, job: Mapping[str, Any], watch: Watch) -> dict[str, Any] | str:
    """The last answer of `python -m module`, or why it could not do the job. Raises what `converse` does."""
    return list(converse(module, job, watch))[-1]


def converse(
    module: str, job: Mapping[str, Any], watch: Watch, handles: Sequence[int] = ()
) -> Generator[dict[str, Any] | str]:
    """The answers of `python -m module`, which inherits the open files `handles`; the last may be why it could not go on.

    After each answer it waits until the next is asked for. Raises NonFiniteResult, CorruptCheckpoint where it found a
    damaged model.
    """
    with (
        TemporaryFile("w+") as complaints,
        subprocess.Popen(
            # -P: what lies in the folder at hand is no program of ours
            [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True,
            pass_fds=handles, env=HUGE_PAGES | os.environ,
        ) as child,
    ):  # fmt: skip
        assert child.stdin and child.stdout
        try:
            tell(child.stdin, json.dumps(job))
            for line in child.stdout:
                if not line.startswith("{"):
                    watch(line.strip())
                    continue
                answer = dict(json.loads(line))
                if "damaged" in answer:
                    raise {"NonFiniteResult": NonFiniteResult}.get(answer["kind"], CorruptCheckpoint)(answer["damaged"])
                yield str(answer["unable"]) if "unable" in answer else answer
                tell(child.stdin, GO_ON)
            child.wait()
        finally:
            child.kill()  # nobody hears it any more
            with suppress(BrokenPipeError):
                child.stdin.close()
        complaints.seek(0)
        complaint = complaints.read().strip().splitlines()
    if child.returncode:
        yield f"its process ended with {child.returncode}: {complaint[-1] if complaint else 'no message'}"


def tell(pipe: IO[str], line: str) -> None:
    # one that has ended says why otherwise
    with suppress(BrokenPipeError):
        pipe.write(line + "\n")
        pipe.flush()


def serve(work: Work) -> None:
    """The other end of `ask`: do the job on stdin."""

    def once(job: dict[str, Any], watch: Watch) -> Iterator[Mapping[str, Any]]:
        yield work(job, watch)

    attend(once)


def attend(conversation: Conversation) -> None:
    """The other end of `converse`."""

    def watch(text: str) -> None:
        print(text, flush=True)  # noqa: T201

    def answer(found: Mapping[str, Any]) -> bool:
        print(json.dumps(dict(found)), flush=True)  # noqa: T201
        return bool(sys.stdin.readline())

    try:
        for found in conversation(json.loads(sys.stdin.readline()), watch):
            if not answer(found):
                return
    except (CorruptCheckpoint, NonFiniteResult) as error:
        answer({"damaged": str(error), "kind": type(error).__name__})
    except (EdgeportError, MissingExtra) as error:
        answer({"unable": str(error)})


def here(work: Callable[[], Any]) -> Any:
    """`ask` in this process: what `work` returns, or why it could not be done."""

    def once() -> Iterator[Any]:
        yield work()

    return next(within(once()))


def within(answers: Iterator[Any]) -> Generator[Any]:
    """`converse` in this process."""
    try:
        yield from answers
    except (CorruptCheckpoint, NonFiniteResult):
        raise
    except (EdgeportError, MissingExtra) as error:
        yield str(error)
    except Exception as error:  # which would end a process of its own, and not the port
        yield f"{type(error).__name__}: {error}"
