"""Work in a process of its own, for what takes more memory to import than a whole port does.

Both ends: a job goes in as one JSON object, lines of progress come out, and the last line is a JSON object, the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryFile
from typing import Any

from edgeport.errors import CorruptCheckpoint, EdgeportError, MissingExtra, NonFiniteResult

Watch = Callable[[str], None]
"""Called with a line of progress."""
Work = Callable[[dict[str, Any], Watch], Mapping[str, Any]]


def ask(module: str, job: Mapping[str, Any], watch: Watch, handles: Sequence[int] = ()) -> dict[str, Any] | str:
    """The answer of `python -m module`, which inherits the open files `handles`; or why it could not do the job.

    Raises NonFiniteResult, CorruptCheckpoint where it found a damaged model.
    """
    with (
        TemporaryFile("w+") as complaints,
        subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True,
            pass_fds=handles,
        ) as child,
    ):  # fmt: skip
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        last = ""
        for last in child.stdout:
            if not last.startswith("{"):
                watch(last.strip())
        child.wait()
        complaints.seek(0)
        complaint = complaints.read().strip().splitlines()
    if child.returncode:
        return f"its process ended with {child.returncode}: {complaint[-1] if complaint else 'no message'}"
    answer = dict(json.loads(last))
    if "damaged" in answer:
        raise {"NonFiniteResult": NonFiniteResult}.get(answer["kind"], CorruptCheckpoint)(answer["damaged"])
    return str(answer["unable"]) if "unable" in answer else answer


def serve(work: Work) -> None:
    """The other end: do the job on stdin."""

    def watch(text: str) -> None:
        print(text, flush=True)  # noqa: T201

    try:
        answer = dict(work(json.load(sys.stdin), watch))
    except (CorruptCheckpoint, NonFiniteResult) as error:
        answer = {"damaged": str(error), "kind": type(error).__name__}
    except (EdgeportError, MissingExtra) as error:
        answer = {"unable": str(error)}
    print(json.dumps(answer), flush=True)  # noqa: T201


def here(work: Callable[[], Any]) -> Any:
    """The same in this process: what `work` returns, or why it could not be done."""
    try:
        return work()
    except (CorruptCheckpoint, NonFiniteResult):
        raise
    except (EdgeportError, MissingExtra) as error:
        return str(error)
