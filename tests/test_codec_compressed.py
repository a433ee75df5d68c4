"""compressed-tensors' formats against compressed-tensors and transformers themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import edgeport
from edgeport import steps
from edgeport.blocks import decode_rows
from edgeport.codecs import fp8, packed
from edgeport.codecs.packed import Scheme
from edgeport.errors import AmbiguousFormat, BlockMismatch, CorruptCheckpoint, EdgeportError, PatchLost
from edgeport.locate import open_model
from edgeport.seams import Codec
from edgeport.tensor import Weight
from tests.conftest import TinyLlama
from tests.streams import Live, blocks_of, normal, streamed
from tests.test_codec_gptq import WIDE, ReadTensors, Tensors, told
from tests.test_lora_against_peft import LINEAR, save_patch

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

ROLES = {"weight_packed": "packed", "weight_scale": "scale", "weight_shape": "shape", "weight_zero_point": "zero_point"}


def scheme(how: Scheme | None) -> QuantizationScheme:
    """compressed-tensors' own description; None: FP8 by row."""
    if how is None:
        return preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    weights = QuantizationArgs(
        num_bits=how.bits, type="int", symmetric=how.symmetric, strategy="group", group_size=how.group, dynamic=False
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def compressor(how: Scheme | None) -> Any:
    return BaseCompressor.get_value_from_registry("float-quantized" if how is None else "pack-quantized")


def compressed(matrix: torch.Tensor, how: Scheme | None) -> Tensors:
    """A layer's tensors as compressed-tensors makes them."""
    weights = scheme(how).weights
    groups = matrix.unflatten(1, (-1, how.group if how else matrix.shape[1]))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), weights)
    state = {"weight": matrix, "weight_scale": scale, "weight_zero_point": zero}
    return dict(compressor(how).compress(state, scheme(how)))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def weights() -> list[tuple[Codec, Weight, Scheme | None]]:
    found: list[tuple[Codec, Weight, Scheme | None]] = []
    for shape, group in (((96, 128), 32), ((30, 100), 100), ((11, 260), 20), ((64, 48), 48)):
        for bits in packed.BITS:
            for symmetric in (True, False):
                how = Scheme(bits, group, symmetric, scales="F32")
                found.append((packed.codec, packed.lay_out("m", shape, how), how))
        found.append((fp8.codec, fp8.of_shape("m.weight", shape, "F32"), None))
    return found


@pytest.mark.parametrize(("codec", "weight", "how"), weights(), ids=lambda value: str(getattr(value, "shape", "")))
def test_tensors_equal_those_of_compressed_tensors(codec: Any, weight: Weight, how: Scheme | None) -> None:
    matrix = normal(*weight.shape)
    matrix[0], matrix[1], matrix[2] = 0, matrix[1].abs(), -matrix[2].abs()
    parts = streamed(codec, weight, matrix, 16)
    expected = compressed(matrix, how)
    stored = {part.spec.name.removeprefix("m."): (part.spec, parts[role]) for role, part in weight.parts.items()}
    assert stored.keys() == {name for name, tensor in expected.items() if tensor is not None}
    for name, (spec, data) in stored.items():
        other = expected[name]
        assert (spec.shape, spec.nbytes) == (tuple(other.shape), other.nbytes), name
        if how is not None and not how.symmetric and name != "weight_shape":
            continue  # a row of zeros divides 0 by 0 there
        assert torch.equal(data, bytes_of(other)), name
    if how is not None and not how.symmetric:
        alone = streamed(codec, packed.lay_out("m", weight.shape, how), matrix, 64)
        fine = [1, 2, *range(3, weight.shape[0])]
        ours, theirs = codec.decode(weight, alone)[fine], decompressed(expected, how)[fine]
        assert torch.equal(ours, theirs)
    values = torch.cat([codec.decode(weight, some) for some in blocks_of(weight, parts, 16)])
    assert torch.equal(values, decompressed({name: expected[name] for name in expected} | typed(weight, parts, expected), how))
    grid = codec.grid(weight, parts)
    # where zeros are not in the middle, float32 scales leave a sum of two rounded products
    close = 1e-7 * float(values.abs().max()) if how and not how.symmetric else 0.0
    assert torch.allclose(grid.values(), values, rtol=0, atol=close) and (grid.levels.diff() >= 0).all()
    other = torch.randint(len(grid.levels), weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kept, moved = (codec.with_codes(weight, parts, codes) for codes in (grid.codes, other))
    assert all(torch.equal(kept[role], parts[role]) for role in parts if role not in ("packed", "codes"))
    assert torch.equal(codec.decode(weight, kept), values)
    assert torch.allclose(codec.decode(weight, moved), grid.values(other), rtol=0, atol=4 * close)


def typed(weight: Weight, parts: Tensors, like: Tensors) -> Tensors:
    """Our parts as compressed-tensors has them."""
    names = {role: part.spec.name.removeprefix("m.") for role, part in weight.parts.items()}
    return {name: parts[role].view(like[name].dtype).view(like[name].shape) for role, name in names.items()}


def decompressed(tensors: Tensors, how: Scheme | None) -> torch.Tensor:
    found: torch.Tensor = compressor(how).decompress(tensors, scheme(how))["weight"]
    return found


def test_every_float8_has_its_place() -> None:
    weight = fp8.of_shape("m.weight", (1, 254), "F32")
    codes = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)
    parts = {"codes": codes, "scale": bytes_of(torch.tensor([[0.5]]))}
    grid = fp8.codec.grid(weight, parts)
    assert torch.equal(grid.values(), codes.view(torch.float8_e4m3fn).float()[None] * 0.5)
    assert sorted(grid.codes[0].tolist()) == list(range(254)) and grid.levels[0] == -448 and grid.levels[-1] == 448
    assert torch.equal(fp8.codec.with_codes(weight, parts, grid.codes)["codes"], codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_in_any_order_of_groups(act_order: bool) -> None:
    """As older releases dequantized a weight_g_idx: scale and zero of each column's group."""
    rows, columns, group = 16, 64, 16
    how = Scheme(4, group, False, act_order, "F32", True)
    weight = packed.lay_out("m", (rows, columns), how)
    matrix = normal(rows, columns)
    parts = packed.codec.encode(weight, matrix, None)
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
        parts = {**parts, "g_idx": bytes_of(index.int())}
    plain = packed.read(packed.lay_out("m", (rows, columns), Scheme(4, group, False, scales="F32")), parts)
    expected = (plain.codes - plain.zero[:, index]) * plain.scale[:, index]
    assert torch.equal(packed.codec.decode(weight, parts), expected)
    grid = packed.codec.grid(weight, parts)
    assert torch.allclose(grid.values(), expected, atol=1e-7) and grid.group == (1 if act_order else group)


@pytest.mark.parametrize(("codec", "weight"), [
    (packed.codec, packed.lay_out("m", (64, 8192), Scheme(4, 128))),
    (packed.codec, packed.lay_out("m", (64, 8192), Scheme(8, 128))),
    (packed.codec, packed.lay_out("m", (64, 8192), Scheme(4, 64, False))),
    (packed.codec, packed.lay_out("m", (64, 8192), Scheme(8, 64, True, True, "BF16", True))),
    (fp8.codec, fp8.of_shape("m.weight", (64, 8192), "BF16")),
], ids=lambda value: getattr(value, "format", ""))  # fmt: skip
def test_scratch_is_what_is_published(codec: Any, weight: Weight) -> None:
    matrix, count = normal(*weight.shape), weight.elements
    parts = codec.encode(weight, matrix, None)
    codes = codec.grid(weight, parts).codes
    works: list[tuple[Callable[[], Any], float]] = [
        (lambda: codec.decode(weight, parts), 4 + codec.scratch),
        (lambda: codec.encode(weight, matrix, None), weight.nbytes / count + codec.scratch),
        (lambda: codec.grid(weight, parts), steps.GRID_BYTES + codec.grid_scratch),
        (lambda: codec.with_codes(weight, parts, codes), weight.nbytes / count + codec.grid_scratch),
    ]
    for work, bound in works:
        with Live(matrix, codes, *parts.values()) as live:
            work()
        assert live.peak / count <= bound


# ---------------------------------------------------------------- folders


NAMES = {"w4a16": "W4A16", "w4a16-asym": "W4A16_ASYM", "w8a16": "W8A16", "fp8-dynamic": "FP8_DYNAMIC"}


def logits(folder: Path, **quantization: Any) -> torch.Tensor:
    config = AutoConfig.from_pretrained(folder)
    if quantization:
        config.quantization_config |= quantization
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 24)[None]).logits
    return found


@pytest.mark.parametrize("quant", NAMES)
def test_transformers_runs_an_export(quant: str, tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(dtype="float32", attention_bias=True, **WIDE)
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 2048)
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant=quant)
    config = told(tmp_path / "out")
    expected = preset_name_to_scheme(NAMES[quant], ["Linear"]).model_dump()
    own = config["config_groups"]["group_0"]
    group = {"group_size": 64} if "w" in quant else {}
    assert {key: own["weights"][key] for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")} | group == {
        key: expected["weights"][key] for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")
    } | group
    assert (own["input_activations"] is None) == (expected["input_activations"] is None)
    plain, source = load_file(base / "model.safetensors"), open_model(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    linear = {name: weight for name, weight in source.weights.items() if weight.codec != "plain"}
    assert len(linear) == 14 and not {f"{name}_scale" for name in linear} - stored.keys()
    how = None if quant.startswith("fp8") else Scheme(int(quant[1]), 64, "asym" not in quant, scales="F32")
    for name, weight in linear.items():
        layer = name.removesuffix("weight")
        tensors = {key.removeprefix(layer): tensor for key, tensor in stored.items() if key.startswith(f"{layer}weight")}
        values = decompressed(tensors, how)
        assert torch.equal(decode_rows(source, weight, range(weight.rows)), values)
        assert torch.equal(values, decompressed(compressed(plain[name], how), how))
    edgeport.export(model=tmp_path / "out", output=tmp_path / "plain", to="hf", quant="f32")
    # compressed-tensors 0.20 expects zero points unpacked in a model that is built on the meta device, and its own are packed
    found = logits(tmp_path / "out", **({"dequantize": True} if "asym" in quant else {}))
    exact = logits(tmp_path / "plain")
    # FP8_DYNAMIC rounds activations too
    assert (found - exact).norm() <= (0.06 if quant.startswith("fp8") else 1e-5) * exact.norm()


@pytest.mark.parametrize("quant", NAMES)
def test_a_patched_base_keeps_everything_but_codes_and_scales(
    quant: str, tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_llama(dtype="bfloat16", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=["q_proj", "down_proj"])
    base = tmp_path / "quantized"
    edgeport.export(model=plain, output=base, to="hf", quant=quant)
    if quant.startswith("w4"):
        with pytest.raises(PatchLost, match="rounding"):
            edgeport.port(patch=f"{patch}:0.001", new_base=base, output=tmp_path / "out", rounding="nearest")
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 1024)
    receipt = edgeport.port(patch=f"{patch}:0.01", new_base=base, output=tmp_path / "out")
    assert receipt.survival is not None and receipt.survival["mean"] > 0.8
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    scales = {name for name in changed if name.endswith("weight_scale")}
    assert before.keys() == after.keys() and len(changed - scales) == 4 and bool(scales) == quant.startswith("w")
    assert all(name.endswith(("weight_packed", "_proj.weight")) for name in changed - scales)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    edgeport.export(model=base, output=tmp_path / "again", to="hf", quant=quant)
    assert read_tensors(tmp_path / "again") == before


def static_folder(base: Path, folder: Path) -> Path:
    """The base with float8 layers of one scale each, and a scale for their inputs, as the preset FP8 stores them."""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    preset = preset_name_to_scheme("FP8", ["Linear"])
    quantization = fp8.quantization_config()
    quantization["config_groups"] = {"group_0": {**preset.model_dump(mode="json"), "format": "float-quantized"}}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    stored: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        stored[name] = tensor
        if "proj" in name:
            scale = (tensor.abs().max() / 448).view(1)
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            stored[name.replace("weight", "input_scale")] = torch.tensor([0.01], dtype=scale.dtype)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_one_scale_for_a_whole_weight_is_kept(tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors) -> None:
    plain = tiny_llama(dtype="float32", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=LINEAR)
    base = static_folder(plain, tmp_path / "quantized")
    before = read_tensors(base)
    for rounding in ("auto", "nearest"):
        receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / rounding, rounding=rounding)
        assert receipt.survival is not None and receipt.survival["mean"] > 0.7
        after = read_tensors(tmp_path / rounding)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if name.endswith("proj.weight")}
    edgeport.export(model=base, output=tmp_path / "plain", to="hf", quant="f32")
    values, stored = load_file(tmp_path / "plain" / "model.safetensors"), load_file(base / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.input_scale" not in values
    for name in (name for name in stored if name.endswith("proj.weight")):
        assert torch.equal(values[name], stored[name].float() * stored[f"{name}_scale"])
    assert logits(tmp_path / "auto").isfinite().all()


# ---------------------------------------------------------------- what is refused


NAME = "model.layers.0.mlp.down_proj"
DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "scales of another shape": (lambda t: t.update({f"{NAME}.weight_scale": torch.ones(7, 3)}), "takes F32 [128, 3]"),
    "more groups": (lambda t: t.update({f"{NAME}.weight_scale": torch.ones(128, 6)}), "in no scheme that"),
    "no scales": (lambda t: t.pop(f"{NAME}.weight_scale"), "lacks a weight_packed"),
    "no shape": (lambda t: t.pop(f"{NAME}.weight_shape"), "lacks a weight_packed"),
    "another shape": (lambda t: t.update({f"{NAME}.weight_shape": torch.tensor([128, 191])}), "in no scheme that"),
    "an impossible shape": (lambda t: t.update({f"{NAME}.weight_shape": torch.tensor([128, -192])}), "the impossible shape"),
    "a shape of other numbers": (lambda t: t.update({f"{NAME}.weight_shape": torch.ones(2)}), "two whole numbers"),
    "zeros of another shape": (
        lambda t: t.update({f"{NAME}.weight_zero_point": torch.ones(15, 3).int()}), "takes I32 [16, 3]"),
    "g_idx out of range": (lambda t: t.update({f"{NAME}.weight_g_idx": torch.full((192,), 3).int()}), "names group 3"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_is_refused_by_name(damage: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    edgeport.export(model=tiny_llama(**WIDE), output=tmp_path / "out", to="hf", quant="w4a16-asym")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    change, says = DAMAGE[damage]
    change(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CorruptCheckpoint) as caught:
        open_model(tmp_path / "out")
    assert says in str(caught.value) and NAME in str(caught.value)


def test_a_damaged_float8_weight_is_refused_by_name(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    edgeport.export(model=tiny_llama(**WIDE), output=tmp_path / "out", to="hf", quant="fp8-dynamic")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for scale in (None, torch.ones(3, 1), torch.ones(128, 1).int()):
        damaged = {name: tensor for name, tensor in tensors.items() if name != f"{NAME}.weight_scale"}
        damaged |= {} if scale is None else {f"{NAME}.weight_scale": scale}
        save_file(damaged, tmp_path / "out" / "model.safetensors")
        with pytest.raises(CorruptCheckpoint, match=NAME):
            open_model(tmp_path / "out")


def test_a_kind_that_is_not_read_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    edgeport.export(model=tiny_llama(**WIDE), output=tmp_path / "out", to="hf", quant="w4a16")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    lies: list[tuple[dict[str, Any], type[EdgeportError]]] = [
        ({"num_bits": 3}, AmbiguousFormat), ({"type": "float", "num_bits": 4}, AmbiguousFormat),
        ({"strategy": "block"}, AmbiguousFormat), ({"num_bits": 8}, CorruptCheckpoint), ({"group_size": 32}, CorruptCheckpoint),
    ]  # fmt: skip
    for lie, error in lies:
        changed = json.loads(json.dumps(config))
        changed["quantization_config"]["config_groups"]["group_0"]["weights"] |= lie
        file.write_text(json.dumps(changed))
        with pytest.raises(error):
            open_model(tmp_path / "out")
    for value in ({}, {"group_0": ["Linear"]}, [1]):
        file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | {"config_groups": value}}))
        with pytest.raises(AmbiguousFormat, match="quantization_config"):
            open_model(tmp_path / "out")


def test_the_other_symmetry_is_another_format(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """Both are called W4A16: a base of one is not the other for that."""
    base = edgeport.export(model=tiny_llama(**WIDE), output=tmp_path / "w4a16", to="hf", quant="w4a16").output
    for quant, zeros, action in (("w4a16-asym", True, "recode"), ("w4a16", False, "copy")):
        done = edgeport.export(model=base, output=tmp_path / f"to {quant}", to="hf", quant=quant)
        assert {fact.action for fact in done.facts if fact.weight == f"{NAME}.weight"} == {action}
        told = json.loads((done.output / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        assert told["weights"]["symmetric"] is not zeros
        assert (f"{NAME}.weight_zero_point" in load_file(done.output / "model.safetensors")) is zeros


def test_columns_that_are_no_groups_are_refused() -> None:
    with pytest.raises(BlockMismatch, match="100 columns are no multiple of 32"):
        packed.lay_out("m", (8, 100), Scheme(4, 32))
