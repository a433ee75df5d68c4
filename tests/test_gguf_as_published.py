"""GGUF files as others write them: settings spelled otherwise than the converter's own, beside llama.cpp's logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import edgeport
from bench.spoiling import run
from edgeport.errors import ConvertError, CorruptCheckpoint, SourceError, UnsupportedArchitecture
from edgeport.locate import open_model
from tests.conftest import TinyLlama
from tests.test_adapter import WORDS, apart, llama_logits

Rewritten = Callable[..., Path]
FLOAT, INTEGER = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32
TEXT, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


@pytest.fixture
def rewritten(tiny_llama: TinyLlama, tmp_path: Path) -> Rewritten:
    """A function that writes a float32 GGUF with further keys (value, type, element type) and tensors, and without others."""

    def write(keys: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None, without: str = " ") -> Path:
        keys = keys or {}
        plain = edgeport.export(model=tiny_llama(), output=tmp_path / "plain.gguf", to="gguf", overwrite=True).output
        reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(tmp_path / "found.gguf", "llama")
        for name, field in reader.fields.items():
            if not name.startswith(("GGUF.", "general.architecture", without)) and name not in keys:
                element = field.types[-1] if field.types[0] == ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], element)
        for name, told in keys.items():
            writer.add_key_value(name, *told)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        for name, values in (tensors or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "found.gguf"

    return write


def folder_logits(model: Path, folder: Path) -> torch.Tensor:
    edgeport.export(model=model, output=folder, to="hf", quant="f32")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(WORDS).logits[0]


def bias(rows: int) -> np.ndarray:
    return np.linspace(-1, 1, rows, dtype=np.float32)


@pytest.mark.parametrize(
    "how",
    ["a factor without a type", "the name of 2023", "betas of yarn", "a bias of the output alone",
     "settings that change nothing", "one count a layer"],
)
def test_what_llama_cpp_computes_is_what_the_folder_says(how: str, rewritten: Rewritten, tmp_path: Path) -> None:
    keys, tensors = {
        "a factor without a type": ({"llama.rope.scaling.factor": (4.0, FLOAT)}, {}),
        "the name of 2023": ({"llama.rope.scale_linear": (4.0, FLOAT)}, {}),
        "betas of yarn": ({
            "llama.rope.scaling.type": ("yarn", TEXT), "llama.rope.scaling.factor": (4.0, FLOAT),
            "llama.rope.scaling.original_context_length": (32, INTEGER), "llama.rope.scaling.yarn_beta_fast": (8.0, FLOAT),
            "llama.rope.scaling.yarn_beta_slow": (3.0, FLOAT)}, {}),
        "a bias of the output alone": ({}, {f"blk.{layer}.attn_output.bias": bias(64) for layer in range(2)}),
        "settings that change nothing": (
            {"llama.rope.scaling.attn_factor": (1.0, FLOAT), "llama.labels": (["yes", "no"], ARRAY, TEXT)}, {}),
        "one count a layer": ({"llama.attention.head_count_kv": ([2, 2], ARRAY, INTEGER)}, {}),
    }[how]
    found = rewritten(keys, tensors)
    assert apart(folder_logits(found, tmp_path / "out"), llama_logits(found)) < 1e-3


@pytest.mark.parametrize(("keys", "message"), [
    ({"llama.rope.scaling.attn_factor": (1.5, FLOAT)}, r"rope\.scaling\.attn_factor"),
    ({"llama.rope.dimension_count": (8, INTEGER)}, "dimension_count"),
    ({"llama.attention.head_count_kv": ([2, 1], ARRAY, INTEGER)}, "differs from layer to layer"),
])  # fmt: skip
def test_what_a_folder_cannot_say_is_refused(keys: dict[str, Any], message: str, rewritten: Rewritten) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        _ = open_model(rewritten(keys)).weights


@pytest.mark.parametrize(("keys", "message"), [
    ({"llama.feed_forward_length": (999, INTEGER)}, r"down_proj.*has shape \[64, 128\] where the metadata says \[64, 999\]"),
    ({"llama.attention.head_count_kv": (4, INTEGER)}, r"k_proj.*has shape \[32, 64\] where the metadata says \[64, 64\]"),
    ({"llama.block_count": (3, INTEGER)}, r"no tensor model\.layers\.2\..*, which the metadata calls for"),
])  # fmt: skip
def test_settings_that_are_not_of_these_tensors(keys: dict[str, Any], message: str, rewritten: Rewritten) -> None:
    with pytest.raises(SourceError, match=message):
        _ = open_model(rewritten(keys)).weights


@pytest.mark.parametrize(("keys", "ends"), [
    ({"eot": 5}, [2, 5]), ({"eot": 5, "eom": 6}, [2, 5, 6]), ({"eot": 2, "eom": 7}, [2, 7]), ({"eot": 2}, 2), ({}, 2),
])  # fmt: skip
def test_generation_stops_where_llama_cpp_stops(keys: dict[str, int], ends: Any, rewritten: Rewritten, tmp_path: Path) -> None:
    found = rewritten({f"tokenizer.ggml.{name}_token_id": (token, INTEGER) for name, token in keys.items()})
    llm = llama_cpp.Llama(str(found), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    stops = [token for token in range(320) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    llm.close()
    assert stops == (ends if isinstance(ends, list) else [ends])
    folder, graph = (edgeport.export(model=found, output=tmp_path / to, to=to).output for to in ("hf", "onnx"))
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == ends
    assert json.loads((graph / "genai_config.json").read_text())["model"]["eos_token_id"] == ends


COUNT, HEADS = "llama.block_count", "llama.attention.head_count"
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({HEADS: (0, INTEGER)}, "num_attention_heads 0"),
    "no heads in any layer": ({HEADS: ([0, 0], ARRAY, INTEGER)}, "num_attention_heads 0"),
    "no heads, and no size of them": ({HEADS: (0, INTEGER), "llama.attention.key_length": ("a", TEXT)}, "TypeError"),
    "heads of another number": ({HEADS: (3, INTEGER)}, "3 of queries and 2 of keys"),
    "heads of keys that divide nothing": ({f"{HEADS}_kv": (3, INTEGER)}, "4 of queries and 3 of keys"),
    "no heads of keys": ({f"{HEADS}_kv": (0, INTEGER)}, "num_key_value_heads 0"),
    "layers as a text": ({COUNT: ("two", TEXT)}, "TypeError"),
    "layers as a list of texts": ({COUNT: (["2", "2"], ARRAY, TEXT)}, "TypeError"),
    "layers without end": ({COUNT: (4_000_000_000, INTEGER)}, "no tensor model.layers.2."),
    "a width of half a number": ({"llama.embedding_length": (64.5, FLOAT)}, "TypeError"),
    "a base of angles as a text": ({"llama.rope.freq_base": ("10000", TEXT)}, "'10000' where a number was expected"),
    "a base of angles that is none": ({"llama.rope.freq_base": (0.0, FLOAT)}, "a positive number was expected"),
    "a scaling as a text": ({"llama.rope.scaling.factor": ("4", TEXT)}, "'4' where a number was expected"),
    "an epsilon that is none": ({"llama.attention.layer_norm_rms_epsilon": (float("nan"), FLOAT)}, "rms_norm_eps nan"),
    "a token's number as a text": ({"tokenizer.ggml.eos_token_id": ("</s>", TEXT)}, "TypeError"),
}
SPOILT_TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "a template as a number": ({"tokenizer.chat_template": (7, INTEGER)}, "a text was expected"),
    "templates as a number": ({"tokenizer.chat_templates": (7, INTEGER)}, "TypeError"),
    "templates named by numbers": ({"tokenizer.chat_templates": ([7], ARRAY, INTEGER)}, "TypeError"),
    "few types": ({"tokenizer.ggml.token_type": ([1, 1], ARRAY, INTEGER)}, "a list of 2, and there are 320 tokens"),
    "types as texts": ({"tokenizer.ggml.token_type": (["a"] * 320, ARRAY, TEXT)}, "should be a list of numbers"),
    "merges as numbers": ({"tokenizer.ggml.merges": ([1, 2], ARRAY, INTEGER)}, "should be a list of strings"),
    "merges of one": ({"tokenizer.ggml.merges": (["ab"], ARRAY, TEXT)}, "'ab', which is no pair"),
    "pieces without scores": ({"tokenizer.ggml.model": ("llama", TEXT)}, "scores of the GGUF should be a list"),
    "few scores": ({"tokenizer.ggml.model": ("llama", TEXT), "tokenizer.ggml.scores": ([0.5], ARRAY, FLOAT)}, "a list of 1"),
    "tokens as numbers": ({"tokenizer.ggml.tokens": ([*range(320)], ARRAY, INTEGER)}, "should be a list of strings"),
    "tokens as a text": ({"tokenizer.ggml.tokens": ("abc", TEXT)}, "should be a list of strings"),
    "a flag as a text": ({"tokenizer.ggml.add_bos_token": ("false", TEXT)}, "true or false was expected"),
    "a pre-tokenizer as a list": ({"tokenizer.ggml.pre": (["gpt-2"], ARRAY, TEXT)}, "no table here"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SPOILT, *SPOILT_TOKENIZERS])
def test_metadata_of_another_kind_is_answered_in_one_sentence(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    keys, says = (SPOILT | SPOILT_TOKENIZERS)[name]
    found = rewritten(keys)
    for argv in (["export", str(found), "-o", str(tmp_path / "out"), "--to", "hf"], ["inspect", str(found)]):
        answer = run(argv)
        if argv[0] == "export" or name in SPOILT:
            assert answer.code == 1 and answer.error.count("\n") == 1 and says in answer.error, answer.error
            assert ("Error" in answer.error) == ("found.gguf holds metadata of another kind" in answer.error)
        else:
            assert answer.code == 0
    assert not (tmp_path / "out").exists()


def test_several_chat_templates(rewritten: Rewritten, tmp_path: Path) -> None:
    keys = {"tokenizer.chat_templates": (["rag"], ARRAY, TEXT), "tokenizer.chat_template.rag": ("other", TEXT)}
    out = edgeport.export(model=rewritten(keys), output=tmp_path / "out", to="hf").output
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "other"
    back = edgeport.export(model=out, output=tmp_path / "back.gguf", to="gguf").output
    assert gguf.GGUFReader(back).fields["tokenizer.chat_template.rag"].contents() == "other"


@pytest.mark.parametrize("name", ["../../../escaped/a", "{}/escaped/a", "..", ".", "", "a b", "absent"])
def test_a_template_is_written_nowhere_but_into_the_output(name: str, rewritten: Rewritten, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    keys: dict[str, Any] = {"tokenizer.chat_templates": (["ok", name], ARRAY, TEXT), "tokenizer.chat_template.ok": ("x", TEXT)}
    found = rewritten(keys | ({f"tokenizer.chat_template.{name}": ("evil", TEXT)} if name != "absent" else {}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptCheckpoint, match=re.escape(f"names the template {name!r}, ")):
        edgeport.plan(new_base=found, output=tmp_path / "out", to="hf")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_that_no_folder_holds_is_refused_at_once(rewritten: Rewritten, tmp_path: Path) -> None:
    found = rewritten(without="tokenizer.")
    with pytest.raises(ConvertError, match="holds no tokenizer"):
        edgeport.plan(new_base=found, output=tmp_path / "out", to="hf")


def test_another_quantization_does_not_boast_of_the_matrix(rewritten: Rewritten, tmp_path: Path) -> None:
    key = "quantize.imatrix.file"
    found = rewritten({key: ("wiki.imatrix", TEXT)})
    kept = edgeport.export(model=found, output=tmp_path / "kept.gguf", to="gguf").output
    other = edgeport.export(model=found, output=tmp_path / "other.gguf", to="gguf", quant="Q8_0").output
    assert key in gguf.GGUFReader(kept).fields and key not in gguf.GGUFReader(other).fields


WITHIN = """
import json, sys
import edgeport
receipt = edgeport.export(model=sys.argv[1], output=sys.argv[2], to="hf")
print(json.dumps([receipt.peak_above_import_bytes, receipt.predicted_peak_bytes]))
"""


def test_a_large_vocabulary_is_told_within_the_plan(tmp_path: Path) -> None:
    """In a process of its own: 122,850 tokens and nearly as many merges, which as objects are larger than the model."""
    letters = [chr(0x4E00 + place) for place in range(350)]
    merges = [f"{first} {second}" for first in letters for second in letters]
    tokens = [*letters, *(line.replace(" ", "") for line in merges)]
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    square = [f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    norms = ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]
    shapes = {"token_embd.weight": (len(tokens), 32)} | dict.fromkeys(square, (32, 32)) | dict.fromkeys(norms, (32,))
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    argv = [sys.executable, "-c", WITHIN, str(tmp_path / "large.gguf"), str(tmp_path / "out")]
    above, predicted = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert 0 < above <= predicted
    model = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert len(model["vocab"]) == len(tokens) and model["merges"][:2] == [[letters[0], letters[0]], [letters[0], letters[1]]]
