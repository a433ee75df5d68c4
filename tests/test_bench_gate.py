"""The gate's figures beside what ports lost: of the suite's rows, and of diagnose itself."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

import edgeport
from bench.gate import FIGURES, RESULTS, agreement, measured, merged, outcome_of, ranks, shown, told_anew, within
from bench.suite import known_stage
from edgeport.benchmark.results import EVOLVED, OLD, PORTED, REFIT, TUNED, Results, Row
from tests.conftest import TinyLlama
from tests.test_adapter import save_patch
from tests.test_diagnose import drifted


def row(model: str, correct: int, precision: str = "bf16", seed: int = 0) -> Row:
    return Row("sums", "LoRA r8", model, precision, 1, correct, 100, 0.0, 1, patch_seed=seed)


ROWS = [
    row(OLD, 10), row(TUNED, 90), row(EVOLVED, 20), row(PORTED, 60), row(PORTED, 50, "Q4_K_M"), row(PORTED, 80, seed=1),
    row(REFIT, 90),
]  # fmt: skip


def test_what_a_port_loses_is_of_the_reference_and_the_first_patch() -> None:
    assert outcome_of(ROWS, "sums", "LoRA r8") == {"tuned": 0.9, "ported": 0.6, "lost": pytest.approx(3 / 8)}
    assert outcome_of(ROWS, "sums", "chain 1") is None
    assert outcome_of([one for one in ROWS if one.model != TUNED], "sums", "LoRA r8") is None


def test_a_pair_is_diagnosed(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.suite.PATCHES", tmp_path)
    base = tiny_llama()
    save_patch(base, tmp_path / "sums", std=0.02)
    new = drifted(base, tmp_path / "new")
    (pair,) = measured("lora", new, base, tmp_path, ROWS)
    told = edgeport.diagnose(patch=tmp_path / "sums", new_base=new, old_base=base).to_json()
    assert {name: pair[name] for name in FIGURES} == {name: told["all"][name] for name in FIGURES} and pair["drift"] > 0
    assert (pair["task"], pair["evolution"], pair["verdict"], pair["lost"]) == ("sums", "LoRA r8", "pass", pytest.approx(3 / 8))
    other = {**pair, "evolution": "chain 2", "read": pair["read"] + 1, "lost": 0.1}
    assert merged([other, {**pair, "lost": 0.9}], [pair]) == [pair, other]
    assert told_anew([{**pair, "lost": 0.9}, other], ROWS) == [pair, other]
    assert outcome_of([row(OLD, 90), *ROWS[1:]], "sums", "LoRA r8") is None
    assert "rank correlation  -" in shown([pair]) and agreement([pair, other], "read") == pytest.approx(-1)


def test_a_stage_that_there_is_not() -> None:
    with pytest.raises(ArgumentTypeError, match="no stage is called chain; there are lora, full, chain1"):
        known_stage("chain")


def test_equal_values_share_a_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 7.0]) == [2.5, 1, 2.5, 4]
    assert agreement([{"read": 1.0, "lost": 2.0}, {"read": 1.0, "lost": 3.0}], "read") is None


def test_what_one_patch_meets_is_ordered_by_itself() -> None:
    """Two tasks whose losses are far apart, each growing with the drift; a third has too few pairs to tell."""
    found = {"triage": [0.1, 0.2, 0.3], "legs": [0.5, 0.6, 0.7], "sums": [0.9, 0.8]}
    pairs = [
        {"task": task, "drift": float(at + len(task)), "lost": lost}
        for task, losses in found.items() for at, lost in enumerate(losses)
    ]  # fmt: skip
    assert within(pairs, "drift") == pytest.approx(1) and (agreement(pairs, "drift") or 0) < 0
    assert within(pairs[-2:], "drift") is None


def test_the_published_table_is_of_its_figures_and_of_the_suites_rows() -> None:
    pairs = json.loads((RESULTS / "gate.json").read_text())
    assert (RESULTS / "gate.txt").read_text() == shown(pairs) + "\n"
    rows = Results.read(RESULTS / "suite" / "results.json").rows
    for pair in pairs:
        outcome = outcome_of(rows, pair["task"], pair["evolution"])
        assert outcome == {name: pair[name] for name in ("tuned", "ported", "lost")}
