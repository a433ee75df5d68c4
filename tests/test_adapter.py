"""An adapter beside an untouched base: PEFT and llama.cpp load it and compute what the exact port computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from edgeport.benchmark.runner import open_runner
from edgeport.blocks import decode_rows
from edgeport.effect import ported
from edgeport.errors import (
    ConvertError,
    CorruptCheckpoint,
    NotACheckpoint,
    TargetMissing,
    UnknownName,
    UnsupportedPatch,
    VerificationFailed,
)
from edgeport.locate import open_model, open_patch
from tests.conftest import TinyLlama, randomize
from tests.test_gguf_imatrix import modern

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = torch.tensor([[1, 5, 300, 7, 42, 99, 250, 3]])


def save_patch(base: Path, folder: Path, seed: int = 2, std: float = 0.1, **options: Any) -> Path:
    """A PEFT adapter whose every trained value is random, as after training."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(model, seed, std)
    # with a head among its targets PEFT would add the whole head and embedding, untrained
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_logits(base: Path, *adapters: Path) -> torch.Tensor:
    """The logits of transformers with PEFT's own side branches, unmerged."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for index, adapter in enumerate(adapters):
        model = model if index else peft.PeftModel.from_pretrained(model, adapter, adapter_name="0")
        if index:
            model.load_adapter(adapter, adapter_name=str(index))
    if adapters:
        model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    with torch.no_grad():
        return model(WORDS).logits[0]


def llama_logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    llm = llama_cpp.Llama(
        str(model), lora_path=str(adapter) if adapter else None, n_ctx=32, logits_all=True, verbose=False, n_threads=1
    )
    llm.eval(WORDS[0].tolist())
    return torch.from_numpy(np.array(llm.scores[: WORDS.shape[1]], dtype=np.float32))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_the_base_stays_as_it_is_and_peft_loads_the_adapter(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    quantized = edgeport.export(model=base, output=tmp_path / "nf4", to="hf", quant="nf4").output
    patch = save_patch(base, tmp_path / "patch", rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 5})
    receipt = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "out", sidecar=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (quantized / name).read_bytes()
    assert receipt.adapter is not None and (receipt.adapter["kind"], receipt.adapter["path"]) == ("sidecar", "adapter")
    assert receipt.adapter["rank"] == [4, 7]
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "adapter").iterdir())
    assert receipt.adapter["bytes"] == size and receipt.bytes_out == size + (quantized / "model.safetensors").stat().st_size
    assert receipt.to_json()["patched"] == 14 and receipt.to_json()["copied"] == receipt.to_json()["weights"]
    assert receipt.survival is not None and receipt.survival["min"] == pytest.approx(1.0, abs=1e-5)
    # the numbers that bitsandbytes' CPU kernels repack in place, so both are loaded from the files dequantized
    plain = edgeport.export(model=quantized, output=tmp_path / "plain", to="hf", quant="f32").output
    assert apart(peft_logits(plain, tmp_path / "out" / "adapter"), peft_logits(plain, patch)) < 1e-5
    assert apart(peft_logits(plain, patch), peft_logits(plain)) > 0.1


def test_a_comparison_takes_the_adapter_along(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch")
    merged = edgeport.port(patch=patch, new_base=base, output=tmp_path / "merged").output
    for to, name in (("hf", "out"), ("gguf", "out.gguf")):
        output = edgeport.port(patch=patch, new_base=base, output=tmp_path / name, to=to, sidecar=True).output
        assert edgeport.compare(output, merged, tokens=64).mean_kl < 1e-6
    assert edgeport.compare(base, merged, tokens=64).mean_kl > 1e-4
    with pytest.raises(UnknownName, match="2 tokens of text or more, not -5"):
        edgeport.compare(base, merged, tokens=-5)


def test_a_base_with_an_adapter_is_not_taken_without_it(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    one, two = save_patch(base, tmp_path / "one"), save_patch(base, tmp_path / "two", seed=3)
    for to, name, adapter in (("hf", "out", "out/adapter"), ("gguf", "out.gguf", "out.lora.gguf")):
        output = edgeport.port(patch=one, new_base=base, output=tmp_path / name, to=to, sidecar=True).output
        for job in (lambda new=output: edgeport.plan(patch=two, new_base=new, output=tmp_path / "next"),
                    lambda new=output: edgeport.export(model=new, output=tmp_path / "next", to="hf")):  # fmt: skip
            with pytest.raises(TargetMissing, match=f"part of it; port it with --patch .*{adapter}"):
                job()
        both = edgeport.port(patch=[tmp_path / adapter, two], new_base=output, output=tmp_path / f"both-{to}", quant="f32").output
        direct = edgeport.port(patch=[one, two], new_base=base, output=tmp_path / f"direct-{to}").output
        assert edgeport.compare(both, direct, tokens=32).mean_kl < 1e-6


def test_what_reads_a_model_does_not_pass_its_adapter_over(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch")
    for to, name in (("hf", "out"), ("gguf", "out.gguf")):
        output = edgeport.port(patch=patch, new_base=base, output=tmp_path / name, to=to, sidecar=True).output
        jobs: tuple[Callable[[], Any], ...] = (
            lambda output=output: edgeport.extract(old_base=base, tuned=output, output=tmp_path / "taken"),
            lambda output=output: edgeport.extract(old_base=output, tuned=base, output=tmp_path / "taken"),
            lambda output=output: edgeport.diagnose(patch=patch, new_base=output),
            lambda output=output: open_runner(output),
        )  # fmt: skip
        for job in jobs:
            with pytest.raises(TargetMissing, match="has an adapter beside it that is part of it"):
                job()
        assert edgeport.diagnose(patch=patch, new_base=output, force=True).verdict.verdict == "not assessed"


@pytest.mark.parametrize("quant", ["gptq-4", "awq-4"])
def test_an_adapter_beside_turned_tensors(quant: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """What is read back of the output lies there column by column."""
    base = tiny_llama(hidden=128)
    patch = save_patch(base, tmp_path / "patch", std=0.03)
    quantized = edgeport.export(model=base, output=tmp_path / "base4", to="hf", quant=quant).output
    common: dict[str, Any] = {"patch": patch, "new_base": quantized, "probe": False, "rounding": "stochastic"}
    plain = edgeport.port(**common, output=tmp_path / "plain")
    beside = edgeport.port(**common, output=tmp_path / "beside", residual=16)
    sidecar = edgeport.port(**common, output=tmp_path / "sidecar", sidecar=True)
    error = [{fact.weight: fact.error or 0 for fact in one.facts} for one in (plain, beside, sidecar)]
    patched = [fact.weight for fact in beside.facts if fact.beside]
    assert len(patched) == 14 and all(1e-6 > error[2][name] < error[1][name] < 0.95 * error[0][name] for name in patched)


def test_two_patches_and_a_scale_are_one_adapter(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    one = save_patch(base, tmp_path / "one", target_modules=["q_proj", "down_proj"], use_rslora=True)
    two = save_patch(base, tmp_path / "two", seed=3, r=3)
    receipt = edgeport.port(patch=[one, two], new_base=base, output=tmp_path / "out", sidecar=True)
    assert receipt.adapter is not None and receipt.adapter["rank"] == [3, 7]
    assert apart(peft_logits(base, tmp_path / "out" / "adapter"), peft_logits(base, one, two)) < 1e-5
    half = edgeport.port(patch=f"{two}:0.5", new_base=base, output=tmp_path / "half", sidecar=True).output
    merged = edgeport.port(patch=f"{two}:0.5", new_base=base, output=tmp_path / "merged").output
    assert apart(peft_logits(base, half / "adapter"), peft_logits(merged)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_computes_with_the_adapter_what_peft_computes(tied: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied)
    patch = save_patch(base, tmp_path / "patch", rank_pattern={"k_proj": 5}, target_modules=LINEAR + ["lm_head"] * (not tied))
    output = tmp_path / "out.gguf"
    edgeport.port(patch=patch, new_base=base, output=output, to="gguf", quant="f32", sidecar=True)
    adapter = tmp_path / "out.lora.gguf"
    found = llama_logits(output, adapter)
    assert apart(found, peft_logits(base, patch)) < 1e-3  # llama.cpp keeps its cache in float16
    assert apart(llama_logits(output), found) > 0.1
    assert edgeport.verify(output).keys() == {"out.gguf", "out.lora.gguf"}
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationFailed, match=r"out\.lora\.gguf has changed"):
        edgeport.verify(output)


def test_a_gguf_adapter_is_a_patch(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """PEFT folder to GGUF LoRA to a merged folder: what PEFT's own merge gives, on a base of either container."""
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", rank_pattern={"k_proj": 5})
    gguf = edgeport.port(patch=patch, new_base=base, output=tmp_path / "a.gguf", to="gguf", quant="f32", sidecar=True).output
    adapter = tmp_path / "a.lora.gguf"
    facts = edgeport.inspect(adapter)
    assert (facts["kind"], facts["patch_kind"], facts["rank"]) == ("patch", "gguf-lora", [4, 5])
    assert facts["target_modules"] == ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"]
    expected = load_file(edgeport.port(patch=patch, new_base=base, output=tmp_path / "merged").output / "model.safetensors")
    for name, new_base in {"hf": base, "gguf": gguf}.items():
        receipt = edgeport.port(patch=adapter, new_base=new_base, output=tmp_path / name, quant="f32")
        assert receipt.coverage == {"tensors": 28, "consumed": 28}
        found = load_file(receipt.output / "model.safetensors")
        assert all(torch.allclose(found[key], value, atol=1e-6, rtol=1e-5) for key, value in expected.items())
    twice = edgeport.port(patch=f"{adapter}:2", new_base=base, output=tmp_path / "twice").output
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = load_file(base / "model.safetensors")[name]
    change = load_file(twice / "model.safetensors")[name] - plain
    assert torch.allclose(change, 2 * (expected[name] - plain), atol=1e-5)


def test_llama_cpp_s_scale_without_an_alpha_is_one(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    from converters.gguf.adapter import stored
    from converters.gguf.header import serialize
    from converters.gguf.values import ValueType

    base = tiny_llama()
    gguf = edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant="f32").output
    weights = [stored("blk.1.attn_v.weight.lora_a", (3, 64)), stored("blk.1.attn_v.weight.lora_b", (32, 3))]
    specs = [weight.parts["data"].spec for weight in weights]
    metadata = {key: (ValueType.STRING, value) for key, value in
                {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}.items()}  # fmt: skip
    head, offsets, size = serialize(metadata, [(spec.name, spec.shape, spec.dtype, spec.nbytes) for spec in specs])
    content = bytearray(size)
    content[: len(head)] = head
    for index, spec in enumerate(specs):
        values = np.random.default_rng(index).standard_normal(spec.shape).astype(np.float32)
        content[offsets[spec.name] : offsets[spec.name] + spec.nbytes] = values.tobytes()
    (tmp_path / "lora.gguf").write_bytes(content)
    merged = edgeport.port(patch=tmp_path / "lora.gguf", new_base=gguf, output=tmp_path / "merged.gguf", to="gguf").output
    assert apart(llama_logits(merged), llama_logits(gguf, tmp_path / "lora.gguf")) < 1e-4
    assert apart(llama_logits(merged), llama_logits(gguf)) > 0.01


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_what_an_adapter_cannot_hold_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    whole = save_patch(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnsupportedPatch, match=r"norm\.weight: the patch holds whole values .* leave off --sidecar"):
        edgeport.port(patch=whole, new_base=base, output=tmp_path / "out", sidecar=True)
    head = save_patch(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConvertError, match="a head tied to the embedding"):
        edgeport.port(patch=head, new_base=base, output=tmp_path / "out.gguf", to="gguf", sidecar=True)
    assert {path for path in tmp_path.rglob("*") if head not in path.parents} - {head} == set(before)


def test_an_adapter_file_is_no_model_and_fits_one_architecture(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch")
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "a.gguf", to="gguf", sidecar=True)
    with pytest.raises(NotACheckpoint, match="is an adapter, not a model; give it as --patch"):
        open_model(tmp_path / "a.lora.gguf")
    small = tiny_llama("small", layers=1)
    opened = open_patch(tmp_path / "a.lora.gguf")
    with pytest.raises(TargetMissing, match=r"layers\.1.* which the base does not have"):
        opened.edits(open_model(small), None)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
def test_a_tied_head_of_a_folder_gets_factors_of_its_own(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    patch = save_patch(base, tmp_path / "patch", target_modules=["lm_head", "o_proj"])
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", sidecar=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" in {fact.weight for fact in receipt.facts if fact.beside}
    assert apart(peft_logits(base, tmp_path / "out" / "adapter"), peft_logits(base, patch)) < 1e-5


def test_the_adapter_is_measured_and_not_taken_on_trust(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Rounding the base in the same pass costs what it costs: the adapter's survival says so."""
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.03)
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out.gguf", to="gguf", quant="Q4_0", sidecar=True)
    beside = [fact for fact in receipt.facts if fact.beside]
    assert {fact.action for fact in beside} == {"recode"}
    assert all(fact.error is not None and 0.01 < fact.error < 0.2 for fact in beside)
    assert receipt.survival is not None and receipt.survival["mean"] == pytest.approx(1.0, abs=0.2)


def test_a_damaged_gguf_adapter_is_named(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    state = load_file(save_patch(base, tmp_path / "patch") / "adapter_model.safetensors")
    save_file(state, tmp_path / "patch" / "adapter_model.safetensors")
    edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "a.gguf", to="gguf", sidecar=True)
    content = (tmp_path / "a.lora.gguf").read_bytes()
    for by, kind, says in (
        (b"blk.9.attn_q.weight.lora_a", CorruptCheckpoint, "one of the two factors"),
        (b"blk.0.attn_q_norms.weight.", UnsupportedPatch, "no low-rank factor.*PEFT folder alone"),
    ):
        (tmp_path / "b.lora.gguf").write_bytes(content.replace(b"blk.0.attn_q.weight.lora_a", by))
        with pytest.raises(kind, match=says):
            open_patch(tmp_path / "b.lora.gguf").edits(open_model(base), None)
    (tmp_path / "c.lora.gguf").write_bytes(content.replace(b"adapter.type", b"adapter.typo"))
    with pytest.raises(UnsupportedPatch, match="an adapter of type None"):
        open_patch(tmp_path / "c.lora.gguf")


def test_an_adapter_that_waits_for_certain_tokens_is_not_merged(tmp_path: Path) -> None:
    """llama.cpp adds an aLoRA behind its invocation tokens alone (`server_tokens`, `common_adapter_lora_info`)."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "alora.gguf", "llama")
    writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
    writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, [5, 6])
    for side, shape in (("a", (2, 64)), ("b", (64, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedPatch, match="only behind certain tokens"):
        open_patch(tmp_path / "alora.gguf")


def rounded(base: Path, tmp_path: Path, quant: str = "Q4_0") -> Path:
    return edgeport.export(model=base, output=tmp_path / "base.gguf", to="gguf", quant=quant).output


def lost(base: Path, patch: Path, output: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each patched weight, the exact port minus what is stored: without the adapter, and with it."""
    exact = ported(open_model(base), [open_patch(patch)], None)
    stored = open_model(output)
    together = ported(stored, [open_patch(output.with_name(f"{output.stem}.lora.gguf"))], None)
    found = {}
    for name, (_, edits, shape) in together.edits.items():
        if edits:
            rows = range(shape[0])
            wanted = exact.rows(name, rows)
            found[name] = wanted - decode_rows(stored, stored.weights[name], rows), wanted - together.rows(name, rows)
    return found


def test_a_residual_is_what_a_singular_value_decomposition_gives(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.03)
    quantized = rounded(base, tmp_path)
    common: dict[str, Any] = {"patch": patch, "new_base": quantized, "to": "gguf", "probe": False, "rounding": "stochastic"}
    receipt = edgeport.port(**common, output=tmp_path / "out.gguf", residual=8)
    assert receipt.adapter is not None and (receipt.adapter["kind"], receipt.adapter["rank"]) == ("residual", [8])
    found = lost(quantized, patch, tmp_path / "out.gguf")
    assert len(found) == 14
    for without, left in found.values():
        best = torch.linalg.svdvals(without)[8:].square().sum().sqrt()
        assert best <= left.norm() * 1.0001 and left.norm() < 1.03 * best
    # the receipt counts both together
    plain = edgeport.port(**common, output=tmp_path / "plain.gguf")
    error = {fact.weight: fact.error for fact in plain.facts}
    assert all(fact.error is not None and fact.error < (error[fact.weight] or 0) for fact in receipt.facts if fact.beside)


def test_an_importance_matrix_says_where_a_residual_counts(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.03, target_modules=["up_proj"])
    squares = torch.full((64,), 0.01).index_fill_(0, torch.arange(8), 100.0)
    entries = {f"blk.{layer}.ffn_up.weight.{what}": values for layer in range(2) for what, values in
               {"in_sum2": squares.numpy()[None], "counts": np.ones((1, 1), np.float32)}.items()}  # fmt: skip
    matrix = modern(tmp_path / "imatrix.gguf", entries)
    error = {}
    for name, given in {"flat": None, "weighed": matrix}.items():
        output = tmp_path / f"{name}.gguf"
        common: dict[str, Any] = {"patch": patch, "new_base": base, "to": "gguf", "quant": "Q4_0", "probe": False}
        edgeport.port(**common, output=output, imatrix=given, residual=8)
        found = lost(base, patch, output)
        error[name] = sum(float((left * squares.sqrt()).norm()) for _, left in found.values())
    assert error["weighed"] < 0.2 * error["flat"]


def test_what_nearest_rounding_erases_is_all_in_the_residual(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch", std=0.01)
    quantized = rounded(base, tmp_path)
    receipt = edgeport.port(
        patch=patch, new_base=quantized, output=tmp_path / "out.gguf", to="gguf", rounding="nearest", residual=4, probe=True
    )
    assert receipt.survival is not None and receipt.survival["min"] == pytest.approx(1, abs=0.02)
    assert receipt.probe is not None and receipt.probe.kl < 1e-4
    merged = edgeport.port(patch=patch, new_base=quantized, output=tmp_path / "exact", quant="f32").output
    found = llama_logits(tmp_path / "out.gguf", tmp_path / "out.lora.gguf")
    with torch.no_grad():
        assert apart(found, AutoModelForCausalLM.from_pretrained(merged)(WORDS).logits[0]) < 0.03


def test_residuals_that_cannot_be(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    common: dict[str, Any] = {"patch": save_patch(base, tmp_path / "patch"), "new_base": base, "output": tmp_path / "out"}
    with pytest.raises(UnsupportedPatch, match="leaves no residual"):
        edgeport.plan(**common, residual=4)
    with pytest.raises(UnknownName, match="--residual 0 is no rank"):
        edgeport.plan(**common, quant="nf4", residual=0)
    with pytest.raises(UnknownName, match="give one of them"):
        edgeport.plan(**common, quant="nf4", residual=4, sidecar=True)


def test_memory_of_an_adapter_is_planned(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = save_patch(base, tmp_path / "patch")
    common: dict[str, Any] = {"patch": patch, "new_base": base, "output": tmp_path / "out", "quant": "nf4"}
    plans = {rank: edgeport.plan(**common, residual=rank, rounding="stochastic") for rank in (4, 32)}
    peaks = {rank: plan.peak_above_import_bytes for rank, plan in plans.items()}
    # 28 ranks more of down_proj [64, 128]: factors thrice, rows of the sketch thrice in float64
    assert peaks[32] - peaks[4] == pytest.approx(28 * (3 * 4 * (64 + 128) + 3 * 8 * 128), rel=0.1)
