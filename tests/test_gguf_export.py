"""The oracles are llama.cpp, which runs our files, transformers, which says what they should compute, and gguf-py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import edgeport
from edgeport.blocks import decode_rows
from edgeport.demo import packaged_model
from edgeport.errors import ConvertError, EdgeportError, OutputExists, TargetMissing, UnmappedTensor
from edgeport.locate import open_model
from tests.conftest import TinyLlama, save_tokenizer
from tests.test_adapter import save_patch
from tests.test_gguf_imatrix import modern

LENGTH = 60
VOCABULARY = 320
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama", "tie_word_embeddings": False},
    "Llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 32},
    "Llama 3, short": {"model_type": "llama", "rope_theta": 5e5, "head_dim": 32,
                       "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "Mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "Gemma 2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    "Qwen 2": {"model_type": "qwen2"},
    "Qwen 3": {"model_type": "qwen3", "head_dim": 32},
    "SmolLM": {"model_type": "llama", "tie_word_embeddings": True},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, hidden: int = 64) -> Path:
        settings = dict(FAMILIES[family])
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            settings.pop("model_type"), vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=None, **settings,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = noise * 1.2 / hidden**0.5 if parameter.ndim > 1 else parameter.data + noise * 0.2
        model.save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model", VOCABULARY)
        return tmp_path / "model"

    return make


def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, VOCABULARY, LENGTH)]


def llama_logits(path: Path) -> np.ndarray[Any, Any]:
    llm = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0)
    llm.eval(tokens())
    scores = np.array(llm.scores[:LENGTH])
    llm.close()
    return scores


def transformers_logits(path: Path) -> np.ndarray[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens()])).logits[0].numpy()  # type: ignore[no-any-return]


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family: str, make: Callable[..., Path], tmp_path: Path) -> None:
    base = make(family)
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", quant="f32")
    expected = transformers_logits(base)
    found = llama_logits(tmp_path / "out.gguf")
    # llama.cpp keeps its attention cache in f16
    assert relative(found, expected) < 2e-3
    assert float((found.argmax(1) == expected.argmax(1)).mean()) >= 0.95


def test_a_scaling_that_was_added_later(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make("Qwen 2")
    config = json.loads((base / "config.json").read_text())
    told = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}}
    (base / "config.json").write_text(json.dumps(config | told))
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", quant="f32")
    assert "rope_parameters" in config and relative(llama_logits(tmp_path / "out.gguf"), transformers_logits(base)) < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_back_from_gguf_to_a_folder(family: str, make: Callable[..., Path], tmp_path: Path) -> None:
    base = make(family)
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", quant="f32")
    edgeport.export(model=tmp_path / "out.gguf", output=tmp_path / "back", to="hf", quant="f32")
    assert relative(transformers_logits(tmp_path / "back"), transformers_logits(base)) < 1e-5


QUANTS = ["Q8_0", "Q4_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q5_K_M", "Q2_K", "IQ4_NL", "IQ4_XS", "f16", "bf16"]


@pytest.mark.parametrize("quant", QUANTS)
def test_llama_cpp_reads_the_numbers_that_were_written(quant: str, make: Callable[..., Path], tmp_path: Path) -> None:
    edgeport.export(model=make("Llama 2", hidden=256), output=tmp_path / "out.gguf", to="gguf", quant=quant)
    edgeport.export(model=tmp_path / "out.gguf", output=tmp_path / "decoded", to="hf", quant="f32")
    # llama.cpp rounds activations to 8 bits for its integer kernels
    assert relative(llama_logits(tmp_path / "out.gguf"), transformers_logits(tmp_path / "decoded")) < 0.06
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.name for tensor in reader.tensors} >= {"token_embd.weight", "blk.2.ffn_down.weight", "output.weight"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers:UserWarning")
def test_port_to_gguf_is_the_folder_port_in_another_container(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    options = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "patch")
    edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out", to="hf")
    edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out.gguf", to="gguf")
    assert relative(llama_logits(tmp_path / "out.gguf"), transformers_logits(tmp_path / "out")) < 2e-3
    folder, file = open_model(tmp_path / "out"), open_model(tmp_path / "out.gguf")
    assert folder.weights.keys() == file.weights.keys() and "lm_head.weight" in file.weights


def test_split_files_load_and_are_read_back(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make("Qwen 3")
    receipt = edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf", max_shard_size="150KB")
    names = sorted(receipt.files)
    assert len(names) > 2 and names[0] == f"out-00001-of-{len(names):05}.gguf"
    assert relative(llama_logits(tmp_path / names[0]), transformers_logits(base)) < 2e-3
    edgeport.verify(tmp_path / "out.gguf")
    edgeport.export(model=tmp_path / names[0], output=tmp_path / "whole.gguf", to="gguf")
    edgeport.export(model=base, output=tmp_path / "direct.gguf", to="gguf")
    whole, direct = (gguf.GGUFReader(tmp_path / name) for name in ("whole.gguf", "direct.gguf"))
    for one, other in zip(whole.tensors, direct.tensors, strict=True):
        assert one.name == other.name and np.array_equal(one.data, other.data)


def test_no_file_of_a_set_is_larger_than_asked(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make("Llama 3")
    for limit in range(100_000, 400_000, 20_000):
        files = edgeport.plan(new_base=base, output=tmp_path / "out.gguf", to="gguf", max_shard_size=limit).files
        assert len(files) > 1 and max(file.size for file in files) <= limit
        # a file could not have taken the next tensor, of 82 kB at most
        assert min(file.size for file in files[:-1]) > limit - 85_000
    small = edgeport.plan(new_base=base, output=tmp_path / "out.gguf", to="gguf", max_shard_size=1000).files
    assert all(len(file.ranges) <= 1 for file in small)


def test_a_set_goes_by_the_name_it_was_given(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch")
    job: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out.gguf", "to": "gguf", "quant": "f32"}
    edgeport.port(**job, max_shard_size="90KB", sidecar=True)
    files = {path.name for path in tmp_path.glob("out*")}
    assert len(files) > 4 and {"out.lora.gguf", "out.gguf.edgeport.json"} <= files and "out.gguf" not in files
    first = tmp_path / min(files)
    assert edgeport.verify(first) == edgeport.verify(tmp_path / "out.gguf")
    assert edgeport.inspect(first)["made_by"] == edgeport.inspect(tmp_path / "out.gguf")["made_by"]
    with pytest.raises(TargetMissing, match=r"has an adapter beside it that is part of it; .* --patch .*out\.lora\.gguf"):
        edgeport.plan(new_base=first, output=tmp_path / "next")
    merged = edgeport.port(patch=patch, new_base=base, output=tmp_path / "merged").output
    assert edgeport.compare(tmp_path / "out.gguf", merged, tokens=32).mean_kl < 1e-6
    # what replaces it leaves no file of it, and no file of others is replaced
    edgeport.port(**job, overwrite=True)
    assert {path.name for path in tmp_path.glob("out*")} == {"out.gguf", "out.gguf.edgeport.json"}
    first.write_bytes(b"mine")
    with pytest.raises(OutputExists, match="is a file that edgeport did not write; it is not overwritten"):
        edgeport.plan(**job, max_shard_size="90KB", sidecar=True, overwrite=True)


def test_an_untouched_gguf_is_byte_equal(tmp_path: Path) -> None:
    edgeport.export(model=packaged_model(), output=tmp_path / "same.gguf", to="gguf")
    assert (tmp_path / "same.gguf").read_bytes() == packaged_model().read_bytes()


def test_a_matrix_that_nothing_reads_is_said_to_be_idle(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, name = tiny_llama(), "blk.0.attn_q.weight"
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"])
    quantized = edgeport.export(model=base, output=tmp_path / "base.gguf", quant="Q4_0").output
    tensors = {f"{name}.in_sum2": np.ones((1, 64), np.float32), f"{name}.counts": np.ones((1, 1), np.float32)}
    given: dict[str, Any] = {"to": "gguf", "output": tmp_path / "out.gguf", "imatrix": modern(tmp_path / "i.gguf", tensors)}
    on_grid: dict[str, Any] = {**given, "patch": patch, "new_base": quantized, "rounding": "stochastic"}
    for job in (on_grid, {**given, "new_base": quantized}, {**given, "new_base": base, "quant": "bf16"}):
        assert "nothing reads --imatrix" in edgeport.plan(**job).notes[-1]
    for job in ({**on_grid, "residual": 2}, {**on_grid, "rounding": "nearest"}, {**given, "new_base": base, "quant": "Q4_0"}):
        assert not any("--imatrix" in note for note in edgeport.plan(**job).notes)


def test_tensor_type_overrides(make: Callable[..., Path], tmp_path: Path) -> None:
    edgeport.export(
        model=make("Llama 2"), output=tmp_path / "out.gguf", to="gguf", quant="Q8_0",
        tensor_type=[("ffn_up", "Q5_1")], output_tensor_type="f16", token_embedding_type="bf16",
    )  # fmt: skip
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.1.ffn_up.weight"] == "Q5_1" and types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["output.weight"] == "F16" and types["token_embd.weight"] == "BF16"


def test_an_importance_matrix_lowers_the_error_where_it_is_large(make: Callable[..., Path], tmp_path: Path) -> None:
    base, name = make("Llama 2", hidden=256), "model.layers.1.mlp.up_proj.weight"
    importance = np.ones(256, dtype=np.float32)
    importance[:16] = 1e4
    sums, counts = "blk.1.ffn_up.weight.in_sum2", {"blk.1.ffn_up.weight.counts": np.ones((1, 1), dtype=np.float32)}
    matrix = modern(tmp_path / "i.gguf", {sums: importance[None], **counts})
    errors = {}
    for given in (None, matrix):
        edgeport.export(model=base, output=tmp_path / "o.gguf", to="gguf", quant="Q4_K_S", imatrix=given, overwrite=bool(given))
        exact, stored = (open_model(path) for path in (base, tmp_path / "o.gguf"))
        rows = range(exact.weights[name].rows)
        error = decode_rows(stored, stored.weights[name], rows) - decode_rows(exact, exact.weights[name], rows)
        errors[given] = float(error[:, :16].square().mean())
    # half of the columns that share a scale are important
    assert errors[matrix] < 0.85 * errors[None]
    other = modern(tmp_path / "other.gguf", {sums: importance[None, :64], **counts})
    with pytest.raises(ConvertError, match="it is of another model"):
        edgeport.plan(new_base=base, output=tmp_path / "p.gguf", to="gguf", quant="Q4_K_S", imatrix=other)


def test_a_tensor_without_a_name_in_gguf_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make("Llama 2")
    state = load_file(base / "model.safetensors")
    save_file({**state, "model.layers.0.extra.weight": torch.zeros(2, 2)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnmappedTensor, match=r"model\.layers\.0\.extra\.weight"):
        edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({"intermediate_size": 999}, "", "down_proj.weight: it has shape [64, 128] where config.json says [64, 999]"),
        ({"num_key_value_heads": 4}, "", "k_proj.weight: it has shape [32, 64] where config.json says [64, 64]"),
        ({"num_key_value_heads": None}, "", "k_proj.weight: it has shape [32, 64] where config.json says [64, 64]"),
        ({"num_key_value_heads": 3}, "", "4 of queries and 3 of keys, of which no model can be made"),
        ({"num_attention_heads": 0}, "", "num_attention_heads 0"),
        ({"head_dim": 32}, "", "k_proj.weight: it has shape [32, 64] where config.json says [64, 64]"),
        ({"hidden_size": 128, "head_dim": 32}, "", "it has shape [320, 64] where config.json says [320, 128]"),
        ({"num_hidden_layers": 3}, "", "no tensor model.layers.2."),
        ({}, "model.norm.weight", "no tensor model.norm.weight, which config.json calls for"),
        ({}, "model.layers.1.self_attn.q_proj.weight", "no tensor model.layers.1.self_attn.q_proj.weight"),
        ({}, "model.embed_tokens.weight", "no tensor model.embed_tokens.weight"),
        ({}, "lm_head.weight", "no tensor lm_head.weight"),
    ],
)
def test_a_config_that_is_not_of_these_tensors(
    changes: dict[str, Any], without: str, message: str, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    base = tiny_llama(head_dim=None)
    config = json.loads((base / "config.json").read_text()) | {"head_dim": None}
    (base / "config.json").write_text(json.dumps(config | changes))
    state = {name: values for name, values in load_file(base / "model.safetensors").items() if name != without}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(EdgeportError, match=re.escape(message)):
        edgeport.plan(new_base=base, output=tmp_path / "out.gguf", to="gguf")


def test_chat_template_survives(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf")
    llm = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    assert llm.metadata["tokenizer.chat_template"] == template
    llm.close()


@pytest.mark.parametrize(("types", "expected"), [
    ((torch.float16, torch.float16), "F16"), ((torch.bfloat16, torch.bfloat16), "BF16"),
    ((torch.float16, torch.bfloat16), "F32"), ((torch.float64, torch.bfloat16), "F32"), ((torch.float64, torch.float64), "F32"),
])  # fmt: skip
def test_without_quant_a_type_that_holds_all_weights(
    types: tuple[torch.dtype, torch.dtype], expected: str, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    base, name = tiny_llama(), "model.layers.0.self_attn.v_proj.weight"
    state = {key: value.to(types[key == name]) for key, value in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    edgeport.export(model=base, output=tmp_path / "out.gguf", to="gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert stored["blk.0.attn_v.weight"].tensor_type.name == expected
    if expected == "F32" and torch.bfloat16 in types:
        assert np.array_equal(stored["blk.0.attn_v.weight"].data, state[name].float().numpy())


def test_a_window_that_llama_cpp_has_not_is_told(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    plain = json.loads((base / "config.json").read_text())
    mistral = plain | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 8192}
    unsaid = {key: value for key, value in mistral.items() if key != "max_position_embeddings"}
    for config, window in (
        (plain | {"sliding_window": 16}, None), (mistral, 4096), (mistral | {"sliding_window": None}, None),
        (mistral | {"sliding_window": 16}, 16), (unsaid | {"sliding_window": 16}, 16),
    ):  # fmt: skip
        (base / "config.json").write_text(json.dumps(config))
        notes = edgeport.plan(new_base=base, output=tmp_path / "out.gguf", to="gguf").notes
        assert [note for note in notes if "sliding window" in note] == [
            f"llama.cpp has no sliding window for llama: it attends to more than the last {window} tokens too"
        ] * (window is not None)
