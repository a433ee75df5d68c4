"""ONNX outputs through onnxruntime against transformers: every family, every precision, text in chunks and token by token."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import edgeport
from converters.rotary import frequencies, rotary_settings
from edgeport.errors import ConvertError, NotACheckpoint, UnknownName
from edgeport.runtime import Runner
from tests.onnx_oracle import FAMILIES, LLAMA3, SMALL, YARN, Families, error, expected, found, stored_weights, tokens

if TYPE_CHECKING:
    from tests.conftest import TinyLlama


@pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, portable: bool, families: Families, tmp_path: Path) -> None:
    folder, model = families(name)
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32", portable=portable)
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


def test_a_scaling_that_was_added_later_takes_the_place_of_all_rotary_settings(families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families("qwen3")[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    told = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN}
    (base / "config.json").write_text(json.dumps(config | told))
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2", "qwen2", "qwen3"])
def test_layer_types_count_where_transformers_reads_them(name: str, families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families(name)[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    told = {"layer_types": kinds, "sliding_window": 4, "use_sliding_window": True}
    (base / "config.json").write_text(json.dumps(config | told))
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


# options, bits, and how far from the logits of the file's own numbers: float32's rounding, but where fused products
# round activations to 8 bits
PRECISIONS: dict[str, tuple[dict[str, Any], int, float]] = {
    "fp16": ({"quant": "fp16"}, 0, 2e-6),
    "bf16": ({"quant": "bf16"}, 0, 2e-6),
    "int8": ({"quant": "int8"}, 8, 0.05),
    "int4": ({"quant": "int4"}, 4, 0.05),
    "int4, zero points": ({"quant": "int4", "asymmetric": True, "block_size": 16}, 4, 0.05),
    "int4, head in int8": ({"quant": "int4", "output_tensor_type": "int8"}, 4, 0.05),
    "int8, zero points": ({"quant": "int8", "asymmetric": True}, 8, 0.05),
    "int4, portable": ({"quant": "int4", "portable": True}, 4, 2e-6),
    "int8, portable": ({"quant": "int8", "portable": True, "block_size": 16}, 8, 2e-6),
}
QUICK = [("smollm", precision) for precision in PRECISIONS] + [(name, "int4, portable") for name in FAMILIES if name != "smollm"]
THOROUGH = [pytest.param(name, precision, marks=pytest.mark.slow)
            for name in FAMILIES for precision in PRECISIONS if (name, precision) not in QUICK]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), [*QUICK, *THOROUGH])
def test_logits_are_those_of_the_stored_numbers(name: str, precision: str, families: Families, tmp_path: Path) -> None:
    (folder, model), (options, bits, most) = families(name), PRECISIONS[precision]
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", **options)
    weights = stored_weights(tmp_path / "out", model, bits, 8 if "output_tensor_type" in options else None)
    assert error(found(tmp_path / "out"), expected(model, weights)) < most


def test_a_batch_that_is_padded_at_its_end(families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    assert error(found(tmp_path / "out", batch=2), expected(model, batch=2)) < 2e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_portable_graph_takes_padding_on_either_side(side: str, families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32", portable=True)
    text, mask = tokens(2)[:, :12], np.ones((2, 12), np.int64)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    with torch.no_grad():
        theirs = model(torch.from_numpy(text), attention_mask=torch.from_numpy(mask)).logits.numpy()
    ours = Runner(tmp_path / "out", threads=1).step(text, mask)
    assert error(ours[mask == 1], theirs[mask == 1]) < 2e-6


def test_a_fused_graph_refuses_padding_on_the_left(families: Families, tmp_path: Path) -> None:
    edgeport.export(model=families("llama")[0], output=tmp_path / "out", to="onnx", quant="fp32")
    mask = np.ones((2, 12), np.int64)
    mask[1, :4] = 0
    with pytest.raises(ConvertError, match=r"padded on the left.*--portable"):
        Runner(tmp_path / "out", threads=1).step(tokens(2)[:, :12], mask)


def test_a_fused_graph_takes_padding_at_the_end_of_the_first_piece_alone(families: Families, tmp_path: Path) -> None:
    folder, model = families("llama")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    text, mask = tokens(2)[:, :12], np.ones((2, 12), np.int64)
    mask[1, 8:] = 0
    runner = Runner(tmp_path / "out", threads=1)
    ours = runner.step(text, mask)
    with torch.no_grad():
        theirs = [model(torch.from_numpy(text[:1])).logits.numpy(), model(torch.from_numpy(text[1:, :8])).logits.numpy()]
    assert error(ours[0], theirs[0][0]) < 2e-6 and error(ours[1, :8], theirs[1][0]) < 2e-6
    # the shorter text goes on where it ended
    more = runner.step(text[:, :1])
    with torch.no_grad():
        longer = model(torch.from_numpy(np.append(text[1:, :8], text[1:, :1], axis=1))).logits.numpy()
    assert error(more[1, 0], longer[0, -1]) < 2e-6
    with pytest.raises(ConvertError, match=r"goes on after padding.*--portable"):
        runner.step(text[:, :2], np.array([[1, 1], [1, 0]]))
    runner.reset()
    with pytest.raises(ConvertError, match="goes on after padding"):
        runner.step(text[:1, :3], np.array([[1, 0, 1]]))


def test_text_goes_on_to_the_last_position(families: Families, tmp_path: Path) -> None:
    edgeport.export(model=families("llama")[0], output=tmp_path / "out", to="onnx", quant="fp32")
    runner = Runner(tmp_path / "out", threads=1)
    assert len(list(runner.generate([5] * 253, 4))) == 4  # the last is never read
    with pytest.raises(ConvertError, match="257 tokens are more than the 256"):
        list(runner.generate([5] * 253, 5))


def test_greedy_text_is_that_of_transformers(families: Families, tmp_path: Path) -> None:
    folder, model = families("gemma2")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    prompt = tokens()[0, :9].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    runner = Runner(tmp_path / "out", threads=1)
    ours = list(runner.generate(prompt, 12))
    assert ours == theirs[0, 9:].tolist()
    assert list(runner.generate(prompt, 12, stop=[ours[3]])) == ours[: ours.index(ours[3]) + 1]


def test_rotary_frequencies_are_those_of_transformers() -> None:
    for rope in (LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0},
                 YARN | {"truncate": False, "attention_factor": 1.3, "beta_fast": 16.0}):  # fmt: skip
        config = AutoConfig.for_model("llama", **SMALL, rope_parameters={**rope, "rope_theta": 5e5})
        theirs, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
        ours, factor = frequencies(rotary_settings(config.to_dict()), 16, 256)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=3e-7)
        assert factor == pytest.approx(scale)


@pytest.mark.parametrize("outer", [None, 32])
@pytest.mark.parametrize("inner", [None, 64])
@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_the_context_that_scaled_angles_were_made_for(rope: dict[str, Any], inner: int | None, outer: int | None) -> None:
    name = "original_max_position_embeddings"
    inside = {key: value for key, value in rope.items() if key != name}
    if inner and name in rope:
        inside[name] = inner
    told: dict[str, Any] = {**SMALL, "rope_theta": 5e5, "rope_scaling": inside, **({name: outer} if outer else {})}
    model = LlamaForCausalLM(AutoConfig.for_model("llama", **deepcopy(told)))
    ours, _ = frequencies(rotary_settings(told), 16, 256)
    np.testing.assert_allclose(ours, model.model.rotary_emb.inv_freq.numpy(), rtol=3e-7)


# options, bits, and what half-precision activations may do to the logits of the file's own numbers
ON_CUDA: dict[str, tuple[dict[str, Any], int, float]] = {
    "fp16": ({"quant": "fp16"}, 0, 1e-2),
    "bf16": ({"quant": "bf16"}, 0, 5e-2),
    "int8": ({"quant": "int8"}, 8, 1e-2),
    "int4": ({"quant": "int4"}, 4, 1e-2),
    # in blocks of 16, since SmolLM's rows would be an odd number of others
    "int4, zero points": ({"quant": "int4", "asymmetric": True, "block_size": 16}, 4, 1e-2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ON_CUDA)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_on_cuda(name: str, precision: str, families: Families, tmp_path: Path) -> None:
    (folder, model), (options, bits, most) = families(name), ON_CUDA[precision]
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", execution_provider="cuda", **options)
    weights = stored_weights(tmp_path / "out", model, bits)
    assert error(found(tmp_path / "out", provider="cuda"), expected(model, weights)) < most


@pytest.mark.gpu
def test_a_batch_and_greedy_text_on_cuda(families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp16", execution_provider="cuda")
    assert error(found(tmp_path / "out", batch=2, provider="cuda"), expected(model, batch=2)) < 1e-2
    runner = Runner(tmp_path / "out", provider="cuda")
    prompt = tokens()[0, :9].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(runner.generate(prompt, 6)) == theirs[0, 9:].tolist()


def test_the_runner_names_mistakes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="a folder written with --to onnx was expected"):
        Runner(tiny_llama())
    edgeport.export(model=tmp_path / "base", output=tmp_path / "out", to="onnx", quant="fp32")
    with pytest.raises(UnknownName, match="no execution provider is called 'tpu'"):
        Runner(tmp_path / "out", provider="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ConvertError, match=r"no CUDAExecutionProvider.*onnx-gpu"):
            Runner(tmp_path / "out", provider="cuda")
    with pytest.raises(ConvertError, match="130 tokens are more than the 128"):
        Runner(tmp_path / "out").step([[5] * 130])
    (tmp_path / "out" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ConvertError, match=r"onnxruntime cannot load model\.onnx"):
        Runner(tmp_path / "out")
