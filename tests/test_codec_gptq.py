"""GPTQ against GPTQModel: layers that it packed itself, its packing and dequantization transcribed for more shapes than these,
and the package where it is installed.

GPTQModel 7.7 pins other releases than the tests run with, so it is in no extra: tests/data/pack_with_gptqmodel.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from edgeport import steps
from edgeport.blocks import decode_rows
from edgeport.codecs import gptq
from edgeport.codecs.gptq import Packing
from edgeport.errors import AmbiguousFormat, BlockMismatch, CorruptCheckpoint, EdgeportError, PatchLost
from edgeport.locate import open_model
from edgeport.tensor import Weight
from tests.conftest import TinyLlama
from tests.streams import Live, blocks_of, normal, streamed
from tests.test_lora_against_peft import LINEAR, save_patch

ReadTensors = Callable[[Path], dict[str, bytes]]
Tensors = dict[str, torch.Tensor]
WIDE = {"hidden": 128, "intermediate_size": 192}
"""Layers of 128 and of 192 columns: the second are one group and a half."""


# ---------------------------------------------------------------- GPTQModel's own, transcribed


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] codes to int32 [n * bits / 32, m]. Source: `PackableQuantLinear.pack_block`, _pack_rows_2_4_8 and _pack_rows_3."""
    words = []
    for x in values.to(torch.int64).split(32):
        if bits == 3:
            ten = torch.arange(10).view(-1, 1) * 3
            words += [
                (x[0:10] << ten).sum(0) | x[10] << 30,
                x[10] >> 2 & 1 | (x[11:21] << ten + 1).sum(0) | x[21] << 31,
                x[21] >> 1 & 3 | (x[22:32] << ten + 2).sum(0),
            ]
        else:
            shifts = (torch.arange(32 // bits) * bits).view(1, -1, 1)
            words += list((x.view(-1, 32 // bits, x.shape[1]) << shifts).sum(1))
    return (torch.stack(words) & 0xFFFFFFFF).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse. Source: `PackableQuantLinear.dequantize_weight`."""
    if bits != 3:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
        return (words[:, None] >> shifts & (1 << bits) - 1).flatten(0, 1)
    table = [
        [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0], [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
        [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0],
    ]  # fmt: skip
    codes = words.view(-1, 3, 1, words.shape[1]).expand(-1, -1, 12, -1) >> torch.tensor(table).view(1, 3, 12, 1) & 7
    codes[:, 0, 10] = codes[:, 0, 10] & 3 | codes[:, 1, 0] << 2 & 4
    codes[:, 1, 11] = codes[:, 1, 11] & 1 | codes[:, 2, 0] << 1 & 6
    return torch.cat([codes[:, 0, :11], codes[:, 1, 1:12], codes[:, 2, 1:11]], 1).flatten(0, 1)


def moved_zeros(qzeros: torch.Tensor, bits: int, by: int) -> torch.Tensor:
    """Between the versions. Source: `utils.model.convert_gptq_v1_to_v2_format_module`, and its inverse."""
    if bits == 3:
        return pack_words(unpack_words(qzeros.t().contiguous(), 3) + by & 7, 3).t()
    ones = {2: 0b01010101010101010101010101010101, 4: 0x11111111, 8: 0x01010101}[bits]
    return qzeros + by * ones


def dequantized(tensors: Tensors, bits: int, version: int) -> torch.Tensor:
    """float32 [out, in] of a layer's tensors. Source: `PackableQuantLinear.dequantize_weight`, `_dequantize_from_codes`."""
    qzeros = moved_zeros(tensors["qzeros"], bits, 1) if version == 1 else tensors["qzeros"]
    zeros = unpack_words(qzeros.t().contiguous(), bits).t()
    index = tensors["g_idx"].long()
    return (tensors["scales"].float()[index] * (unpack_words(tensors["qweight"], bits) - zeros[index])).t()


def packed(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, index: torch.Tensor, how: Packing) -> Tensors:
    """A layer's tensors from codes [out, in], scales and zeros [out, groups]. Source: `PackableQuantLinear.pack_block`."""
    qzeros = pack_words(zero, how.bits).t().contiguous()
    return {
        "qweight": pack_words(codes.t(), how.bits), "scales": scale.t().half().contiguous(), "g_idx": index.to(torch.int32),
        "qzeros": moved_zeros(qzeros, how.bits, -1).contiguous() if how.version == 1 else qzeros,
    }  # fmt: skip


def random_layer(shape: tuple[int, int], how: Packing, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """Tensors of a layer with random codes, zeros and, for act-order, groups; and its float32 values."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups, top = -(-columns // how.group), 1 << how.bits
    codes = torch.randint(top, shape, generator=generator)
    zero = torch.randint(top, (rows, groups), generator=generator)
    scale = torch.rand((rows, groups), generator=generator).mul_(0.01).add_(0.001)
    index = torch.arange(columns) // how.group
    if how.act_order:
        index = index[torch.randperm(columns, generator=generator)]
    values = ((codes - zero[:, index]) * scale.half().float()[:, index]).float()
    return packed(codes, scale, zero, index, how), values


def parts_of(weight: Weight, tensors: Tensors) -> Tensors:
    for role, part in weight.parts.items():
        assert (part.spec.shape, part.spec.nbytes) == (tuple(tensors[role].shape), tensors[role].nbytes), role
    return {role: tensors[role].contiguous().view(-1).view(torch.uint8) for role in weight.parts}


# ---------------------------------------------------------------- one weight


def test_a_word_by_hand() -> None:
    weight = gptq.lay_out("m", (8, 8), Packing(4, 8))
    matrix = torch.zeros(8, 8)
    matrix[0] = torch.tensor([-7.5, 7.5, 0.0, 1.0, 2.0, -1.0, 3.0, 0.4])
    parts = gptq.codec.encode(weight, matrix, None)
    # scale 2 * 7.5 / 15 = 1, zero 8: codes 0 (-7.5 goes to the even -8), 15 (clamped from 16), 8, 9, 10, 7, 11, 8
    assert parts["qweight"].view(torch.int32)[0].item() & 0xFFFFFFFF == 0x8B7A98F0
    assert parts["scales"].view(torch.float16)[0].item() == 1.0
    assert parts["qzeros"].view(torch.int32).tolist() == [0x77777777] and parts["g_idx"].view(torch.int32).tolist() == [0] * 8
    assert gptq.codec.decode(weight, parts)[0].tolist() == [-8.0, 7.0, 0.0, 1.0, 2.0, -1.0, 3.0, 0.0]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize(("shape", "group"), [((32, 96), 96), ((64, 160), 128), ((160, 96), 20)], ids=str)
def test_tensors_of_gptqmodel_decode_to_the_bit(
    shape: tuple[int, int], group: int, bits: int, version: int, act_order: bool
) -> None:
    how = Packing(bits, group, False, version, act_order)
    tensors, values = random_layer(shape, how)
    assert torch.equal(dequantized(tensors, bits, version), values)
    weight = gptq.lay_out("m", shape, how)
    parts = parts_of(weight, tensors)
    assert torch.equal(torch.cat([gptq.codec.decode(weight, some) for some in blocks_of(weight, parts, 40)]), values)
    # a grid with the same values, and codes that come back
    grid = gptq.codec.grid(weight, parts)
    assert torch.equal(grid.values(), values) and grid.uniform
    other = torch.randint(1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kept, moved = (gptq.codec.with_codes(weight, parts, codes) for codes in (grid.codes, other))
    assert all(torch.equal(kept[role], parts[role]) for role in parts)
    assert torch.equal(gptq.codec.decode(weight, moved), grid.values(other))
    assert [role for role in parts if not torch.equal(moved[role], parts[role])] == ["qweight"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize(("shape", "group"), [((96, 128), 32), ((64, 160), 128)], ids=str)
def test_rounding_is_to_the_nearest_code_of_the_scales_of_gptqmodel(
    shape: tuple[int, int], group: int, bits: int, version: int, symmetric: bool
) -> None:
    matrix = normal(*shape)
    matrix[0], matrix[1], matrix[2] = 0, matrix[1].abs(), -matrix[2].abs()
    how = Packing(bits, group, symmetric, version)
    weight = gptq.lay_out("m", shape, how)
    parts = streamed(gptq.codec, weight, matrix, 40)
    top = (1 << bits) - 1
    scales, zeros = [], []
    for x in matrix.split(group, 1):
        # `Quantizer.find_params`; but for a group of positive values, where it leaves half of a symmetric grid unused
        low, high = x.min(1)[0].clamp(max=0), x.max(1)[0].clamp(min=0)
        if symmetric:
            high = torch.maximum(low.abs(), high)
            low = -high
        empty = (low == 0) & (high == 0)
        low[empty], high[empty] = -1, 1
        scales.append((high - low) / top)
        zeros.append(torch.full_like(low, (top + 1) / 2) if symmetric else torch.round(-low / scales[-1]))
    scale, zero, index = torch.stack(scales, 1), torch.stack(zeros, 1), torch.arange(shape[1]) // group
    codes = torch.clamp(torch.round(matrix / scale.half().float()[:, index]) + zero[:, index], 0, top)
    if not symmetric:
        # half way between two integers the package's zero is an accident of the last bit
        zero[0], codes[0] = (top + 1) / 2, (top + 1) / 2
    expected = parts_of(weight, packed(codes, scale, zero, index, how))
    assert all(torch.equal(parts[role], expected[role]) for role in parts)


def test_a_scale_that_underflows_leaves_the_zero() -> None:
    weight = gptq.lay_out("m", (8, 32), Packing(4, 32))
    matrix = torch.full((8, 32), 1e-9)
    parts = gptq.codec.encode(weight, matrix, None)
    assert not gptq.codec.decode(weight, parts).any()
    with pytest.raises(EdgeportError, match="bf16"):
        gptq.codec.encode(weight, matrix * 1e15, None)


@pytest.mark.parametrize("format", gptq.codec.formats)
def test_scratch_is_what_is_published(format: str) -> None:
    how = Packing(int(format.split("_")[1]), 128, False, 1, "ACT" in format)
    weight, matrix = gptq.lay_out("m", (64, 8192), how), normal(64, 8192)
    parts = parts_of(weight, random_layer((64, 8192), how)[0])
    count, codec = matrix.numel(), gptq.codec
    works: list[tuple[Callable[[], Any], float]] = [
        (lambda: codec.decode(weight, parts), 4 + codec.scratch),
        (lambda: codec.grid(weight, parts), steps.GRID_BYTES + codec.grid_scratch),
        (lambda: codec.with_codes(weight, parts, codes), weight.nbytes / count + codec.grid_scratch),
    ]
    if not how.act_order:
        works.append((lambda: codec.encode(weight, matrix, None), weight.nbytes / count + codec.scratch))
    codes = codec.grid(weight, parts).codes
    for work, bound in works:
        with Live(matrix, codes, *parts.values()) as live:
            work()
        assert live.peak / count <= bound


PACKED = load_file(Path(__file__).parent / "data" / "packed_with_gptqmodel.safetensors")
"""Layers that GPTQModel quantized and packed, and what it reads from them: `tests/data/pack_with_gptqmodel.py`."""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_what_gptqmodel_itself_packed(bits: int, symmetric: bool, act_order: bool, version: int) -> None:
    name = f"gptq-{bits}-{'sym' if symmetric else 'asym'}-{'act' if act_order else 'plain'}-v{version}"
    weight = gptq.lay_out("m", (32, 64), Packing(bits, 32, symmetric, version, act_order))
    parts = parts_of(weight, {role: PACKED[f"{name}.{role}"] for role in weight.parts})
    values = gptq.codec.decode(weight, parts)
    # the package reads in float16
    assert torch.equal(values.half(), PACKED[f"{name}.weight"].t())
    if act_order:
        assert PACKED[f"{name}.g_idx"].unique_consecutive().numel() > 2
    else:
        matrix = PACKED["matrix"]
        anew = gptq.codec.encode(weight, matrix, None)
        assert all(torch.equal(anew[role], parts[role]) for role in parts if role != "qweight")
        # the package chooses codes by scales before these are rounded to 16 bits: one beside the nearest, now and then
        moved = gptq.codec.decode(weight, anew) != values
        error = (gptq.codec.decode(weight, anew) - matrix).abs()
        assert (error <= (values - matrix).abs())[moved].all() and moved.float().mean() < 0.02


# ---------------------------------------------------------------- folders


def quantized_folder(base: Path, folder: Path, how: Packing) -> Path:
    """The base with its layers in random codes of these parameters, as GPTQModel would save them."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    stored: Tensors = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        own = replace(how, group=tensor.shape[1] if how.group == -1 else how.group)
        layer, _ = random_layer((tensor.shape[0], tensor.shape[1]), own, seed)
        stored |= {f"{name.removesuffix('.weight')}.{role}": values for role, values in layer.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = gptq.quantization_config(how) | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layers(folder: Path) -> dict[str, Tensors]:
    """The tensors of each quantized layer by role."""
    found: dict[str, Tensors] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, role = name.rpartition(".")
        if role in gptq.PARTS:
            found.setdefault(layer, {})[role] = tensor
    return found


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize("bits", gptq.BITS)
def test_an_export_is_what_gptqmodel_reads(
    bits: int, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(dtype="bfloat16", attention_bias=True, **WIDE)
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 8192)
    receipt = edgeport.export(model=base, output=tmp_path / "out", to="hf", quant=f"gptq-{bits}")
    assert {fact.stored for fact in receipt.facts} == {f"GPTQ_{bits}", "BF16"}
    assert told(tmp_path / "out") | {"meta": None} == {
        "bits": bits, "checkpoint_format": "gptq", "desc_act": False, "group_size": 64, "lm_head": False, "meta": None,
        "pack_dtype": "int32", "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    plain = load_file(base / "model.safetensors")
    stored = layers(tmp_path / "out")
    assert len(stored) == 14
    source = open_model(tmp_path / "out")
    for layer, tensors in stored.items():
        weight = source.weights[f"{layer}.weight"]
        values = dequantized(tensors, bits, 1)
        assert torch.equal(decode_rows(source, weight, range(weight.rows)), values)
        exact = plain[f"{layer}.weight"].float()
        step = tensors["scales"].float().t().repeat_interleave(64, 1)
        # to nearest, but where the largest value of a symmetric group lies half a step beyond the last code
        assert ((values - exact).abs() <= step * (0.501 + (exact > 0) * 0.5)).all()
    assert all(name in plain for name in source.weights if "proj" not in name)


@pytest.mark.parametrize(("group", "act_order", "version"), [(32, False, 1), (32, True, 1), (32, True, 2), (-1, False, 2)])
def test_a_patched_base_keeps_everything_but_codes(
    group: int, act_order: bool, version: int, tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = tiny_llama(dtype="float16", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=["q_proj", "down_proj"])
    base = quantized_folder(plain, tmp_path / "quantized", Packing(4, group, False, version, act_order))
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 1024)
    receipt = edgeport.port(patch=f"{patch}:0.01", new_base=base, output=tmp_path / "out")
    assert receipt.survival is not None and receipt.survival["mean"] > 0.8
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and len(changed) == 4
    assert all(name.endswith(("q_proj.qweight", "down_proj.qweight")) for name in changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    # the same bytes in one block
    monkeypatch.undo()
    edgeport.port(patch=f"{patch}:0.01", new_base=base, output=tmp_path / "whole")
    assert read_tensors(tmp_path / "whole") == after


def test_nearest_rounding_keeps_the_groups_of_act_order(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Its scales cannot be made anew, so values go to the nearest codes of those that are there."""
    plain = tiny_llama(dtype="float16", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=LINEAR)
    base = quantized_folder(plain, tmp_path / "quantized", Packing(4, 32, False, 1, True))
    with pytest.raises(PatchLost, match="rounding"):
        edgeport.port(patch=f"{patch}:0.001", new_base=base, output=tmp_path / "out", rounding="nearest")
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", rounding="nearest")
    assert receipt.survival is not None and receipt.survival["mean"] > 0.5
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{name}.qweight" for name in layers(base)}


def test_a_patch_beside_the_base(tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors) -> None:
    plain = tiny_llama(dtype="float16", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=LINEAR)
    base = quantized_folder(plain, tmp_path / "quantized", Packing(4, 32, False, 1, True))
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", sidecar=True, probe=False)
    assert receipt.survival is not None and receipt.survival["min"] > 0.999
    assert read_tensors(tmp_path / "out") == read_tensors(base)


def test_to_other_formats_and_back(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    plain = tiny_llama(dtype="float16", **WIDE)
    base = quantized_folder(plain, tmp_path / "quantized", Packing(3, 32, False, 2, True))
    edgeport.export(model=base, output=tmp_path / "plain", to="hf", quant="f32")
    values = load_file(tmp_path / "plain" / "model.safetensors")
    for layer, tensors in layers(base).items():
        assert torch.equal(values[f"{layer}.weight"], dequantized(tensors, 3, 2))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.float32
    for quant, action in (("gptq-3", "recode"), ("gptq-8", "recode"), ("nf4", "recode")):
        receipt = edgeport.export(model=base, output=tmp_path / quant, to="hf", quant=quant)
        assert {fact.action for fact in receipt.facts if "proj" in fact.weight} == {action}
    assert told(tmp_path / "nf4")["quant_method"] == "bitsandbytes" and told(tmp_path / "gptq-3")["desc_act"] is False
    receipt = edgeport.export(model=tmp_path / "gptq-3", output=tmp_path / "again", to="hf", quant="gptq-3")
    assert {fact.action for fact in receipt.facts} == {"copy"}


def test_a_layer_that_dynamic_says_otherwise_of(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized_folder(tiny_llama(dtype="float16", **WIDE), tmp_path / "quantized", Packing(4, 32))
    tensors = load_file(base / "model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    own, values = random_layer((128, 128), Packing(8, 64))
    save_file({**tensors, **{f"{layer}.{role}": tensor for role, tensor in own.items()}}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*nothing": {}, r"+:.*\.0\..*q_proj": {"bits": 8, "group_size": 64}}
    (base / "config.json").write_text(json.dumps(config))
    source = open_model(base)
    weight = source.weights[f"{layer}.weight"]
    assert weight.format == "GPTQ_8" and torch.equal(decode_rows(source, weight, range(128)), values)


@pytest.mark.skipif(
    find_spec("gptqmodel") is None or find_spec("optimum") is None, reason="gptqmodel and optimum are not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_runs_an_export_through_gptqmodel(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="float16", **WIDE)
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="gptq-4")
    edgeport.export(model=tmp_path / "out", output=tmp_path / "plain", to="hf", quant="f16")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float16)(ids).logits.float()
            for name in ("out", "plain")
        )
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


# ---------------------------------------------------------------- what is refused


NAME = "model.layers.0.mlp.down_proj"
DAMAGE: dict[str, tuple[Callable[[Tensors], Any], type[EdgeportError], str]] = {
    "scales of another shape": (
        lambda t: t.update({f"{NAME}.scales": torch.ones(7, 128).half()}), CorruptCheckpoint, "takes F16 [6, 128]"),
    "zeros of another shape": (
        lambda t: t.update({f"{NAME}.qzeros": torch.ones(6, 15).int()}), CorruptCheckpoint, "takes I32 [6, 16]"),
    "no scales": (lambda t: t.pop(f"{NAME}.scales"), CorruptCheckpoint, "lacks a qweight"),
    "no zeros": (lambda t: t.pop(f"{NAME}.qzeros"), CorruptCheckpoint, "qzeros is missing"),
    "no codes": (lambda t: t.pop(f"{NAME}.qweight"), CorruptCheckpoint, "lacks a qweight"),
    "codes of another type": (
        lambda t: t.update({f"{NAME}.qweight": torch.ones(24, 128).long()}), CorruptCheckpoint, "is I64 [24, 128]"),
    "scales that are no numbers": (
        lambda t: t.update({f"{NAME}.scales": torch.ones(6, 128).int()}), CorruptCheckpoint, "scales in one of"),
    "g_idx of another length": (
        lambda t: t.update({f"{NAME}.g_idx": torch.zeros(191).int()}), CorruptCheckpoint, "takes I32 [192]"),
    "g_idx too large": (
        lambda t: t[f"{NAME}.g_idx"].__setitem__(3, 6), CorruptCheckpoint, "names group 6, and there are 6"),
    "g_idx negative": (lambda t: t[f"{NAME}.g_idx"].__setitem__(3, -1), CorruptCheckpoint, "names group -1"),
    "rows that fill no word": (
        lambda t: t.update({f"{NAME}.qweight": torch.ones(24, 127).int()}), BlockMismatch, "127 rows are no multiple of 8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_is_refused_by_name(damage: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized_folder(tiny_llama(dtype="float16", **WIDE), tmp_path / "quantized", Packing(4, 32))
    tensors = load_file(base / "model.safetensors")
    change, error, says = DAMAGE[damage]
    change(tensors)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(error) as caught:
        open_model(base)
    assert says in str(caught.value) and NAME in str(caught.value)


@pytest.mark.parametrize(
    "lie",
    [{"bits": 5}, {"bits": "4"}, {"bits": None}, {"bits": 4.0}, {"checkpoint_format": "marlin"}, {"group_size": 0},
     {"group_size": "128"}, {"pack_dtype": "int16"}, {"dynamic": [1]}, {"dynamic": {"+:(": {}}}],
    ids=str,
)  # fmt: skip
def test_a_kind_that_is_not_read_is_refused(lie: dict[str, Any], tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized_folder(tiny_llama(dtype="float16", **WIDE), tmp_path / "quantized", Packing(4, 32))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= lie
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AmbiguousFormat, match="quantization_config"):
        open_model(base)


def test_a_config_that_disagrees_with_its_tensors_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = quantized_folder(tiny_llama(dtype="float16", **WIDE), tmp_path / "quantized", Packing(4, 32))
    config = json.loads((base / "config.json").read_text())
    for lie in ({"bits": 8}, {"bits": 2}, {"group_size": 64}, {"group_size": -1}):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | lie}))
        with pytest.raises(CorruptCheckpoint, match=r"as quantization_config says\) takes"):
            open_model(base)


def test_layers_that_fill_no_word_are_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(BlockMismatch, match=r"proj.weight: its 80 rows are no multiple of 32"):
        edgeport.export(model=tiny_llama(hidden=80), output=tmp_path / "out", to="hf", quant="gptq-3")
