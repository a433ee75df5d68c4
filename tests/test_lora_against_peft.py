"""The oracle is PEFT: its own merge on the same inputs, or its unmerged forward where its merge is known to be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import edgeport
from edgeport.blocks import decode_parts, decode_rows, encode_rows
from edgeport.errors import CorruptCheckpoint, ShapeMismatch, UnsupportedPatch
from edgeport.locate import open_model
from tests.conftest import randomize, save_tokenizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path, *, tied: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, tie_word_embeddings=tied, attention_bias=bias,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def save_patch(base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A PEFT adapter whose every trained value is random, as after training."""
    model = peft.get_peft_model(load(base, dtype), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    randomize(model, 2)
    model.save_pretrained(folder)
    return folder


def save_grown(base: Path, folder: Path, **options: Any) -> Any:
    """As `save_patch`, of a model that has got five tokens first; the model as it was trained."""
    model = load(base)
    model.resize_token_embeddings(325, mean_resizing=False)
    trained: Any = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options))
    randomize(trained, 3)
    trained.save_pretrained(folder)
    return trained


def evolve(base: Path, folder: Path) -> Path:
    """The base as an update leaves it: every weight a little elsewhere."""
    model = load(base)
    torch.manual_seed(4)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.01
    model.save_pretrained(folder)
    return folder


def merged(base: Path, *patches: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model: Any = load(base, dtype)
    for patch in patches:
        model = peft.PeftModel.from_pretrained(model, patch).merge_and_unload()
    return dict(model.state_dict())


CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "all linear": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "r": 9},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 7, "model.layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 11},
    },
    "bias all": {"target_modules": ATTENTION, "bias": "all"},
    "bias lora only": {"target_modules": ATTENTION, "bias": "lora_only"},
    "head": {"target_modules": [*ATTENTION, "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules to save": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "token rows": {"target_modules": ATTENTION, "trainable_token_indices": [3, 300, 17]},
    "eva and gaussian leave the base": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
    "so does mica": {"target_modules": ATTENTION, "init_lora_weights": "mica"},
}


@pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_port_equals_peft_merge_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", bias=name.startswith("bias"))
    patch = save_patch(base, tmp_path / "patch", **CASES[name])
    expected = merged(base, patch)
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    found = dict(load(tmp_path / "out").state_dict())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{key}: {(found[key] - value).abs().max()}"
    assert receipt.coverage["tensors"] == receipt.coverage["consumed"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_one_rounding_of_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    patch = save_patch(base, tmp_path / "patch", dtype=dtype, target_modules=LINEAR)
    expected = merged(base, patch, dtype=dtype)
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    for key, value in load(tmp_path / "out", dtype).state_dict().items():
        step = torch.finfo(dtype).eps * expected[key].abs().float().clamp_min(torch.finfo(dtype).tiny)
        assert bool(((value.float() - expected[key].float()).abs() <= step).all()), key


@pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning")
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_factors_of_embedding_and_head_go_on_top_of_an_evolved_base(file: str, tmp_path: Path) -> None:
    # PEFT saves the frozen weight beside them; which of them a file has first depends on its form and their types
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    patch = save_patch(base, tmp_path / "patch", dtype=torch.bfloat16, target_modules=["q_proj", "lm_head", "embed_tokens"])
    stored = load_file(patch / "adapter_model.safetensors")
    assert sum(name.endswith(".base_layer.weight") for name in stored) == 2
    if file.endswith(".bin"):
        torch.save(stored, patch / file)
        (patch / "adapter_model.safetensors").unlink()
    new = evolve(base, tmp_path / "new")
    # PEFT would put that weight in the place of the new base's: it gets the factors alone
    (tmp_path / "alone").mkdir()
    save_file({name: value for name, value in stored.items() if ".base_layer." not in name},
              tmp_path / "alone" / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    (tmp_path / "alone" / "adapter_config.json").write_bytes((patch / "adapter_config.json").read_bytes())
    expected = merged(new, tmp_path / "alone")
    for old in (None, base):
        receipt = edgeport.port(patch=patch, new_base=new, old_base=old, output=tmp_path / "out", quant="f32", overwrite=True)
        found = load(tmp_path / "out").state_dict()
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
        assert receipt.coverage["tensors"] == receipt.coverage["consumed"] == len(stored)


def test_two_patches_and_a_scale(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    first = save_patch(base, tmp_path / "one", target_modules=ATTENTION)
    second = save_patch(base, tmp_path / "two", target_modules=LINEAR, r=3)
    edgeport.port(patch=[first, second], new_base=base, output=tmp_path / "both")
    expected = merged(base, first, second)
    for key, value in load(tmp_path / "both").state_dict().items():
        assert torch.equal(value, expected[key]), key
    edgeport.port(patch=f"{first}:0.5", new_base=base, output=tmp_path / "half")
    halfway, whole, start = load(tmp_path / "half").state_dict(), merged(base, first), load(base).state_dict()
    for key, value in halfway.items():
        torch.testing.assert_close(value, (whole[key] + start[key]) / 2, rtol=1e-6, atol=1e-6)


def logits(model: Any, *more: int) -> torch.Tensor:
    tokens = torch.tensor([[*range(0, 280, 7), *more]])
    with torch.no_grad():
        return model.eval()(tokens).logits  # type: ignore[no-any-return]


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "token rows under a head": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [0, 5, 7]},
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", TIED)
def test_tied_base_computes_what_the_unmerged_adapter_computes(name: str, tmp_path: Path) -> None:
    # PEFT's merge writes into the one tensor that both share; its forward is what was trained
    base = save_base(tmp_path / "base", tied=True)
    patch = save_patch(base, tmp_path / "patch", **TIED[name])
    expected = logits(peft.PeftModel.from_pretrained(load(base), patch))
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    out = load(tmp_path / "out")
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-5)
    assert out.config.tie_word_embeddings is (name == "token rows")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_grown_vocabulary(tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    trained = save_grown(base, tmp_path / "patch", target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=tied)
    expected = logits(trained)
    edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out")
    out = load(tmp_path / "out")
    assert out.config.vocab_size == 325 and out.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_what_peft_saves_twice_is_one_change(tied: bool, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    trained = save_grown(base, tmp_path / "patch", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
                         ensure_weight_tying=tied)  # fmt: skip
    stored = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens."
    assert torch.equal(stored[f"{prefix}weight"], stored[f"{prefix}modules_to_save.weight"])
    receipt = edgeport.port(patch=tmp_path / "patch", new_base=base, old_base=base, output=tmp_path / "out")
    out = load(tmp_path / "out")
    assert out.config.vocab_size == 325 and out.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(out), logits(trained), rtol=1e-5, atol=1e-4)
    left_out = sum(".original_module." in name for name in stored)
    assert receipt.coverage["tensors"] == receipt.coverage["consumed"] == len(stored) - left_out
    edgeport.port(patch=f"{tmp_path / 'patch'}:0.5", new_base=base, output=tmp_path / "half")
    folders = base, tmp_path / "out", tmp_path / "half"
    start, whole, half = (load(folder).get_input_embeddings().weight[:320] for folder in folders)
    torch.testing.assert_close(half, (start + whole) / 2, rtol=1e-5, atol=1e-5)


SECOND: dict[str, dict[str, Any]] = {
    "whole values": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 319]},
}


NEW_TOKENS: dict[str, tuple[bool, dict[str, Any]]] = {
    "rows": (False, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 320, 321, 322, 323, 324]}),
    "factors": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "rows of both": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 320, 321, 322, 323, 324]}),
    "factors of both": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "factors of each": (True, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "factors of the head": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "factors of the embedding": (True, {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", NEW_TOKENS)
def test_new_tokens_over_the_frozen_embedding(name: str, tmp_path: Path) -> None:
    tied, options = NEW_TOKENS[name]
    base, patch = save_base(tmp_path / "base", tied=tied), tmp_path / "patch"
    expected = logits(save_grown(base, patch, **options), 3, 320, 324)
    stored = load_file(patch / "adapter_model.safetensors")
    for old in (None, base):
        receipt = edgeport.port(patch=patch, new_base=base, old_base=old, output=tmp_path / "out", overwrite=True)
        out = load(tmp_path / "out")
        torch.testing.assert_close(logits(out, 3, 320, 324), expected, rtol=1e-5, atol=1e-4)
        assert out.config.vocab_size == 325 and out.config.tie_word_embeddings is name.endswith("of both")
        assert receipt.coverage["tensors"] == receipt.coverage["consumed"] == len(stored)
    # what is not trained is the new base's own, and what it does not have the patch's
    new = evolve(base, tmp_path / "new")
    edgeport.port(patch=patch, new_base=new, output=tmp_path / "ported")
    start, evolved, exact, ported = (
        load(folder).get_input_embeddings().weight for folder in (base, new, tmp_path / "out", tmp_path / "ported")
    )
    change = exact[:320] - start
    change[3] = exact[3] - evolved[3] if "rows" in name else change[3]
    torch.testing.assert_close(ported[:320], evolved + change, rtol=1e-5, atol=1e-5)
    assert torch.equal(ported[320:], exact[320:])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_scale_leaves_trained_rows_of_new_tokens_whole(tmp_path: Path) -> None:
    base, patch = save_base(tmp_path / "base"), tmp_path / "patch"
    trained = save_grown(base, patch, target_modules=["q_proj"], trainable_token_indices=[3, 321])
    whole = trained.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    for old in (None, base):
        edgeport.port(patch=f"{patch}:0.5", new_base=base, old_base=old, output=tmp_path / "half", overwrite=True)
        found, start = (load(folder).get_input_embeddings().weight for folder in (tmp_path / "half", base))
        torch.testing.assert_close(found[:320], (start + whole[:320]) / 2, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[320:], whole[320:])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_rows_of_new_tokens_replace_nothing(tmp_path: Path) -> None:
    base, patch = save_base(tmp_path / "base", tied=True), tmp_path / "patch"
    expected = logits(save_grown(base, patch, target_modules=["q_proj"], trainable_token_indices=[320, 324]), 320, 324)
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", semantics="delta")
    assert not any("whole values" in note for note in receipt.notes)
    torch.testing.assert_close(logits(load(tmp_path / "out"), 320, 324), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_new_tokens_of_the_head_alone(tmp_path: Path) -> None:
    # PEFT saves the targeted matrix alone, and needs the resized base itself
    base, patch = save_base(tmp_path / "base"), tmp_path / "patch"
    save_grown(base, patch, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ShapeMismatch, match=r"would have 320 and 325 rows, .* give a new base that has them in both"):
        edgeport.plan(patch=patch, new_base=base, output=tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("last", ["grown", "other"])
def test_a_patch_beside_one_that_grows_the_vocabulary(name: str, last: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained = save_grown(base, tmp_path / "grown", target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    other = save_patch(base, tmp_path / "other", **SECOND[name])
    patches = [other, tmp_path / "grown"] if last == "grown" else [tmp_path / "grown", other]
    edgeport.port(patch=patches, new_base=base, old_base=base, output=tmp_path / "out")
    before, grown, second = load(base).state_dict(), trained.merge_and_unload().state_dict(), merged(base, other)
    for key, value in load(tmp_path / "out").state_dict().items():
        change = second[key] - before[key]
        expected = grown[key].clone()
        expected[: len(change)] += change
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_scale_leaves_the_rows_of_new_tokens_whole(tmp_path: Path) -> None:
    base, patch = save_base(tmp_path / "base"), tmp_path / "patch"
    save_grown(base, patch, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    tuned = edgeport.port(patch=patch, new_base=base, output=tmp_path / "tuned").output
    dense = edgeport.extract(old_base=base, tuned=tuned, output=tmp_path / "dense", full=True).output
    start, whole = load(base).state_dict(), load(tuned).state_dict()
    for given, old in ((patch, None), (patch, base), (dense, None)):
        edgeport.port(patch=f"{given}:0.5", new_base=base, old_base=old, output=tmp_path / "half", overwrite=True)
        for key, value in load(tmp_path / "half").state_dict().items():
            rows = len(start[key])
            torch.testing.assert_close(value[:rows], (start[key] + whole[key][:rows]) / 2, rtol=1e-5, atol=1e-5)
            assert torch.equal(value[rows:], whole[key][rows:]), key


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_trained_row_beyond_the_old_vocabulary_stands_for_itself(tmp_path: Path) -> None:
    old = save_base(tmp_path / "old")
    grown = load(old)
    grown.resize_token_embeddings(330, mean_resizing=False)
    grown.save_pretrained(tmp_path / "new")
    patch = save_patch(tmp_path / "new", tmp_path / "patch", target_modules=["q_proj"], trainable_token_indices=[3, 327])
    expected = merged(tmp_path / "new", patch)
    edgeport.port(patch=patch, new_base=tmp_path / "new", old_base=old, output=tmp_path / "out")
    for key, value in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_old_base_turns_replaced_values_into_differences(tmp_path: Path) -> None:
    old = save_base(tmp_path / "old")
    patch = save_patch(old, tmp_path / "patch", target_modules=ATTENTION, modules_to_save=["norm", "lm_head"])
    new = evolve(old, tmp_path / "new")
    edgeport.port(patch=patch, new_base=new, old_base=old, output=tmp_path / "out")
    tuned, before, out = merged(old, patch), load(old).state_dict(), load(tmp_path / "out").state_dict()
    for key, value in load(new).state_dict().items():
        torch.testing.assert_close(out[key], value + (tuned[key] - before[key]), rtol=1e-5, atol=1e-5)


def test_whole_values_that_would_undo_an_earlier_patch(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    delta = save_patch(base, tmp_path / "delta", target_modules=ATTENTION)
    whole = save_patch(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["o_proj"])
    for patches in ([delta, whole], [whole, f"{whole}:0.5"]):
        with pytest.raises(UnsupportedPatch, match=r"whole holds whole values for .*o_proj.weight, which would undo"):
            edgeport.plan(patch=patches, new_base=base, output=tmp_path / "out")
    edgeport.port(patch=[whole, delta], new_base=base, output=tmp_path / "first")
    edgeport.port(patch=[delta, whole], new_base=base, old_base=base, output=tmp_path / "out")
    expected = merged(base, whole, delta)
    for folder in ("first", "out"):
        found = load(tmp_path / folder).state_dict()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (256,)])
def test_a_factor_that_is_no_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    file = save_patch(base, tmp_path / "patch", target_modules=["q_proj"]) / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(file) | {name: torch.ones(shape)}, file, {"format": "pt"})
    says = rf"has {re.escape(name)} of shape \[\d*\] where a matrix was expected; .*save it again"
    with pytest.raises(CorruptCheckpoint, match=says):
        edgeport.inspect(tmp_path / "patch")
    for old in (None, base):
        with pytest.raises(CorruptCheckpoint, match=says):
            edgeport.port(patch=tmp_path / "patch", new_base=base, old_base=old, output=tmp_path / "out")


def test_untouched_weights_are_byte_equal(tmp_path: Path, read_tensors: Callable[[Path], dict[str, bytes]]) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    patch = save_patch(base, tmp_path / "patch", target_modules=["q_proj"])
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "out")
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "q_proj" in name}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("rounding", ["auto", "stochastic"])
def test_old_tokens_of_a_grown_vocabulary_stay_on_the_base_s_grid(rounding: str, tmp_path: Path) -> None:
    base, name = save_base(tmp_path / "base"), "model.embed_tokens.weight"
    trained = save_grown(base, tmp_path / "patch", target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False)
    for key, parameter in trained.named_parameters():
        if "lora_B" in key or "lora_embedding_B" in key:
            parameter.data *= 0.02
    trained.save_pretrained(tmp_path / "patch")
    for folder, count in {base: 320, tmp_path / "patch": 325}.items():
        save_tokenizer(folder, count)
    exact = dict(trained.merge_and_unload().named_parameters())[name].detach()
    four = edgeport.export(model=base, output=tmp_path / "base.gguf", quant="Q4_0", token_embedding_type="Q4_0").output
    options: dict[str, Any] = {"patch": tmp_path / "patch", "new_base": four, "probe": False, "rounding": rounding}
    receipt = edgeport.port(output=tmp_path / "out.gguf", to="gguf", **options)
    (fact,) = [one for one in receipt.facts if one.weight == name]
    assert fact.rounding == "stochastic" and fact.retention is not None and abs(fact.retention - 1) < 0.1
    sources = [open_model(path) for path in (base, four, tmp_path / "out.gguf")]
    tables = [source.weights[name] for source in sources]
    start, before, after = (decode_rows(*both, range(both[1].rows), "cpu") for both in zip(sources, tables, strict=True))
    change = exact[:320] - start
    assert abs(float(((after[:320] - before) * change).sum() / change.square().sum()) - 1) < 0.1
    # the new ones as encoding finds them, in a matrix of their own
    table = replace(tables[2], shape=(5, 64))
    assert torch.equal(after[320:], decode_parts(table, encode_rows(table, exact[320:])))
