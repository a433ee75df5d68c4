"""Scales given anew: every codec stores what the grid says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeport.grid import Grid, Rescalable, said
from edgeport.registry import codec
from edgeport.seams import Finishing

ROWS, COLUMNS = 64, 256
FORMATS = [
    *(("ggml", format) for format in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")), ("bnb4", "NF4"), ("bnb4", "FP4"),
    ("gptq", "GPTQ_4"), ("gptq", "GPTQ_3"), ("awq", "AWQ_4"), ("packed", "W4A16"), ("packed", "W8A16"),
    ("nbits", "NBITS4"), ("nbits", "NBITS4_ZP"), ("ggml", "Q4_K"), ("ggml", "Q5_K"), ("ggml", "Q6_K"), ("bnb4", "NF4_DQ"),
]  # fmt: skip
FIXED = [("ggml", "Q2_K"), ("ggml", "MXFP4"), ("int8", "LLM_INT8")]


def stored(owner: str, format: str, columns: int = COLUMNS) -> tuple[object, object, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    found = codec(owner)
    weight = found.layout("model.layers.0.mlp.up_proj.weight", (ROWS, columns), format)
    matrix = torch.randn(ROWS, columns) * 0.02 + 0.003
    parts = dict(found.encode(weight, matrix, None))
    if parts.keys() - weight.parts.keys():
        assert isinstance(found, Finishing)
        parts |= found.finish(weight, {role: parts.pop(role) for role in parts.keys() - weight.parts.keys()})
    return found, weight, parts


@pytest.mark.parametrize(("owner", "format"), FORMATS)
def test_new_scales_are_stored_and_nothing_else_changes(owner: str, format: str) -> None:
    found, weight, parts = stored(owner, format)
    assert isinstance(found, Rescalable)
    grid: Grid = found.grid(weight, parts)  # type: ignore[attr-defined]
    assert grid.scales is not None
    same = found.with_scales(weight, parts, grid)  # type: ignore[arg-type]
    assert all(torch.equal(same[role].view(-1), parts[role].view(-1)) for role in parts)
    step = said(grid.step * torch.linspace(0.9, 1.1, grid.step.numel()).view_as(grid.step), grid.scales)
    offset = grid.offset * (step / grid.step)
    if grid.shifts is not None:
        offset = said(grid.offset + 0.2 * grid.step, grid.shifts)
    other = replace(grid, step=step, offset=offset)
    assert not torch.equal(step, grid.step)
    moved = found.with_scales(weight, parts, other)  # type: ignore[arg-type]
    assert torch.allclose(found.decode(weight, moved), other.values(), rtol=1e-5, atol=1e-8)  # type: ignore[attr-defined]
    assert torch.equal(found.grid(weight, moved).codes, grid.codes)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("owner", "format"), FIXED)
def test_scales_that_others_depend_on_stay(owner: str, format: str) -> None:
    found, weight, parts = stored(owner, format)
    assert found.grid(weight, parts).scales is None  # type: ignore[attr-defined]


def test_blocks_that_go_on_in_the_next_row_keep_their_scales() -> None:
    found, weight, parts = stored("bnb4", "NF4", columns=96)
    assert found.grid(weight, parts).scales is None  # type: ignore[attr-defined]


def test_a_grid_of_some_columns_is_the_grid_there() -> None:
    found, weight, parts = stored("gptq", "GPTQ_4")
    grid: Grid = found.grid(weight, parts)  # type: ignore[attr-defined]
    whole = grid.values()
    for some in (slice(0, 128), slice(128, 256), slice(64, 256), slice(192, 224)):
        assert torch.equal(grid.of_columns(some).values(), whole[:, some])
    grid.of_columns(slice(128, 256)).step.mul_(2)
    assert torch.equal(grid.values()[:, :128], whole[:, :128]) and not torch.equal(grid.values(), whole)
    assert grid.of_columns(slice(64, 128)).scales is None
