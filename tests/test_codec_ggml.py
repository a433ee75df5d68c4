"""ggml's types against gguf-py, against ggml itself, and against blocks computed by hand."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from edgeport.codecs import ggml
from edgeport.codecs.ggml import TYPES, codec
from edgeport.errors import BlockMismatch, CodecError, DecodeOnly, MissingExtra, NonFiniteResult, UnknownName

WRITABLE = [format for format, block in TYPES.items() if block.can == "rw"]
READABLE = [format for format, block in TYPES.items() if block.can]
# root mean square error relative to the weights', for normal weights: a little above what each type reaches
ERRORS = {
    "Q4_0": 0.11, "Q4_1": 0.10, "Q5_0": 0.06, "Q5_1": 0.05, "Q8_0": 0.01, "Q2_K": 0.35, "Q3_K": 0.18,
    "Q4_K": 0.09, "Q5_K": 0.05, "Q6_K": 0.03, "IQ4_NL": 0.10, "IQ4_XS": 0.10,
    "TQ1_0": 0.85, "TQ2_0": 0.85, "MXFP4": 0.16,
}  # fmt: skip


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def encode(format: str, matrix: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    weight = codec.layout("w", tuple(matrix.shape), format)
    stored = codec.encode(weight, matrix, importance)["data"]
    assert stored.dtype == torch.uint8 and stored.numel() == weight.nbytes
    return stored


def decode(format: str, shape: tuple[int, ...], stored: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.layout("w", shape, format), {"data": stored})


def test_block_q4_0_by_hand() -> None:
    # the value of largest magnitude, -4, becomes code 0: d = -4 / -8 = 0.5, code = value / d + 8
    row = torch.tensor([[-4.0, 3.5, 0.0, 1.0] + [0.5] * 12 + [-0.5] * 16])
    stored = bytes(encode("Q4_0", row).tolist())
    # a byte holds column i in its low half and column i + 16 in its high half
    assert stored == bytes.fromhex("0038") + bytes([0x70, 0x7F, 0x78, 0x7A] + [0x79] * 12)
    assert torch.equal(decode("Q4_0", (1, 32), torch.tensor(list(stored), dtype=torch.uint8)), row)


def test_block_q8_0_by_hand() -> None:
    # d = 127 / 127 = 1: codes are the values
    row = torch.tensor([[127.0, -127.0, 1.0, -1.0] + [0.0] * 28])
    stored = bytes(encode("Q8_0", row).tolist())
    assert stored == struct.pack("<e32b", 1.0, 127, -127, 1, -1, *[0] * 28)
    assert torch.equal(decode("Q8_0", (1, 32), torch.tensor(list(stored), dtype=torch.uint8)), row)


def test_types_agree_with_gguf_py_and_with_the_library() -> None:
    library = ggml.library()
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    for format, block in TYPES.items():
        assert library.ggml_type_name(block.id).decode().upper() == format
        assert (library.ggml_blck_size(block.id), library.ggml_type_size(block.id)) == (
            block.size,
            block.nbytes,
        )
        # gguf-py keeps Q8_1 as it was before its scales became float16
        if format != "Q8_1" and block.id in iter(gguf.GGMLQuantizationType):
            kind = gguf.GGMLQuantizationType(block.id)
            assert kind.name == format and gguf.GGML_QUANT_SIZES[kind] == (block.size, block.nbytes)
        if block.can == "rw":
            assert not library.ggml_quantize_requires_imatrix(block.id)


def test_claims_nothing() -> None:
    assert list(codec.claim({}, {}, lambda name: b"")) == []


def test_layout() -> None:
    weight = codec.layout("blk", (3, 2, 512), "Q6_K")
    part = weight.parts["data"]
    assert (weight.codec, weight.format, weight.granule, weight.rows) == ("ggml", "Q6_K", 1, 6)
    assert (part.spec.name, part.spec.dtype, part.stride, part.spec.nbytes) == ("blk", "Q6_K", 420, 6 * 420)
    assert part.span(range(2, 4), 1) == (840, 1680)
    assert codec.layout("v", (64,), "Q8_0").nbytes == 68


def test_a_row_that_does_not_divide_into_blocks() -> None:
    with pytest.raises(
        BlockMismatch, match=r"rows of 96 columns .* Q4_K's blocks of 256; Q4_0, .*Q8_0.* would fit"
    ):
        codec.layout("w", (4, 96), "Q4_K")
    with pytest.raises(BlockMismatch, match="; F16, BF16 or F32 would fit"):
        codec.layout("w", (4, 7), "Q8_0")
    with pytest.raises(BlockMismatch):
        codec.layout("w", (), "Q8_0")


def test_an_unknown_type() -> None:
    with pytest.raises(UnknownName, match="Q9_K"):
        codec.layout("w", (1, 256), "Q9_K")


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_bytes_equal_gguf_py(format: str) -> None:
    matrix = normal(37, 512)
    reference = gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType(TYPES[format].id))
    assert np.array_equal(encode(format, matrix).numpy(), reference.ravel())


@pytest.mark.parametrize("format", WRITABLE)
def test_error_bound(format: str) -> None:
    matrix = normal(64, 512)
    restored = decode(format, (64, 512), encode(format, matrix))
    assert restored.dtype == torch.float32 and restored.shape == matrix.shape
    assert ((restored - matrix).square().mean() / matrix.square().mean()).sqrt() < ERRORS[format]


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_independent(format: str, weighted: bool) -> None:
    matrix, importance = normal(9, 512), normal(1, 512, 1)[0].square() if weighted else None
    whole = encode(format, matrix, importance)
    assert torch.equal(whole, torch.cat([encode(format, row[None], importance) for row in matrix]))


@pytest.mark.parametrize("format", WRITABLE)
def test_threads_leave_no_trace(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(13, 512)
    stored = []
    for count in (1, 2, 5, 64):
        monkeypatch.setattr(ggml, "cores", lambda count=count: count)
        stored.append(encode(format, matrix))
    assert all(torch.equal(stored[0], other) for other in stored[1:])


@pytest.mark.parametrize(
    "format", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
)
def test_importance_moves_the_error(format: str) -> None:
    matrix, importance = normal(32, 512), torch.full((512,), 0.01)
    importance[::8] = 100.0
    plain, weighted = encode(format, matrix), encode(format, matrix, importance)
    assert not torch.equal(plain, weighted)
    errors = [
        (decode(format, (32, 512), stored) - matrix)[:, ::8].square().sum() for stored in (plain, weighted)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("format", WRITABLE)
def test_columns_of_no_importance_at_all_are_not_lost(format: str) -> None:
    """As in llama-imatrix's sums for channels that a text never moved: ggml's encoders write zeros for such blocks."""
    matrix, unheard = normal(8, 512), torch.ones(512)
    unheard[:288] = 0  # whole blocks, and of a K-quant's second block of 256 the first of its groups
    even = encode(format, matrix, torch.ones(512))
    assert torch.equal(encode(format, matrix, torch.zeros(512)), even)
    found, usual = (decode(format, (8, 512), stored) for stored in (encode(format, matrix, unheard), even))
    for some in (slice(0, 256), slice(256, 288), slice(288, 512)):
        assert (found - matrix)[:, some].norm() < 1.2 * (usual - matrix)[:, some].norm()


def test_importance_of_another_size() -> None:
    with pytest.raises(CodecError, match=r"importance has shape \(7,\).* 256 columns"):
        encode("Q4_K", normal(2, 256), torch.ones(7))


@pytest.mark.parametrize("format", WRITABLE)
def test_hard_rows(format: str) -> None:
    """Zeros, constants, a spike, huge and tiny values, zero importance: finite, and zero stays zero."""
    matrix = torch.zeros(7, 256)
    matrix[1] = 1.0
    matrix[2, 17] = -30000.0
    matrix[3] = 1e-30
    matrix[4] = normal(1, 256)[0] * 1e-7
    matrix[5] = torch.linspace(-20000, 20000, 256)
    matrix[6] = -1e-5
    for importance in (None, torch.zeros(256), torch.ones(256)):
        restored = decode(format, (7, 256), encode(format, matrix, importance))
        assert restored.isfinite().all()
        assert not restored[0].any()


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("exponent", range(4, 38, 3))
def test_a_value_beyond_the_scale(format: str, exponent: int) -> None:
    """Either the values survive or the error says that they do not."""
    matrix = normal(4, 256) * 10.0**exponent
    try:
        stored = encode(format, matrix)
    except NonFiniteResult as error:
        assert exponent >= 7 and format in str(error)
    else:
        assert exponent <= 16 and (decode(format, (4, 256), stored) - matrix).norm() < 0.9 * matrix.norm()


def test_no_number_is_refused() -> None:
    with pytest.raises(NonFiniteResult):
        encode("Q8_0", torch.full((1, 32), float("nan")))


@pytest.mark.parametrize("format", READABLE)
def test_decoding_equals_gguf_py(format: str) -> None:
    block = TYPES[format]
    stored = np.random.default_rng(3).integers(0, 256, 300 * block.nbytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        reference = gguf.dequantize(stored.reshape(300, -1), gguf.GGMLQuantizationType(block.id))
    restored = decode(format, (300, block.size), torch.from_numpy(stored)).numpy()
    assert np.array_equal(restored, reference, equal_nan=True)


@pytest.mark.parametrize("format", READABLE)
def test_decoding_equals_ggml(format: str) -> None:
    """ggml's own decoder, to the rounding of a product; on scales that are no NaN."""
    block = TYPES[format]
    stored = np.random.default_rng(4).integers(0, 0x3C, 64 * block.nbytes, dtype=np.uint8)
    reference = np.empty(64 * block.size, np.float32)
    suffix = format if format.endswith("_K") else format.lower()
    function = getattr(ggml.library(), "dequantize_row_" + (suffix[0].lower() + suffix[1:]))
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(stored.ctypes.data, reference.ctypes.data, reference.size)
    restored = decode(format, (64, block.size), torch.from_numpy(stored)).numpy().ravel()
    np.testing.assert_allclose(restored, reference, rtol=1e-5, atol=1e-6 * np.abs(reference).max())


def test_scratch_is_what_is_published() -> None:
    for format in READABLE:
        weight = codec.layout("w", (2048, 512), format)
        stored = torch.zeros(weight.nbytes, dtype=torch.uint8)
        codec.decode(weight, {"data": stored[: weight.nbytes // 64]})  # tables are built once
        tracemalloc.start()
        codec.decode(weight, {"data": stored})  # torch's own memory, the result, is not traced
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak / weight.elements <= codec.scratch, format


@pytest.mark.parametrize("format", [format for format, block in TYPES.items() if block.can != "rw"])
def test_not_everything_can_be_written(format: str) -> None:
    with pytest.raises(DecodeOnly, match=f"{format} can be read and not written"):
        encode(format, normal(1, 256))


@pytest.mark.parametrize("format", [format for format, block in TYPES.items() if not block.can])
def test_not_everything_can_be_decoded(format: str) -> None:
    with pytest.raises(DecodeOnly, match=f"{format} can be copied"):
        decode(format, (1, 256), torch.zeros(codec.layout("w", (1, 256), format).nbytes, dtype=torch.uint8))


def test_a_kernel_of_our_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml.KERNELS, "Q8_0", lambda matrix, importance: torch.zeros(34, dtype=torch.uint8))
    assert not encode("Q8_0", torch.ones(1, 32)).any()


def test_other_layouts_of_the_matrix() -> None:
    matrix = normal(256, 64)
    assert torch.equal(encode("Q4_K", matrix.T), encode("Q4_K", matrix.T.contiguous()))
    assert torch.equal(encode("Q4_K", matrix.T.double()), encode("Q4_K", matrix.T))


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml.library.cache_clear()
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeport\[gguf\]'"):
        encode("Q8_0", normal(1, 32))
    ggml.library.cache_clear()


def test_importing_the_codec_brings_neither_torch_nor_gguf() -> None:
    code = "import sys, edgeport.codecs.ggml; assert not {'torch', 'gguf', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
