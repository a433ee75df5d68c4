"""AWQ against AutoAWQ (transcribed below), compressed-tensors' own reader of it, and GPTQModel where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from edgeport.codecs import awq
from edgeport.codecs.awq import Grouping
from edgeport.errors import AmbiguousFormat, BlockMismatch, CorruptCheckpoint, EdgeportError, PatchLost
from edgeport.locate import open_model
from tests.conftest import TinyLlama
from tests.streams import Live, blocks_of, normal, streamed
from tests.test_codec_gptq import WIDE, ReadTensors, Tensors, parts_of, told
from tests.test_lora_against_peft import LINEAR, save_patch


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] to codes [n, 8 m]. Source: AutoAWQ 0.2.9 `packing_utils.unpack_awq`, `reverse_awq_order`."""
    codes = (words[:, :, None] >> torch.arange(0, 32, 4)[None, None, :]).to(torch.int8).view(len(words), -1)
    order = torch.arange(codes.shape[1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].view(-1)
    return codes[:, order] & 15


def packed(codes: torch.Tensor) -> torch.Tensor:
    """The inverse. Source: AutoAWQ 0.2.9 `WQLinear_GEMM.from_linear`."""
    words = torch.zeros((len(codes), codes.shape[1] // 8), dtype=torch.int32)
    for column in range(words.shape[1]):
        for place, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= codes[:, column * 8 + row].to(torch.int32) << place * 4
    return words


def dequantized(tensors: Tensors, group: int) -> torch.Tensor:
    """float32 [out, in]. Source: AutoAWQ 0.2.9 `packing_utils.dequantize_gemm`."""
    scales, zeros = (x.repeat_interleave(group, dim=0) for x in (tensors["scales"].float(), unpacked(tensors["qzeros"])))
    return ((unpacked(tensors["qweight"]) - zeros) * scales).t()


def random_layer(shape: tuple[int, int], group: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    words = (torch.randint(-(1 << 31), 1 << 31, (n, rows // 8), generator=generator) for n in (columns, columns // group))
    qweight, qzeros = (tensor.to(torch.int32) for tensor in words)
    scales = torch.rand((columns // group, rows), generator=generator).mul_(0.01).add_(0.001).half()
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def test_a_word_by_hand() -> None:
    weight = awq.lay_out("m", (8, 4), Grouping(4))
    # row r reaches from 0 to 15 with the step 1, and holds r in its second column
    matrix = torch.tensor([[0.0, row, 15.0, 1.0] for row in range(8)])
    parts = awq.codec.encode(weight, matrix, None)
    assert parts["qweight"].view(torch.int32).tolist() == [0, 0x75316420, -1, 0x11111111]
    assert parts["qzeros"].view(torch.int32).tolist() == [0] and parts["scales"].view(torch.float16).tolist() == [1.0] * 8
    assert torch.equal(awq.codec.decode(weight, parts), matrix)


SHAPES = [((96, 128), 32), ((8, 96), 96), ((40, 160), 20), ((64, 256), 128)]


@pytest.mark.parametrize(("shape", "group"), SHAPES, ids=str)
def test_tensors_of_autoawq_decode_to_the_bit(shape: tuple[int, int], group: int) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    tensors = random_layer(shape, group)
    values = dequantized(tensors, group)
    codes, scale, zero = converters.AutoAWQConverter(group_size=group)._convert_gemm_module(
        tensors["qweight"], tensors["scales"], tensors["qzeros"]
    )
    spread = (each.repeat_interleave(group, dim=1) for each in (zero.int(), scale.float()))
    assert torch.equal((codes.int() - next(spread)) * next(spread), values)
    weight = awq.lay_out("m", shape, Grouping(group))
    parts = parts_of(weight, tensors)
    assert torch.equal(torch.cat([awq.codec.decode(weight, some) for some in blocks_of(weight, parts, 16)]), values)
    grid = awq.codec.grid(weight, parts)
    assert torch.equal(grid.values(), values) and torch.equal(grid.codes, unpacked(tensors["qweight"]).t().to(torch.uint8))
    other = torch.randint(16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kept, moved = (awq.codec.with_codes(weight, parts, codes) for codes in (grid.codes, other))
    assert all(torch.equal(kept[role], parts[role]) for role in parts)
    assert torch.equal(moved["qweight"].view(torch.int32), packed(other.t()).view(-1))
    assert [role for role in parts if not torch.equal(moved[role], parts[role])] == ["qweight"]


@pytest.mark.parametrize(("shape", "group"), SHAPES, ids=str)
def test_rounding_is_to_the_nearest_code_of_the_scales_of_autoawq(shape: tuple[int, int], group: int) -> None:
    matrix = normal(*shape)
    matrix[0], matrix[1], matrix[2] = 0, matrix[1].abs(), -matrix[2].abs()
    weight = awq.lay_out("m", shape, Grouping(group))
    parts = streamed(awq.codec, weight, matrix, 16)
    # `AwqQuantizer.pseudo_quantize_tensor`
    w = matrix.reshape(-1, group)
    high, low = w.amax(dim=1, keepdim=True), w.amin(dim=1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-torch.round(low / scales)).clamp_(0, 15)
    codes = torch.clamp(torch.round(w / scales.half().float()) + zeros, 0, 15).view(shape)
    scales, zeros = scales.view(shape[0], -1), zeros.view(shape[0], -1)
    expected = {"qweight": packed(codes.t()), "qzeros": packed(zeros.t()), "scales": scales.t().half()}
    expected = parts_of(weight, expected)
    assert all(torch.equal(parts[role], expected[role]) for role in parts)


def test_scratch_is_what_is_published() -> None:
    weight, matrix, codec = awq.lay_out("m", (64, 8192), Grouping(128)), normal(64, 8192), awq.codec
    parts = parts_of(weight, random_layer((64, 8192), 128))
    codes, count = codec.grid(weight, parts).codes, matrix.numel()
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


def test_what_gptqmodel_itself_packed() -> None:
    packed_layer = load_file(Path(__file__).parent / "data" / "packed_with_gptqmodel.safetensors")
    weight = awq.lay_out("m", (32, 64), Grouping(32))
    values = awq.codec.decode(weight, parts_of(weight, {role: packed_layer[f"awq-4.{role}"] for role in weight.parts}))
    # the package reads in float16
    assert torch.equal(values.half(), packed_layer["awq-4.weight"].t())


# ---------------------------------------------------------------- folders


def layers(folder: Path) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, role = name.rpartition(".")
        if role in awq.PARTS:
            found.setdefault(layer, {})[role] = tensor
    return found


def test_an_export_is_what_autoawq_reads(tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(dtype="bfloat16", attention_bias=True, **WIDE)
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 2048)
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="awq-4")
    assert told(tmp_path / "out") == {
        "bits": 4, "group_size": 64, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm", "zero_point": True,
    }  # fmt: skip
    plain, source, stored = load_file(base / "model.safetensors"), open_model(tmp_path / "out"), layers(tmp_path / "out")
    assert len(stored) == 14
    for layer, tensors in stored.items():
        values, weight = dequantized(tensors, 64), source.weights[f"{layer}.weight"]
        assert torch.equal(decode_rows(source, weight, range(weight.rows)), values)
        step = tensors["scales"].float().t().repeat_interleave(64, 1)
        # a rounded zero leaves either end up to half a step outside
        assert ((values - plain[f"{layer}.weight"].float()).abs() <= step * 1.01).all()
    edgeport.export(model=tmp_path / "out", output=tmp_path / "plain", to="hf", quant="f32")
    decoded = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(decoded[f"{layer}.weight"], dequantized(tensors, 64)) for layer, tensors in stored.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").dtype == torch.float32


def test_a_patched_base_keeps_everything_but_codes_and_scales(
    tiny_llama: TinyLlama, tmp_path: Path, read_tensors: ReadTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_llama(dtype="float16", **WIDE)
    patch = save_patch(plain, tmp_path / "patch", target_modules=["q_proj", "down_proj"])
    edgeport.export(model=plain, output=tmp_path / "quantized", to="hf", quant="awq-4")
    with pytest.raises(PatchLost, match="rounding"):
        edgeport.port(patch=f"{patch}:0.001", new_base=tmp_path / "quantized", output=tmp_path / "out", rounding="nearest")
    monkeypatch.setattr(steps, "BLOCK_ELEMENTS", 1024)
    receipt = edgeport.port(patch=f"{patch}:0.01", new_base=tmp_path / "quantized", output=tmp_path / "out")
    assert receipt.survival is not None and receipt.survival["mean"] > 0.8
    before, after = read_tensors(tmp_path / "quantized"), read_tensors(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    scales = {name for name in changed if name.endswith(("q_proj.scales", "down_proj.scales"))}
    assert before.keys() == after.keys() and len(changed - scales) == 4 and scales
    assert all(name.endswith(("q_proj.qweight", "down_proj.qweight")) for name in changed - scales)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "quantized" / "config.json").read_bytes()


def test_a_quantized_head_becomes_plain_in_another_format(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="float16", **WIDE)
    edgeport.export(model=base, output=tmp_path / "quantized", to="hf", quant="awq-4")
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    head = random_layer((320, 128), 64)
    save_file({**tensors, **{f"lm_head.{role}": tensor for role, tensor in head.items()}}, file, {"format": "pt"})
    edgeport.export(model=tmp_path / "quantized", output=tmp_path / "out", to="hf", quant="gptq-4")
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found, dequantized(head, 64).half())
    receipt = edgeport.export(model=tmp_path / "quantized", output=tmp_path / "kept", to="hf")
    assert {fact.action for fact in receipt.facts} == {"copy"}


def test_an_unquantized_patch_is_added_before_rounding(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="bfloat16", **WIDE)
    patch = save_patch(base, tmp_path / "patch", target_modules=LINEAR)
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "out", quant="awq-4")
    assert receipt.survival and receipt.survival["mean"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel, through which transformers runs AWQ, is not installed")
@pytest.mark.filterwarnings("ignore")
def test_transformers_runs_an_export_through_gptqmodel(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="float16", **WIDE)
    edgeport.export(model=base, output=tmp_path / "out", to="hf", quant="awq-4")
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
DAMAGE: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "scales of another shape": (lambda t: t.update({f"{NAME}.scales": torch.ones(2, 128).half()}), "takes F16 [3, 128]"),
    "zeros of another shape": (lambda t: t.update({f"{NAME}.qzeros": torch.ones(3, 15).int()}), "takes I32 [3, 16]"),
    "no zeros": (lambda t: t.pop(f"{NAME}.qzeros"), "qzeros is missing"),
    "no codes": (lambda t: t.pop(f"{NAME}.qweight"), "lacks a qweight"),
    "codes of one dimension": (lambda t: t.update({f"{NAME}.qweight": torch.ones(24).int()}), "lacks a qweight"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_is_refused_by_name(damage: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    edgeport.export(model=tiny_llama(dtype="float16", **WIDE), output=tmp_path / "out", to="hf", quant="awq-4")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    change, says = DAMAGE[damage]
    change(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CorruptCheckpoint) as caught:
        open_model(tmp_path / "out")
    assert says in str(caught.value) and NAME in str(caught.value)


def test_a_kind_that_is_not_read_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    edgeport.export(model=tiny_llama(dtype="float16", **WIDE), output=tmp_path / "out", to="hf", quant="awq-4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    lies: list[tuple[dict[str, Any], type[EdgeportError]]] = [
        ({"bits": 8}, AmbiguousFormat), ({"version": "gemv_fast"}, AmbiguousFormat), ({"group_size": None}, AmbiguousFormat),
        ({"group_size": 100}, BlockMismatch), ({"group_size": 32}, CorruptCheckpoint),
    ]  # fmt: skip
    for lie, error in lies:
        quantization = config["quantization_config"] | lie
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(error):
            open_model(tmp_path / "out")


def test_layers_that_fill_no_word_are_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(BlockMismatch, match=r"proj.weight: its . rows are no multiple of 8"):
        edgeport.export(
            model=tiny_llama(hidden=16, head_dim=3), output=tmp_path / "out", to="hf", quant="awq-4"
        )
