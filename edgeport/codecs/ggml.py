"""ggml's quantized types: a weight is one stored tensor, its rows cut into blocks with scales of their own.

    a row:    | block | block | ... |        block: | scales, minima | packed codes |
    columns:  |  32   |  32   |            (Q4_0)   |  d: float16    | 32 x 4 bits  |

gguf-py decodes; libggml-base encodes, so that the bytes are those of llama-quantize.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.codecs.ggml_grids import LAYOUTS, Layout, pack, rescale, unpack
from edgeport.errors import (
    BlockMismatch,
    CodecError,
    DecodeOnly,
    MissingExtra,
    NonFiniteResult,
    UnknownName,
    need,
)
from edgeport.memory import cores
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from edgeport.grid import Grid


@dataclass(frozen=True, slots=True)
class Block:
    """A type as `enum ggml_type` and ggml-common.h have it: its number, elements and bytes a block.

    `can`: "rw" read and write, "r" read only, "" copied only.
    """

    id: int
    size: int
    nbytes: int
    can: str


# Read only: the types whose encoder needs an importance matrix or aborts the process on a point off its grid,
# and NVFP4, whose second scale is a tensor of its own. Copied only: what gguf-py cannot decode.
TYPES = {
    "Q4_0": Block(2, 32, 18, "rw"),
    "Q4_1": Block(3, 32, 20, "rw"),
    "Q5_0": Block(6, 32, 22, "rw"),
    "Q5_1": Block(7, 32, 24, "rw"),
    "Q8_0": Block(8, 32, 34, "rw"),
    "Q8_1": Block(9, 32, 36, ""),
    "Q2_K": Block(10, 256, 84, "rw"),
    "Q3_K": Block(11, 256, 110, "rw"),
    "Q4_K": Block(12, 256, 144, "rw"),
    "Q5_K": Block(13, 256, 176, "rw"),
    "Q6_K": Block(14, 256, 210, "rw"),
    "Q8_K": Block(15, 256, 292, ""),
    "IQ2_XXS": Block(16, 256, 66, "r"),
    "IQ2_XS": Block(17, 256, 74, "r"),
    "IQ3_XXS": Block(18, 256, 98, "r"),
    "IQ1_S": Block(19, 256, 50, "r"),
    "IQ4_NL": Block(20, 32, 18, "rw"),
    "IQ3_S": Block(21, 256, 110, "r"),
    "IQ2_S": Block(22, 256, 82, "r"),
    "IQ4_XS": Block(23, 256, 136, "rw"),
    "IQ1_M": Block(29, 256, 56, "r"),
    "TQ1_0": Block(34, 256, 54, "rw"),
    "TQ2_0": Block(35, 256, 66, "rw"),
    "MXFP4": Block(39, 32, 17, "rw"),
    "NVFP4": Block(40, 64, 36, "r"),
    "Q1_0": Block(41, 128, 18, ""),
    "Q2_0": Block(42, 64, 18, ""),
}

Kernel = Callable[["Tensor", "Tensor | None"], "Tensor"]
"""float32 [rows, columns] and importance [columns] to uint8 [bytes of those rows]."""

KERNELS: dict[str, Kernel] = {}
"""Encoders of our own by format name; a format that has none is encoded by ggml."""

SCALED = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}
"""Columns that share a scale; 32 where nothing is said."""

LARGEST = 1e15
"""From 1e16 on, squares overflow in ggml's search for a scale, and its own check does not notice."""

LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class Ggml:
    name = "ggml"
    formats: Mapping[str, str] = {format: block.can for format, block in TYPES.items()}
    # a sixteenth of the block at a time, at up to 19 bytes an element (measured; IQ2 and IQ3 up to 23)
    scratch = 1.5
    grids = frozenset(LAYOUTS)
    grid_scratch = 3.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Nothing: no HF folder stores ggml types, and a GGUF's own source calls `layout`."""
        return ()

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """Raises BlockMismatch, UnknownName. A format that is only read has one: a GGUF may hold it."""
        if format not in TYPES:
            raise UnknownName(f"no ggml type is called {format!r} (known: {', '.join(TYPES)})")
        block, columns = TYPES[format], shape[-1] if shape else 1
        if columns % block.size:
            fits = [other for other, its in TYPES.items() if its.can == "rw" and columns % its.size == 0]
            raise BlockMismatch(
                f"rows of {columns} columns do not divide into {format}'s blocks of {block.size}; "
                f"{', '.join([*fits, 'F16, BF16 or F32'])} would fit"
            )
        stride = columns // block.size * block.nbytes
        spec = TensorSpec(name, format, shape, prod(shape[:-1]) * stride)
        return Weight(name, shape, self.name, format, {"data": Part(spec, stride)})

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        """Source: gguf-py `quants.dequantize`. Raises DecodeOnly for a format that gguf-py does not know."""
        import torch

        block = TYPES[weight.format]
        if not block.can:
            raise DecodeOnly(f"{weight.format} can be copied and not computed with: gguf-py cannot decode it")
        stored = parts["data"]
        matrix = torch.empty(stored.numel() // block.nbytes * block.size, dtype=torch.float32)
        _dequantize(stored.cpu().contiguous().numpy(), weight.format, matrix.numpy())
        return matrix.view(-1, weight.columns).to(stored.device)

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """Raises DecodeOnly; CodecError for an unfit importance; NonFiniteResult where a scale overflows.

        ggml works on the CPU, and so the bytes are there, wherever `matrix` was.
        """
        if TYPES[weight.format].can != "rw":
            able = ", ".join(format for format, block in TYPES.items() if block.can == "rw")
            raise DecodeOnly(f"{weight.format} can be read and not written; edgeport writes {able}")
        if importance is not None and importance.shape != (weight.columns,):
            raise CodecError(
                f"importance has shape {tuple(importance.shape)}, where rows have {weight.columns} columns"
            )
        importance = None if importance is None else telling(importance, SCALED.get(weight.format, 32))
        kernel = KERNELS.get(weight.format)
        if kernel is not None:
            return {"data": kernel(matrix, importance)}
        return {"data": _quantize(weight.format, matrix, importance)}

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        """Raises DecodeOnly for a format whose codes are not one a weight."""
        return unpack(_layout(weight.format), parts["data"].reshape(-1, TYPES[weight.format].nbytes), weight.columns)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        """Raises DecodeOnly for a format whose codes are not one a weight."""
        blocks = parts["data"].reshape(-1, TYPES[weight.format].nbytes)
        return {"data": pack(_layout(weight.format), blocks, codes).view(-1)}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        blocks = parts["data"].reshape(-1, TYPES[weight.format].nbytes)
        return {"data": rescale(_layout(weight.format), blocks, grid).view(-1)}


codec = Ggml()


def _layout(format: str) -> Layout:
    if format not in LAYOUTS:
        raise DecodeOnly(f"{format} does not keep one code a weight; {', '.join(LAYOUTS)} can be patched as they are stored")
    return LAYOUTS[format]


def _dequantize(stored: Any, format: str, matrix: Any) -> None:
    """Fill `matrix` (float32, flat) from `stored` (uint8, flat), in pieces that keep to `scratch`."""
    import numpy as np

    gguf = need("gguf", "gguf")
    block, kind = TYPES[format], gguf.GGMLQuantizationType(TYPES[format].id)
    step = min(max(matrix.size // 16, 1 << 12), 1 << 16) // block.size
    for first in range(0, matrix.size // block.size, step):
        some = stored[first * block.nbytes : (first + step) * block.nbytes]
        # a corrupt scale may be infinite: whoever asked for the values looks at them
        with np.errstate(all="ignore"):
            values = gguf.dequantize(some.reshape(1, -1), kind)
        matrix[first * block.size : first * block.size + values.size] = values[0]


def telling(importance: Tensor, group: int) -> Tensor:
    """[columns], with ones for columns that share a scale and are all of no importance: ggml's encoders write zeros there."""
    groups = importance.reshape(-1, group)
    return groups.where(groups.any(1, keepdim=True), 1.0).reshape(-1)


def _quantize(format: str, matrix: Tensor, importance: Tensor | None) -> Tensor:
    """By `ggml_quantize_chunk`, which keeps rows apart: how they are shared out leaves no trace."""
    import torch

    ggml, block = library(), TYPES[format]
    source = matrix.detach().to("cpu", torch.float32).contiguous()
    weights = None if importance is None else importance.detach().to("cpu", torch.float32).contiguous()
    rows, columns = source.shape
    stride = columns // block.size * block.nbytes
    stored = torch.empty(rows * stride, dtype=torch.uint8)

    def work(some: range) -> bool:
        start = stored.data_ptr() + some.start * stride
        ggml.ggml_quantize_chunk(
            block.id,
            source.data_ptr() + some.start * columns * 4,
            start,
            0,
            len(some),
            columns,
            None if weights is None else weights.data_ptr(),
        )
        return bool(ggml.ggml_validate_row_data(block.id, start, len(some) * stride))

    ggml.ggml_quantize_init(block.id)
    largest = max(abs(bound.item()) for bound in source.aminmax())
    if not largest < LARGEST or not all(_share(work, rows, cores())):
        raise NonFiniteResult(
            f"a value of {largest:.4g} overflows {format}'s scales; use --quant bf16 or f32"
        )
    return stored


def _share(work: Callable[[range], bool], rows: int, workers: int) -> list[bool]:
    """Run `work` on consecutive ranges of rows, one a thread; ctypes lets go of the GIL meanwhile."""
    workers = max(1, min(workers, rows))
    ranges = [range(rows * i // workers, rows * (i + 1) // workers) for i in range(workers)]
    if workers == 1:
        return [work(some) for some in ranges]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, ranges))


@cache
def library() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python, found without importing the package, which loads far more.

    Signatures: ggml.h. Raises MissingExtra.
    """
    package = find_spec("llama_cpp")
    folders = [Path(folder) / "lib" for folder in (package and package.submodule_search_locations) or ()]
    path = next((file for folder in folders for name in LIBRARIES if (file := folder / name).is_file()), None)
    if path is None:
        raise MissingExtra("libggml-base of llama_cpp is not installed: pip install 'edgeport[gguf]'")
    ggml = ctypes.CDLL(str(path))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    ggml.ggml_quantize_chunk.restype = size
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, size]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    return ggml
