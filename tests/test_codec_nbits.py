"""Block-quantized matrices against onnxruntime's own MatMulNBits, and one block by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgeport.codecs import ggml
from edgeport.codecs.nbits import BLOCK_SIZES, FORMATS, Blocks, codec, coded, extremes, lay_out
from edgeport.errors import BlockMismatch, CodecError, NonFiniteResult, UnknownName
from edgeport.tensor import Weight
from tests.streams import Live

ROWS, COLUMNS = 24, 384
SHAPES = [Blocks(bits, symmetric, size) for bits, symmetric in FORMATS.values() for size in BLOCK_SIZES]


def numbers(columns: int = COLUMNS) -> torch.Tensor:
    matrix = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    matrix[3] = 0.0
    matrix[4, :64] = 0.01  # a block of one value
    matrix[5] = matrix[5].abs()
    return matrix


def product(weight: Weight, parts: dict[str, torch.Tensor], how: Blocks, inputs: np.ndarray) -> Any:
    """What onnxruntime multiplies with, in float32 throughout."""
    arrays = {"B": parts["codes"].numpy().reshape(weight.rows, -1, how.size * how.bits // 8)}
    arrays["scales"] = parts["scales"].view(torch.float32).numpy().reshape(weight.rows, -1)
    if not how.symmetric:
        arrays["zeros"] = parts["zeros"].numpy().reshape(weight.rows, -1)
    constants = [helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.tobytes(), raw=True)
                 for name, a in arrays.items()]  # fmt: skip
    node = helper.make_node("MatMulNBits", ["A", *arrays], ["Y"], domain="com.microsoft", K=weight.columns, N=weight.rows,
                            bits=how.bits, block_size=how.size)  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("A", "Y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"A": inputs})[0]


@pytest.mark.parametrize("how", SHAPES, ids=str)
def test_onnxruntime_multiplies_with_the_decoded_values(how: Blocks) -> None:
    weight = lay_out("w", (ROWS, COLUMNS), how)
    parts = dict(codec.encode(weight, numbers(), None))
    assert {role: data.numel() for role, data in parts.items()} == {role: p.spec.nbytes for role, p in weight.parts.items()}
    inputs = np.random.default_rng(0).standard_normal((5, COLUMNS)).astype(np.float32)
    expected = inputs @ codec.decode(weight, parts).numpy().T
    np.testing.assert_allclose(product(weight, parts, how, inputs), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", SHAPES, ids=str)
def test_no_value_is_further_than_half_a_step(how: Blocks) -> None:
    weight = lay_out("w", (ROWS, COLUMNS), how)
    parts = codec.encode(weight, numbers(), None)
    step = codec.grid(weight, parts).step.abs().repeat_interleave(how.size, 1)
    error = (codec.decode(weight, parts) - numbers()).abs()
    # the end of the range that is opposite to the largest magnitude is one code short; a searched range cuts off some
    most = 1.0 if how.symmetric else 0.5 if how.bits == 8 else 4.0
    assert (error <= step * most + 1e-7).all()
    assert (error <= step * 0.5 + 1e-7).float().mean() > 0.9


@pytest.mark.parametrize("signed", [False, True])
def test_a_block_by_hand(signed: bool) -> None:
    how = Blocks(4, True, 16, signed=signed)
    weight = lay_out("w", (1, 16), how)
    # the largest magnitude is -4, so a step is 0.5 and its code 0; 1 is two steps above the middle, code 10
    matrix = torch.tensor([[-4.0, 1.0, 0.0, 0.5] + [0.0] * 12])
    parts = codec.encode(weight, matrix, None)
    turn = 0x88 if signed else 0
    assert parts["scales"].view(torch.float32).tolist() == [0.5]
    assert [byte ^ turn for byte in parts["codes"].tolist()] == [0xA0, 0x98] + [0x88] * 6
    assert torch.equal(codec.decode(weight, parts), matrix)


def test_zero_points_of_an_odd_number_of_blocks() -> None:
    weight = lay_out("w", (2, 48), Blocks(4, False, 16))
    # each block from 0 to 15 steps, shifted down by its number: zero points 0, 1, 2, and a half byte unused
    row = torch.cat([torch.arange(16.0) - block for block in range(3)])
    parts = codec.encode(weight, torch.stack([row, row]), None)
    assert parts["zeros"].tolist() == [0x10, 0x02] * 2
    assert parts["scales"].view(torch.float32).tolist() == [1.0] * 6
    assert torch.equal(codec.decode(weight, parts), torch.stack([row, row]))


def test_q4_0_blocks_come_through_unchanged() -> None:
    stored = ggml.codec.layout("w", (ROWS, COLUMNS), "Q4_0")
    values = ggml.codec.decode(stored, ggml.codec.encode(stored, numbers(), None))
    weight = lay_out("w", (ROWS, COLUMNS), Blocks(4, True))
    assert torch.equal(codec.decode(weight, codec.encode(weight, values, None)), values)


@pytest.mark.parametrize("how", [how for how in SHAPES if how.bits == 4], ids=str)
def test_a_search_lowers_the_weighted_error(how: Blocks) -> None:
    weight = lay_out("w", (ROWS, COLUMNS), how)
    matrix = numbers() + 0.1 * numbers().roll(7, 1) ** 2
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) ** 4

    def error(stored: Any) -> float:
        return float(((codec.decode(weight, stored) - matrix).square() * importance).sum())

    scales, zeros = (found.view(ROWS, -1) for found in extremes(matrix.view(-1, how.size), how))
    codes = coded(matrix.view(-1, how.size), scales.view(-1), zeros.view(-1), how).view(ROWS, -1, how.size)
    plain = ((codes - zeros.unsqueeze(2)) * scales.unsqueeze(2)).view(ROWS, COLUMNS)
    fixed = float(((plain - matrix).square() * importance).sum())
    assert error(codec.encode(weight, matrix, importance)) < 0.93 * fixed
    alike = torch.full((COLUMNS,), 0.5)
    assert error(codec.encode(weight, matrix, importance)) < error(codec.encode(weight, matrix, alike))
    with pytest.raises(CodecError, match=r"shape \(3,\), where rows have 384"):
        codec.encode(weight, matrix, importance[:3])


@pytest.mark.parametrize("how", SHAPES, ids=str)
def test_what_lies_on_a_grid_stays_there(how: Blocks) -> None:
    weight = lay_out("w", (ROWS, COLUMNS), how)
    stored = codec.encode(weight, numbers(), None)
    # each end of each block has a value, so that its extremes give the same grid
    codes = codec.grid(weight, stored).codes.view(ROWS, -1, how.size).clone()
    codes[..., 0], codes[..., 1] = 0, (1 << how.bits) - 1
    values = codec.decode(weight, codec.with_codes(weight, stored, codes.view(ROWS, -1)))
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2))
    for given in (None, importance):
        again = codec.decode(weight, codec.encode(weight, values, given))
        assert (again - values).abs().max() <= 1e-6 * values.abs().max()


def test_scratch_is_what_is_published() -> None:
    for how in (Blocks(4, True), Blocks(4, False), Blocks(8, True)):
        weight = lay_out("w", (256, 512), how)
        matrix = torch.randn(256, 512)
        importance = torch.rand(512)
        with Live(matrix, importance) as live:
            codec.encode(weight, matrix, importance)
        assert live.peak <= matrix.numel() * codec.scratch + weight.nbytes


@pytest.mark.parametrize(
    "how", [*SHAPES[::5], Blocks(4, True, scale="F16", signed=True), Blocks(8, False, scale="BF16")], ids=str
)
def test_codes_move_while_scales_stay(how: Blocks) -> None:
    weight = lay_out("w", (ROWS, COLUMNS), how)
    parts = codec.encode(weight, numbers(), None)
    grid = codec.grid(weight, parts)
    assert torch.equal(grid.levels.diff(), torch.ones(len(grid.levels) - 1)) and grid.group == how.size
    assert all(torch.equal(again, parts[role]) for role, again in codec.with_codes(weight, parts, grid.codes).items())
    codes = torch.randint(0, 1 << how.bits, grid.codes.shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    moved = codec.with_codes(weight, parts, codes)
    assert torch.equal(codec.decode(weight, moved), grid.values(codes))
    assert all(torch.equal(moved[role], parts[role]) for role in parts if role != "codes")


def test_mistakes_are_named() -> None:
    with pytest.raises(BlockMismatch, match="give --block-size 16 or 32"):
        lay_out("w", (2, 96), Blocks(4, True, 64))
    with pytest.raises(BlockMismatch, match="give --quant fp16"):
        lay_out("w", (2, 40), Blocks(4, True))
    with pytest.raises(BlockMismatch, match=r"3 blocks of 32.*CUDA kernels misread.*--asymmetric"):
        lay_out("w", (2, 96), Blocks(4, False, 32, "F16"))
    with pytest.raises(UnknownName, match="blocks of 48"):
        lay_out("w", (2, 96), Blocks(4, True, 48))
    weight = lay_out("w", (1, 32), Blocks(8, True, scale="F16"))
    with pytest.raises(NonFiniteResult, match="does not fit F16"):
        codec.encode(weight, torch.full((1, 32), 1e7 * 2), None)
