"""Family tables against transformers' own models and configs, and against the converter's Llama 3 formula."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from converters.gguf.families import (
    FAMILIES,
    ROPE_FREQS,
    Family,
    family,
    family_of,
    llama3_scaling,
)
from converters.rotary import llama3_factors
from edgeport.errors import ConvertError, UnmappedTensor, UnsupportedArchitecture

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 16},
    "llama linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2 yarn": {"model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
}


def hf_config(name: str, **changes: Any) -> Any:
    settings = deepcopy({**SMALL, **CONFIGS[name], **changes})  # transformers writes into what it is given
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def as_json(name: str, **changes: Any) -> dict[str, Any]:
    """config.json as transformers 5 saves it."""
    config = hf_config(name, **changes).to_dict()
    config["architectures"] = [cls for entry in FAMILIES if config["model_type"] in entry.model_types for cls in entry.classes]
    return config


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as a reader of the file sees it: floats have gone through float32."""
    return {
        name: float(np.float32(value)) if kind.name == "FLOAT32" else value for name, (kind, value) in metadata.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_the_way_to_gguf_and_back(name: str) -> None:
    config = as_json(name)
    table = family(config)
    freqs = table.constants(config).get(ROPE_FREQS)
    back = table.config(plain(table.metadata(config)), freqs)
    back |= table.biases(names_of(table, name))
    again = AutoConfig.for_model(**back).to_dict()
    before = hf_config(name).to_dict()
    # A GGUF of "llama" is read as a Llama model, which computes what a Mistral without window does.
    ignored = {"bos_token_id", "eos_token_id", "architectures", *(("model_type", "sliding_window") if name == "mistral" else ())}
    assert {key: again.get(key) for key in before if key not in ignored} == {
        key: value for key, value in before.items() if key not in ignored
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_back_and_forth_gives_the_same_logits(name: str) -> None:
    config = as_json(name, num_hidden_layers=2)
    table = family(config)
    back = table.config(plain(table.metadata(config)), table.constants(config).get(ROPE_FREQS))
    back |= table.biases(names_of(table, name)) | {"tie_word_embeddings": config["tie_word_embeddings"]}
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(hf_config(name, num_hidden_layers=2)).eval()
    two = AutoModelForCausalLM.from_config(AutoConfig.for_model(**back)).eval()
    two.load_state_dict(one.state_dict())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def names_of(table: Family, name: str) -> set[str]:
    config = hf_config(name)
    return {table.tensor(hf, config.to_dict())[0] for hf in state_dict(name) if hf != "lm_head.weight"}


def state_dict(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(hf_config(name)).state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_the_model_has_a_name_and_an_arrangement(name: str) -> None:
    config = as_json(name)
    table = family(config)
    tensors = state_dict(name)
    if table.arch == "gemma2":
        del tensors["lm_head.weight"]
    mapped = {hf: table.tensor(hf, config) for hf in tensors}
    assert len({gguf for gguf, _ in mapped.values()}) == len(mapped)
    for hf, (gguf, arrangement) in mapped.items():
        assert table.hf_name(gguf) == hf
        heads = 0
        if table.arch == "llama" and re.search(r"[qk]_proj\.", hf):
            heads = 4 if "q_proj" in hf else 2
        assert arrangement.heads == heads
        assert arrangement.shift == float(table.arch == "gemma2" and hf.endswith("norm.weight"))
    assert mapped["model.layers.11.mlp.down_proj.weight"][0] == "blk.11.ffn_down.weight"
    assert mapped["model.embed_tokens.weight"][0] == "token_embd.weight"


def test_transformers_4_and_5_say_the_same() -> None:
    new = as_json("llama 3")
    old = {**new, "rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": LLAMA3}
    del old["rope_parameters"]
    table = family(new)
    assert table.metadata(old) == table.metadata(new)
    assert np.array_equal(table.constants(old)[ROPE_FREQS], table.constants(new)[ROPE_FREQS])


def test_metadata_is_what_the_converter_writes() -> None:
    metadata = plain(family(as_json("llama 3")).metadata(as_json("llama 3")))
    assert metadata == {
        "general.architecture": "llama",
        "llama.block_count": 12,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.vocab_size": 48,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500000.0,
    }


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_the_converters_to_the_bit(head_dim: int, factor: float) -> None:
    freqs = 1.0 / (500000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    expected = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        smooth = (8192 / wavelength - 1.0) / 3.0
        between = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else float(between))
    factors = llama3_factors({**LLAMA3, "factor": factor, "rope_theta": 500000.0}, head_dim)
    assert np.array_equal(factors, np.array(expected, np.float32))
    assert llama3_scaling(factors, head_dim, 500000.0) == {**LLAMA3, "factor": factor}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("context", [64, 4096, 8192, 32768])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_the_original_context_is_solved_for(theta: float, context: int, head_dim: int) -> None:
    rope = {**LLAMA3, "factor": 2.5, "original_max_position_embeddings": context}
    factors = llama3_factors({**rope, "rope_theta": theta}, head_dim)
    assert llama3_scaling(factors, head_dim, theta) == rope


def test_unknown_factors_are_refused() -> None:
    with pytest.raises(UnmappedTensor, match="formula"):
        llama3_scaling(np.linspace(1, 8, 32, dtype=np.float32), 64, 500000.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("qwen3", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4, "layer_types": None}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 12}, "use_sliding_window"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 6}, "use_sliding_window"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
        ("gemma2", {"layer_types": ["full_attention"] * 12}, "layer_types"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "attention_factor"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast or beta_slow"),
        ("qwen2", {"rope_parameters": {**YARN, "beta_slow": 2}}, "beta_fast or beta_slow"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "each kind of layer"),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = as_json(name) | changes
    with pytest.raises(UnsupportedArchitecture, match=message):
        family(config).metadata(config)


@pytest.mark.parametrize(("name", "rope"), [
    ("llama", {"rope_type": "default", "rope_theta": math.nan}),
    ("qwen2", {"rope_type": "default", "rope_theta": -1e4}),
    ("llama", {"rope_type": "linear", "factor": 0.0}),
    ("gemma2", {"rope_type": "linear", "factor": -2.0}),
    ("llama", {**LLAMA3, "factor": 0.0}),
    ("qwen2", {**YARN, "factor": math.inf}),
])  # fmt: skip
def test_rotary_settings_of_which_no_angles_can_be_made(name: str, rope: dict[str, Any]) -> None:
    config = as_json(name) | {"rope_parameters": rope}
    with pytest.raises(ConvertError, match="no angles can be made"):
        family(config).metadata(config)


@pytest.mark.parametrize(("name", "tensor"), [
    ("llama", "model.layers.0.self_attn.q_proj"), ("llama", "model.layers.1.mlp.up_proj"), ("qwen3", "lm_head"),
    ("qwen2", "model.layers.0.self_attn.o_proj"), ("qwen2", "model.norm"), ("mistral", "model.layers.0.input_layernorm"),
])  # fmt: skip
def test_biases_that_config_json_does_not_call_for_are_refused(name: str, tensor: str) -> None:
    """transformers leaves them out; llama.cpp adds them, or does not load the file."""
    config = as_json(name)
    with pytest.raises(UnmappedTensor, match=rf"does not call for the tensor {tensor}\.bias"):
        family(config).tensor(f"{tensor}.bias", config)
    switched = as_json("llama") | {"attention_bias": True, "mlp_bias": True}
    names = [f"model.layers.0.{module}.bias" for module in ("self_attn.o_proj", "mlp.down_proj")]
    assert [family_of("llama").tensor(name, switched)[0] for name in names] == ["blk.0.attn_output.bias", "blk.0.ffn_down.bias"]


def test_null_heads_of_keys_are_as_many_as_of_queries() -> None:
    """In transformers, too; the family's default is for a config.json without a word."""
    config = as_json("qwen2") | {"num_key_value_heads": None}
    assert plain(family(config).metadata(config))["qwen2.attention.head_count_kv"] == config["num_attention_heads"]
    assert AutoConfig.for_model("qwen2", num_key_value_heads=None, num_attention_heads=8).num_key_value_heads == 8


@pytest.mark.parametrize(("name", "changes"), [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 4, "layer_types": ["full_attention"] * 12}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 12, "layer_types": None}),
    ("llama", {"use_sliding_window": True, "max_window_layers": 4}),
])  # fmt: skip
def test_windows_that_transformers_does_not_have_either(name: str, changes: dict[str, Any]) -> None:
    assert family(as_json(name)).metadata(as_json(name) | changes) == family(as_json(name)).metadata(as_json(name))


def test_settings_of_yarn_that_say_what_llama_cpp_does_anyway() -> None:
    usual = {"beta_fast": 32, "beta_slow": 1.0, "truncate": True, "attention_factor": 0.1 * math.log(4) + 1}
    config = as_json("qwen2 yarn")
    assert family(config).metadata(config | {"rope_parameters": YARN | usual}) == family(config).metadata(
        config | {"rope_parameters": YARN})


def test_a_missing_setting_is_named() -> None:
    config = as_json("gemma2") | {"final_logit_softcapping": None}
    with pytest.raises(ConvertError, match="final_logit_softcapping"):
        family(config).metadata(config)


def test_names_that_nobody_knows() -> None:
    table, config = family_of("llama"), as_json("llama")
    for name in ("model.layers.12.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.lora_A", "score.weight", "lm_head"):
        with pytest.raises(UnmappedTensor, match=re.escape(name)):
            table.tensor(name, config)
    with pytest.raises(UnmappedTensor, match="no place"):
        family_of("gemma2").tensor("lm_head.weight", as_json("gemma2"))
    with pytest.raises(UnmappedTensor, match=r"blk\.0\.ssm_a"):
        table.hf_name("blk.0.ssm_a")


def test_unknown_families_list_the_known() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"FalconForCausalLM.*LlamaForCausalLM"):
        family({"architectures": ["FalconForCausalLM"]})
    with pytest.raises(UnsupportedArchitecture, match="LlamaForSequenceClassification"):
        family({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})
    with pytest.raises(UnsupportedArchitecture, match=r"'rwkv'.*llama"):
        family_of("rwkv")
    assert family({"model_type": "qwen3"}).arch == "qwen3"
