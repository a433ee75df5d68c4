"""The adapter for lm-evaluation-harness against the harness's own model of transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import edgeport
from tests.conftest import TinyLlama

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")

PAIRS = [("the patch is", " added to the base"), ("Diagnosis: melanoma ", "of the skin"), ("def port(", "base")]
PROMPTS = [("one block of", {"until": ["\n"], "max_gen_toks": 6}), ("Diagnosis:", {"until": "e", "max_gen_toks": 8})]


def requests(kind: Any, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one if isinstance(one, tuple) else (one,), 0) for one in arguments]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("container", ["hf", "gguf"])
def test_the_adapter_scores_as_the_harness_does(container: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    from edgeport.benchmark.harness import register

    folder = tiny_llama("model", vocab=300)
    edgeport.export(model=folder, output=tmp_path / "model.gguf", to="gguf", quant="f32")
    register()
    ours = get_model("edgeport")(path=str(folder if container == "hf" else tmp_path / "model.gguf"))
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32")
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS))
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-2)
    written = ours.generate_until(requests("generate_until", PROMPTS))
    assert written == theirs.generate_until(requests("generate_until", PROMPTS))
