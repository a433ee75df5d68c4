"""Commands as a user gives them, in this process and in one of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.bad_input import listing
from bench.spoiling import model, run, tokenizer

ROOT = Path(__file__).parents[1]


def said(argv: list[str]) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    answer = run([*argv, "--json"])
    assert answer.code == 0, answer.error
    return dict(json.loads(answer.output))


CALL = """
import sys
from edgeport.cli import main
def call():
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
call()
"""


def child(argv: list[str], before: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, with something to do before edgeport is imported and after it has run."""
    script = f"{before}{CALL}{after}"
    return subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, timeout=300
    )


def ran(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr
    return done


def content(output: Path) -> dict[str, str]:
    """Hash by file, but for the manifest, which holds seconds and peaks."""
    return {name: found for name, found in listing(output).items() if not name.endswith("edgeport.json")}


def with_tokenizer(folder: Path) -> Path:
    base = model(folder)
    tokenizer(base, 320)
    return base
