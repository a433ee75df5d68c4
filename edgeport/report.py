"""What a person sees: one progress bar on stderr, plain lines where stderr is no terminal, and small tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edgeport.memory import in_words
from edgeport.run import Progress, silent

LINE_SECONDS = 10.0
RULE = 100


def say(text: str, quiet: bool = False) -> None:
    if not quiet:
        sys.stderr.write(text + "\n")


@contextmanager
def bar(total: int, show: bool) -> Iterator[Progress]:
    """A progress callback over `total` bytes that names the weight at hand."""
    if not show:
        yield silent
    elif sys.stderr.isatty():
        yield from _terminal(total)
    else:
        yield _lines(total)


def _terminal(total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(stderr=True)
    # one line whatever the width: the bar is a share of it, and the name is cut to what is left
    columns = (
        BarColumn(console.width // 5), DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True, expand=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda weight, nbytes: shown.update(task, description=weight, advance=nbytes)


def _lines(total: int) -> Progress:
    """A line every few seconds, for logs."""
    done, last = 0, time.monotonic()

    def progress(weight: str, nbytes: int) -> None:
        nonlocal done, last
        done += nbytes
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            say(f"{done / max(total, 1):4.0%} of {in_words(total)}: {weight}")

    return progress


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, a rule below the head; the last column is left ragged."""
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    widths[-1] = 0
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "-" * min(max(map(len, lines)), RULE), *lines[1:]])
