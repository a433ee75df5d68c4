"""The demo asks as transformers would answer; `make demo` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgeport
from bench.spoiling import run
from edgeport.demo import triage
from edgeport.demo.ask import SEQUENCES, ask, ask_onnx
from tests.conftest import TinyLlama


@pytest.fixture
def asked() -> list[triage.Question]:
    """Of different lengths, more than one batch of either program; the options' order turns."""
    options = tuple(f" {letter}" for letter in "abcdefgh")
    return [
        triage.Question(f"Diagnosis: {'the patch of ' * (number % 7)}{number}\nDepartment:", options[turn:] + options[:turn], 0)
        for number in range(SEQUENCES + 9) for turn in [number % 8]
    ]  # fmt: skip


def test_answers_are_those_of_transformers(asked: list[triage.Question], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    expected = []
    for question in asked:
        with torch.no_grad():
            logits = model(tokenizer(question.prompt, return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1]
        firsts = [tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in question.options]
        expected.append(int(logits[firsts].argmax()))
    assert len(set(expected)) > 4
    assert ask(edgeport.export(model=base, output=tmp_path / "out.gguf", quant="f32").output, asked) == expected
    assert ask_onnx(edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32").output, asked) == expected


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    answer = run(["demo", "-o", str(tmp_path), "--no-progress"])
    assert answer.code == 1 and "is not empty; give another -o or --overwrite" in answer.error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
