"""The process around a command: its streams and signals, and an exit code with one sentence for whatever ends it."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from edgeport.errors import BudgetTooSmall, EdgeportError, MissingExtra

NO_MEMORY = ("can't allocate memory", "can't start new thread")
"""What torch says of the CPU's, and Python of a thread's stack; neither has a class for it."""


@contextmanager
def mistakes() -> Iterator[None]:
    """One line on stderr and the exit code of the error's kind; anything else is our bug and keeps its traceback."""
    try:
        yield
    except (EdgeportError, MissingExtra) as error:
        sys.stderr.write(f"edgeport: {error}\n")
        raise typer.Exit(getattr(error, "exit_code", 1)) from None
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        sys.stderr.write(f"edgeport: stopped by {signal.Signals(number).name}\n")
        raise typer.Exit(128 + number) from None
    except BrokenPipeError:  # who reads the output has seen enough
        raise
    except OSError as error:
        sys.stderr.write("edgeport: " + ": ".join(str(part) for part in (error.strerror or error, error.filename) if part) + "\n")
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(told in str(error) for told in NO_MEMORY):
            raise
        sys.stderr.write(
            "edgeport: the system gives this process no more memory; free some, or lift its limit (ulimit -v); a port, an export "
            "and an extraction take less with --max-ram\n"
        )
        raise typer.Exit(BudgetTooSmall.exit_code) from None


def emit(content: Any, as_json: bool, text: str) -> None:
    try:
        sys.stdout.write((json.dumps(content, indent=1) if as_json else text) + "\n")
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer would be tried again when the program ends, where nothing catches the error
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        error.filename = "the standard output"
        raise


def prepare() -> None:
    """Signals, threads and streams as a command needs them."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup's is to be ignored
            signal.signal(number, stop)
    # OpenMP's threads spin while they wait, and where cores are shared they take them from the hashing thread and others
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # who starts it may have closed streams, whose numbers the first files that are opened would get
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(spare)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    hide_downloads(not sys.stderr.isatty())
    # a path may hold signs that the terminal's encoding lacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def hide_downloads(hidden: bool) -> None:
    """No bars of huggingface_hub's, which is loaded later."""
    if hidden:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def stop(number: int, frame: object) -> None:
    """What a signal does: the same as Ctrl-C, so that nothing is left behind but what --resume keeps."""
    raise KeyboardInterrupt(number)
