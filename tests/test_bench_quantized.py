"""The table of patches on quantized bases: what is made of measured rows, and which rows are still to be measured."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import bench
from bench.quantized import HEAD, PATCHES, REAL, SUMMARY_HEAD, WAYS, cells, gathered, jobs_of, key, order, summary
from edgeport.report import table

RESULTS = Path(bench.__path__[0]) / "results"


def row(way: str, seed: int, **more: Any) -> dict[str, Any]:
    measured = {
        "correct": 360, "total": 400, "gain": 0.99, "gain_error": 0.01, "log_gain": 0.98, "log_gain_error": 0.01,
        "kl": {"manual": 0.01}, "perplexity": {"manual": 20.0},
    }  # fmt: skip
    return {"format": "nf4", "task": "triage", "norm": REAL, "way": way, "seed": seed} | measured | more


def asked(**more: Any) -> Namespace:
    options = {"formats": ["nf4"], "patches": PATCHES, "norms": [REAL], "ways": WAYS, "seeds": [0], "limit": 4, "tokens": 8}
    return Namespace(**options | {"device": "cpu"} | more)


def test_the_committed_tables_are_of_the_committed_rows() -> None:
    rows = gathered([RESULTS / "quantized.json"])
    full = table(HEAD, [cells(one) for one in sorted(rows.values(), key=order)])
    assert (RESULTS / "quantized.txt").read_text() == full + "\n"
    assert (RESULTS / "quantized-summary.txt").read_text() == table(SUMMARY_HEAD, summary(rows)) + "\n"


def test_a_summary_shows_every_draw_and_no_base_that_lacks_a_way() -> None:
    exact = row("exact", 0, correct=400, perplexity={"manual": 25.0})
    rows = [exact, row("base", 0), row("nearest", 0), row("16-bit first", 0, kl={"manual": 0.5})]
    rows += [row("patch-aware", 1, log_gain_error=0.02), row("patch-aware", 0, correct=380, perplexity={"manual": 30.0})]
    other = [one | {"task": "family"} for one in rows if one["way"] != "nearest"]
    [line] = summary({key(one): one for one in rows + other})
    found = dict(zip(SUMMARY_HEAD, line, strict=True))
    assert (found["format"], found["task"], found["exact"], found["patch-aware"]) == ("nf4", "triage", "100.0%", "95.0% 90.0%")
    assert found["log-gain kept (95 %)"] == "98.0% 98.0% +- 3.9%"
    assert (found["KL"], found["of 16-bit first"], found["perplexity"]) == ("0.0100 0.0100", "0.5000", "+20.0% -20.0%")


def test_a_summary_of_scaled_patches_shows_no_share_of_a_gain_that_is_not_told_from_none() -> None:
    rows = [row(way, 0, norm="0.03", log_gain_error=0.6) for way in ("base", "exact", "nearest", "patch-aware", "16-bit first")]
    [line] = summary({key(one): one for one in rows}, "0.03")
    assert line[SUMMARY_HEAD.index("log-gain kept (95 %)")] == "-" and not summary({key(one): one for one in rows})


def test_only_what_a_file_lacks_is_measured(tmp_path: Path) -> None:
    job, *others = jobs_of(asked(patches={"triage": tmp_path}, seeds=[0, 1]), tmp_path, tmp_path, ())
    assert not others and ("nearest", 0) in job.rows and ("nearest", 1) not in job.rows and ("stochastic", 1) in job.rows
    known = {("nf4", "triage", REAL, *one) for one in job.rows} - {("nf4", "triage", REAL, "patch-aware", 1)}
    [left] = jobs_of(asked(patches={"triage": tmp_path}, seeds=[0, 1]), tmp_path, tmp_path, known)
    assert left.rows == (("patch-aware", 1),)
    [scaled] = jobs_of(asked(patches={"triage": tmp_path}, norms=["0.01"]), tmp_path, tmp_path, known)
    assert ("sidecar", 0) not in scaled.rows and ("stochastic", 0) in scaled.rows
