"""On a CUDA device: every codec and rounding against the same on the CPU, and device memory against the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

import edgeport
from bench.shapes import Shape, write_model, write_patch
from edgeport.blocks import decode_rows
from edgeport.locate import open_model
from edgeport.memory import MIB
from edgeport.registry import codec, codecs
from edgeport.rounding import Inputs, on_grid
from edgeport.rounding.patch_aware import rounding as patch_aware
from tests.conftest import TinyLlama
from tests.streams import normal, streamed
from tests.test_adapter import save_patch

pytestmark = pytest.mark.gpu

# ggml's own encoder works on the CPU alone; its grids are in `test_grids`
OWNERS = [owner for owner in codecs().values() if owner.name != "ggml"]
FORMATS = [(owner.name, format) for owner in OWNERS for format, can in owner.formats.items() if can == "rw"]
QUANTS = dict.fromkeys(("bf16", "nf4", "nf4-dq", "int8", "gptq-4", "awq-4", "w4a16", "fp8-dynamic"), "hf")
QUANTS |= dict.fromkeys(("Q4_0", "Q4_K_M", "Q8_0"), "gguf")


@pytest.mark.parametrize(("name", "format"), FORMATS)
def test_a_codec_stores_and_reads_the_same_bits(name: str, format: str) -> None:
    owner, matrix = codec(name), normal(128, 256)
    weight = owner.layout("model.layers.0.mlp.up_proj.weight", (128, 256), format)
    here, there = streamed(owner, weight, matrix, 32), streamed(owner, weight, matrix.cuda(), 32)
    for role, data in here.items():
        differ = (there[role].cpu() != data).float().mean()
        assert differ <= 1e-3, (role, float(differ))
    # bitsandbytes' state is read where it was made
    decoded = owner.decode(weight, {role: data if role == "state" else data.cuda() for role, data in here.items()})
    assert decoded.is_cuda and torch.equal(decoded.cpu(), owner.decode(weight, here))


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"])
def test_patch_aware_serves_the_layers_outputs_as_well_as_on_the_cpu(format: str) -> None:
    ggml = codec("ggml")
    weight = ggml.layout("w", (256, 1024), format)
    parts = ggml.encode(weight, normal(256, 1024), None)
    inputs = (normal(512, 64) @ normal(64, 1024, 1) * 2500 + normal(512, 1024, 2) * 15).bfloat16()
    change = 0.0005 * normal(256, 1024, 3) / 0.02
    errors = {}
    for device in ("cpu", "cuda"):
        grid = cast(Any, ggml).grid(weight, {role: data.to(device) for role, data in parts.items()})
        target = grid.values() + change.to(device)
        seen = Inputs(inputs.to(device), float(inputs.float().square().mean()))
        codes = on_grid(patch_aware, grid, target, "w", 0, seen)
        errors[device] = float(((grid.values(codes) - target).cpu().double() @ inputs.double().T).square().mean())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)


def values(model: Path) -> dict[str, torch.Tensor]:
    source = open_model(model)
    return {name: decode_rows(source, weight, range(weight.rows)) for name, weight in source.weights.items()}


def differing(here: torch.Tensor, there: torch.Tensor, rounding: str) -> float:
    """The share of values that are others, to the share that may be."""
    if rounding == "patch-aware":
        # the inputs' last bits differ, and with them scales' last bits and what the descent finds
        return float((~torch.isclose(here, there, rtol=1e-2, atol=1e-6)).float().mean()) / 0.1
    return float((here != there).float().mean()) / 2e-3


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "patch-aware"])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_port_is_the_cpus_but_for_ties(quant: str, rounding: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    plain = tiny_llama("plain", hidden=256, dtype="bfloat16")
    places = {name: tmp_path / (f"{name}.gguf" if QUANTS[quant] == "gguf" else name) for name in ("base", "cpu", "cuda")}
    edgeport.export(model=plain, output=places["base"], to=QUANTS[quant], quant=quant, device="cpu")
    patch = save_patch(plain, tmp_path / "patch")
    receipts = {
        device: edgeport.port(
            patch=patch, new_base=places["base"], output=places[device], to=QUANTS[quant], device=device, rounding=rounding,
            max_vram="256MiB", force=True, probe=False,
        )
        for device in ("cpu", "cuda")
    }  # fmt: skip
    assert receipts["cpu"].peak_vram_bytes == 0 < receipts["cuda"].peak_vram_bytes <= 256 * MIB
    here, there = values(places["cpu"]), values(places["cuda"])
    assert here.keys() == there.keys()
    for name, matrix in here.items():
        assert differing(matrix, there[name], rounding) <= 1, name
    if receipts["cpu"].survival:
        assert receipts["cuda"].survival["mean"] == pytest.approx(receipts["cpu"].survival["mean"], abs=0.02)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "patch-aware"])
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_scales_that_are_made_anew_on_the_cpu(quant: str, rounding: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """ggml's encoder knows no device: what it gives goes back to where the values are."""
    plain = tiny_llama("plain", hidden=256, dtype="bfloat16")
    patch = save_patch(plain, tmp_path / "patch")
    ports = {
        device: edgeport.port(
            patch=patch, new_base=plain, output=tmp_path / f"{device}.gguf", to="gguf", quant=quant, device=device,
            rounding=rounding, force=True, probe=False,
        ).output
        for device in ("cpu", "cuda")
    }  # fmt: skip
    here, there = values(ports["cpu"]), values(ports["cuda"])
    assert all(differing(matrix, there[name], rounding) <= 1 for name, matrix in here.items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("quant", [None, "nf4", "gptq-4"])
def test_device_memory_stays_below_the_plan(quant: str | None, rounding: str, tmp_path: Path) -> None:
    shape = Shape(1024, 2, 2816, 8192, 16, 4)
    base, patch = write_model(shape, tmp_path / "base", None), write_patch(shape, tmp_path / "patch")
    if quant:
        edgeport.export(model=base, output=tmp_path / "quantized", to="hf", quant=quant, device="cpu")
        base = tmp_path / "quantized"
    for limit in (120, 400):
        options: dict[str, Any] = {
            "patch": patch, "new_base": base, "output": tmp_path / "out", "device": "cuda", "rounding": rounding,
            "max_vram": limit * MIB, "overwrite": True, "force": True, "probe": False,
        }  # fmt: skip
        planned = edgeport.plan(**options).peak_vram_bytes
        receipt = edgeport.port(**options)
        assert 0 < receipt.peak_vram_bytes <= planned <= limit * MIB
