"""Write docs/cli.md and the outputs in README.md anew from the program itself, or check that they are up to date.

In README.md, `<!-- begin: edgeport formats -->` and `<!-- end -->` hold between them what the command prints. Commands
run in the repository's root; `(exit 1)` after the command says what it exits with, where that is not 0. `cat FILE` holds
what a longer command has printed into a file of `bench/results`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path(sys.executable).with_name("edgeport")
PLAIN = {"TYPER_USE_RICH": "0", "NO_COLOR": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
BLOCK = re.compile(
    r"(?P<begin><!-- begin: (?P<command>(?:edgeport|cat) [^\n]+?)(?: \(exit (?P<code>\d+)\))? -->\n)"
    r"(?:(?!<!-- begin).)*?"
    r"(?P<end><!-- end -->\n)",
    re.DOTALL,
)
MARKER = re.compile(r"^<!-- (begin|end)\b", re.MULTILINE)
VERB = re.compile(r"^  (\w[\w-]*)", re.MULTILINE)


def output(command: str, code: int = 0) -> str:
    """What a command prints, stderr after stdout. Raises SystemExit where it does not exit with `code`."""
    program, *arguments = shlex.split(command)
    if program == "cat":
        return (ROOT / arguments[0]).read_text()
    done = subprocess.run(
        [PROGRAM, *arguments], cwd=ROOT, env=os.environ | PLAIN, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != code:
        raise SystemExit(f"`{command}` exited with {done.returncode}, and {code} was expected:\n{done.stdout}{done.stderr}")
    printed = done.stdout + done.stderr
    if str(ROOT) in printed or str(Path.home()) in printed:
        raise SystemExit(f"`{command}` prints a path of this machine, which cannot go into a page:\n{printed}")
    return "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()) + "\n"


def verbs(help_text: str) -> list[str]:
    """The names under "Commands:". Raises SystemExit where there are none."""
    _, _, listed = help_text.partition("\nCommands:\n")
    found = VERB.findall(listed)
    if not found:
        raise SystemExit(f"`edgeport --help` lists no commands:\n{help_text}")
    return found


def cli_page() -> str:
    """docs/cli.md: the help of the program and of every verb."""
    top = output("edgeport --help")
    sections = [("edgeport", top)] + [(f"edgeport {verb}", output(f"edgeport {verb} --help")) for verb in verbs(top)]
    pieces = ["# Command line\n\nWritten by `make docs` from the program's own `--help`.\n"]
    pieces += [f"\n## {title}\n\n```\n{text}```\n" for title, text in sections]
    return "".join(pieces)


def filled(page: str) -> str:
    """README.md with every block's command run anew. Raises SystemExit for a marker that belongs to no block."""
    blocks = len(BLOCK.findall(page))
    markers = len(MARKER.findall(page))
    if markers != 2 * blocks:
        raise SystemExit(f"README.md has {markers} begin and end markers, and {blocks} whole blocks: one is misspelt or unpaired")

    def fill(block: re.Match[str]) -> str:
        printed = output(block["command"], int(block["code"] or 0))
        prompt = "" if block["command"].startswith("cat ") else f"$ {block['command']}\n"
        return f"{block['begin']}```\n{prompt}{printed}```\n{block['end']}"

    return BLOCK.sub(fill, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check = parser.parse_args().check
    if not PROGRAM.is_file():
        raise SystemExit(f"edgeport is not installed beside {Path(sys.executable).name}; run `make docs` or `make check`")
    readme, cli = ROOT / "README.md", ROOT / "docs" / "cli.md"
    stale = False
    for path, fresh in {cli: cli_page(), readme: filled(readme.read_text())}.items():
        present = path.read_text() if path.exists() else ""
        if present == fresh:
            continue
        stale = True
        name = str(path.relative_to(ROOT))
        if check:
            difference = difflib.unified_diff(present.splitlines(True), fresh.splitlines(True), name, f"{name} (by make docs)")
            sys.stdout.writelines(difference)
        else:
            path.write_text(fresh)
            print(f"wrote {name}")
    if check and stale:
        print("the pages above are out of date; run `make docs`")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
