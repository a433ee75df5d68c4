"""bitsandbytes' 4-bit numbers, NF4 and FP4: each block of the flattened matrix has one scale, its largest magnitude.

    values:  | block 0: 64 values | block 1 | ... | last |    a block may run over the end of a row; the last may be short
    codes:   byte i = code of value 2i (high half), code of value 2i + 1 (low half)
    absmax:  float32 a block; value = level[code] * absmax

Double quantization (the formats in _DQ) stores 8 bits a block instead, and one float32 for 256 blocks:

    absmax[b] = nested_quant_map[stored[b]] * nested_absmax[b // 256] + nested_offset

A weight X is stored as transformers' save_pretrained writes it: X (codes), X.absmax, X.quant_map (the 16 levels),
X.nested_absmax, X.nested_quant_map, and X.quant_state.bitsandbytes__nf4, whose bytes are JSON.
Source: bitsandbytes 0.50 `functional.quantize_4bit`, `QuantState`, backends/default/ops.py, csrc/cpu_ops.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import fsum, gcd, prod
from typing import TYPE_CHECKING, Any, cast

from edgeport.codecs import dynamic8
from edgeport.codecs.plain import TYPES, torch_type
from edgeport.errors import AmbiguousFormat, CorruptCheckpoint, NonFiniteResult, UnknownName, about
from edgeport.grid import LARGEST_PIECE, SMALLEST_PIECE, Grid
from edgeport.seams import Peek
from edgeport.tensor import Part, TensorSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FORMATS = {"NF4": ("nf4", False), "NF4_DQ": ("nf4", True), "FP4": ("fp4", False), "FP4_DQ": ("fp4", True)}
"""Format name to bitsandbytes' quant_type, and whether the scales are quantized too."""

LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
}  # fmt: skip
"""The values of the codes 0 to 15. NF4: quantiles of the normal distribution (https://arxiv.org/abs/2305.14314)."""
ASCENDING = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
"""The codes in the order of their levels."""

TINY = 1e-38
"""The least absmax that is divided by."""
NESTED_BLOCK = 256
OFFSET_WIDTH = 22
"""Characters of the longest float that JSON writes for a positive float32."""
SERIAL = (1 << 15) - 1
"""Elements that torch sums in one thread, and so in one order."""


@dataclass(frozen=True, slots=True)
class State:
    """What a weight's blocks are, as bitsandbytes' QuantState has it. `dtype`: of the values before quantization."""

    quant_type: str
    blocksize: int
    dtype: str
    nested_blocksize: int = 0
    """0: the scales are float32."""
    nested_offset: float = 0.0
    storage: str = "U8"
    """The type that the codes' bytes are declared as, by its safetensors name."""

    @property
    def format(self) -> str:
        return self.quant_type.upper() + ("_DQ" if self.nested_blocksize else "")

    @property
    def whole_values(self) -> int:
        """Values after which blocks, and blocks of scales, begin anew."""
        return self.blocksize * max(self.nested_blocksize, 1)

    def blocks(self, values: int) -> int:
        return -(-values // self.blocksize)

    def packed(self, shape: tuple[int, ...], nbytes: int = 0) -> bytes:
        """The JSON that bitsandbytes keeps beside the weight, in its order and spacing, padded to `nbytes`."""
        table: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize, "dtype": self.dtype}
        table["shape"] = list(shape)
        if self.nested_blocksize:
            table |= {"nested_blocksize": self.nested_blocksize, "nested_dtype": "float32", "nested_offset": self.nested_offset}
        return json.dumps(table).encode().ljust(nbytes)


def state_of(weight: Weight) -> State:
    return cast(State, weight.parameters)


class Bnb4:
    name = "bnb4"
    formats: Mapping[str, str] = dict.fromkeys(FORMATS, "rw")
    grids = frozenset(FORMATS)
    # pieces of a sixteenth at up to 16 bytes an element, and the scales of blocks of 32
    scratch = 2.0
    # codes from bytes and back, through torch's 32-bit indices
    grid_scratch = 8.0

    def claim(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], peek: Peek) -> Iterable[Weight]:
        """Raises CorruptCheckpoint for a quant_state that is none, or that the other tensors do not bear out."""
        for key in specs:
            name, found, quant_type = key.partition(STATE)
            if found:
                with about(name):
                    yield self._claimed(name, quant_type, specs, peek(key))

    def _claimed(self, name: str, quant_type: str, specs: Mapping[str, TensorSpec], packed: bytes) -> Weight:
        shape, state = parse_state(packed)
        if state.quant_type != quant_type or name not in specs:
            raise CorruptCheckpoint(f"its quant_state is of type {state.quant_type}, and named {quant_type}")
        state = replace(state, storage=specs[name].dtype)
        expected = lay_out(name, shape, state, len(packed))
        for part in expected.parts.values():
            spec = specs.get(part.spec.name)
            if spec is None or (spec.dtype, spec.nbytes) != (part.spec.dtype, part.spec.nbytes):
                came = f"{spec.dtype} of {spec.nbytes} bytes" if spec else "missing"
                raise CorruptCheckpoint(
                    f"{part.spec.name} is {came}, where {list(shape)} {state.format} in blocks of {state.blocksize} takes "
                    f"{part.spec.dtype} of {part.spec.nbytes} bytes"
                )
        return replace(expected, parts={role: replace(part, spec=specs[part.spec.name]) for role, part in expected.parts.items()})

    def layout(self, name: str, shape: tuple[int, ...], format: str) -> Weight:
        """As bitsandbytes does unless told otherwise: blocks of 64 bfloat16 values."""
        return lay_out(name, shape, new_state(format, "bfloat16"))

    def decode(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        """float32 products; `dequantize_4bit` rounds the same ones to the state's dtype."""
        import torch

        state, stored = state_of(weight), parts["codes"]
        values = torch.empty(2 * stored.numel(), dtype=torch.float32, device=stored.device)
        pairs = torch.tensor(_pairs(state.quant_type), device=stored.device)
        for some in _pieces(stored.numel(), 1):
            torch.index_select(pairs, 0, stored[some].to(torch.int32), out=values.view(-1, 2)[some])
        values = values[: values.numel() // weight.columns * weight.columns]
        absmax = _absmax(state, parts)
        whole = values.numel() // state.blocksize
        values[: whole * state.blocksize].view(whole, state.blocksize).mul_(absmax[:whole].unsqueeze(1))
        values[whole * state.blocksize :].mul_(absmax[whole:])
        return values.view(-1, weight.columns)

    def encode(self, weight: Weight, matrix: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """To the nearest level, as `quantize_4bit` does after a cast to the state's dtype.

        With double quantization the scales come as they are, "exact", and `finish` makes the stored parts of them all.
        Raises NonFiniteResult where a value does not fit float16.
        """
        import torch

        state, flat = state_of(weight), matrix.reshape(-1)
        dtype = torch_type(DTYPES[state.dtype])
        codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(state.blocks(flat.numel()), dtype=torch.float32, device=flat.device)
        for some in _pieces(flat.numel(), state.blocksize):
            scales, scaled = _scaled(flat[some].to(dtype).float(), state.blocksize)
            first = some.start // state.blocksize
            absmax[first : first + scales.numel()].copy_(scales)
            packed = _pack(_nearest(scaled, state.quant_type))
            codes[some.start // 2 : some.start // 2 + packed.numel()].copy_(packed)
        if dtype == torch.float16 and not bool(absmax.isfinite().all()):
            raise NonFiniteResult("a value does not fit float16, the base's dtype (largest: 65504); use --quant bf16")
        scales = absmax.view(torch.uint8)
        if state.nested_blocksize:
            return {"codes": codes, "exact": scales}
        return {"codes": codes, "absmax": scales, "quant_map": _quant_map(state), "state": _bytes(state.packed(weight.shape))}

    def held_bytes(self, weight: Weight) -> int:
        """A weight's exact scales, twice while they are put together, and what is stored of them."""
        state = state_of(weight)
        return 9 * state.blocks(weight.elements) + 32 * LARGEST_PIECE if state.nested_blocksize else 0

    def finish(self, weight: Weight, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Quantize the scales of the whole weight: 8 bits each, around their mean. `held`: "exact", in the order of blocks.

        The JSON has the room that was planned for it, so a mean that takes more digits is rounded, and the rounded one used.
        """
        import torch

        state, exact = state_of(weight), held["exact"].view(torch.float32)
        # torch.mean in an order that the number of threads does not change
        sums = fsum(exact[first : first + SERIAL].sum().item() for first in range(0, len(exact), SERIAL))
        mean = torch.tensor(sums, dtype=torch.float32).div_(len(exact)).item()
        room = weight.parts["state"].spec.nbytes
        state = next(tried for tried in _roundings(state, mean) if len(tried.packed(weight.shape)) <= room)
        stored = torch.empty(len(exact), dtype=torch.uint8)
        nested = torch.empty(-(-len(exact) // state.nested_blocksize), dtype=torch.float32)
        for some in _pieces(len(exact), state.nested_blocksize):
            largest, stored[some] = dynamic8.quantize(exact[some] - state.nested_offset, state.nested_blocksize)
            nested[some.start // state.nested_blocksize :][: len(largest)] = largest
        return {
            "absmax": stored, "nested_absmax": nested.view(torch.uint8), "quant_map": _quant_map(state),
            "nested_quant_map": dynamic8.dynamic_map().view(torch.uint8), "state": _bytes(state.packed(weight.shape, room)),
        }  # fmt: skip

    def grid(self, weight: Weight, parts: Mapping[str, Tensor]) -> Grid:
        """Its groups are as many columns as lie in one block in every row."""
        import torch

        state, device = state_of(weight), parts["codes"].device
        order = ASCENDING[state.quant_type]
        levels = torch.tensor([LEVELS[state.quant_type][code] for code in order], device=device)
        rank = torch.tensor([order.index(code) for code in range(16)], dtype=torch.uint8, device=device)
        codes = rank.index_select(0, _unpack(parts["codes"]).to(torch.int32))
        codes = codes[: len(codes) // weight.columns * weight.columns].view(-1, weight.columns)
        group = gcd(state.blocksize, weight.columns)
        step = _absmax(state, parts).repeat_interleave(state.blocksize // group)[: codes.numel() // group].view(len(codes), -1)
        scales: Grid | torch.dtype | None = torch.float32
        if group != state.blocksize:
            scales = None  # a block goes on in the next row
        elif state.nested_blocksize and "exact" not in parts:
            scales = Grid(
                parts["nested_quant_map"].view(torch.float32), _units(state, parts).view(step.shape),
                torch.full_like(step, _offset(state, parts)), parts["absmax"].clone().view(step.shape),
            )  # fmt: skip
        return Grid(levels, step, torch.full_like(step, -0.0), codes, scales=scales)

    def with_codes(self, weight: Weight, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        import torch

        order = torch.tensor(ASCENDING[state_of(weight).quant_type], dtype=torch.uint8, device=codes.device)
        flat = order.index_select(0, codes.reshape(-1).to(torch.int32))
        if flat.numel() % 2:
            flat = torch.cat([flat, parts["codes"][-1:] & 15])
        return {**parts, "codes": _pack(flat)}

    def with_scales(self, weight: Weight, parts: Mapping[str, Tensor], grid: Grid) -> Mapping[str, Tensor]:
        import torch

        stored = grid.scales.codes if isinstance(grid.scales, Grid) else grid.step
        return {**parts, "exact" if "exact" in parts else "absmax": stored.reshape(-1).view(torch.uint8)}


codec = Bnb4()


def new_state(format: str, dtype: str, blocksize: int = 64) -> State:
    """Parameters for a weight that was not quantized before. Raises UnknownName."""
    if format not in FORMATS or dtype not in DTYPES or blocksize not in BLOCK_SIZES:
        raise UnknownName(f"no bitsandbytes format {format} of {dtype} in blocks of {blocksize} (known: {', '.join(FORMATS)})")
    quant_type, nested = FORMATS[format]
    return State(quant_type, blocksize, dtype, NESTED_BLOCK if nested else 0)


def parse_state(packed: bytes) -> tuple[tuple[int, ...], State]:
    """A weight's shape and parameters from its quant_state. Raises CorruptCheckpoint, AmbiguousFormat."""
    try:
        table = json.loads(packed)
        shape = tuple(table["shape"])
        nested = table.get("nested_blocksize", 0)
        state = State(table["quant_type"], table["blocksize"], table["dtype"], nested, float(table.get("nested_offset", 0.0)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"its quant_state is not the JSON that bitsandbytes writes ({error!r})") from error
    sizes = (state.blocksize, *shape)
    if not shape or not all(type(n) is int and 0 < n < 1 << 48 for n in sizes) or type(nested) is not int or nested < 0:
        raise CorruptCheckpoint(f"its quant_state has an impossible shape or block size: {list(shape)}, {state.blocksize}")
    named = isinstance(state.quant_type, str) and isinstance(state.dtype, str)
    if not named or state.quant_type not in LEVELS or state.dtype not in DTYPES or state.blocksize not in BLOCK_SIZES:
        raise AmbiguousFormat(f"edgeport does not know {state.quant_type} of {state.dtype} in blocks of {state.blocksize}")
    return shape, state


def lay_out(name: str, shape: tuple[int, ...], state: State, state_bytes: int = 0) -> Weight:
    """How a weight with these parameters is stored. `state_bytes`: of its JSON, if not what this one takes at most."""
    values, columns = prod(shape), shape[-1] if shape else 1
    blocks, nbytes = state.blocks(values), -(-values // 2)
    granule = state.whole_values // gcd(state.whole_values, columns)
    each = granule * columns // state.blocksize
    item = TYPES[state.storage][0]
    room = OFFSET_WIDTH - len(str(state.nested_offset)) if state.nested_blocksize else 0
    text = state_bytes or len(state.packed(shape)) + room

    def part(suffix: str, dtype: str, count: int, stride: int) -> Part:
        return Part(TensorSpec(name + suffix, dtype, (count,), count * TYPES[dtype][0]), stride)

    parts = {"codes": Part(TensorSpec(name, state.storage, (nbytes // item, 1), nbytes), granule * columns // 2)}
    if state.nested_blocksize:
        parts["absmax"] = part(".absmax", "U8", blocks, each)
        groups = -(-blocks // state.nested_blocksize)
        parts["nested_absmax"] = part(".nested_absmax", "F32", groups, each // state.nested_blocksize * 4)
        parts["nested_quant_map"] = part(".nested_quant_map", "F32", 256, 0)
    else:
        parts["absmax"] = part(".absmax", "F32", blocks, 4 * each)
    parts["quant_map"] = part(".quant_map", "F32", 16, 0)
    parts["state"] = part(STATE + state.quant_type, "U8", text, 0)
    return Weight(name, shape, codec.name, state.format, parts, granule, parameters=state)


def _pieces(elements: int, multiple: int) -> Iterator[slice]:
    """Ranges of a sixteenth within the bounds of a cache, in multiples of `multiple`."""
    size = min(max(elements // 16, SMALLEST_PIECE), LARGEST_PIECE) // multiple * multiple
    return (slice(first, min(first + size, elements)) for first in range(0, elements, size))


def _absmax(state: State, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 [blocks] of some rows. What `encode` has just made is taken before the scales are quantized."""
    import torch

    if "exact" in parts or not state.nested_blocksize:
        return parts["exact" if "exact" in parts else "absmax"].view(torch.float32)
    scales = parts["nested_quant_map"].view(torch.float32).index_select(0, parts["absmax"].to(torch.int32))
    return scales.mul_(_units(state, parts)).add_(_offset(state, parts))


def _offset(state: State, parts: Mapping[str, Tensor]) -> float:
    """What stands beside the stored scales. `finish` finds it after the weight was planned, and what it wrote is read on the CPU.

    On a device there are a base's own bytes alone, whose state is known from its header.
    """
    packed = parts.get("state")
    if packed is None or packed.device.type != "cpu":
        return state.nested_offset
    return parse_state(packed.numpy().tobytes())[1].nested_offset


def _units(state: State, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 [blocks]: what the stored scale of each block is a multiple of."""
    import torch

    nested = parts["nested_absmax"].view(torch.float32).repeat_interleave(state.nested_blocksize)
    return nested[: parts["absmax"].numel()]


def _scaled(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float32 [values] to each block's absmax, and the values divided by it. A short last block is divided otherwise."""
    import torch

    whole = values.numel() // blocksize * blocksize
    blocks, rest = values[:whole].view(-1, blocksize), values[whole:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=TINY)
        return torch.cat([absmax, last.view(1)]), torch.cat([scaled, (rest / last).clamp_(-1, 1)])
    return absmax, scaled


def _nearest(scaled: Tensor, quant_type: str) -> Tensor:
    """The code of the level nearest to each of float32 [values] in -1 to 1, and one more for a byte's unused half."""
    import torch

    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    # three times as fast as torch.bucketize
    for bound in _bounds(quant_type):
        rank += scaled > bound
    if quant_type == "nf4":
        return rank
    order = torch.tensor(ASCENDING[quant_type], dtype=torch.uint8, device=rank.device)
    return order.index_select(0, rank.to(torch.int32))


def _pack(codes: Tensor) -> Tensor:
    """uint8 [2 n] to [n]: the first of two in the high half."""
    high, low = codes.view(-1, 2).unbind(1)
    return (high << 4).bitwise_or_(low)


def _unpack(stored: Tensor) -> Tensor:
    """uint8 [n] to [2 n]."""
    import torch

    return torch.stack([stored >> 4, stored & 15], dim=1).view(-1)


@cache
def _bounds(quant_type: str) -> tuple[float, ...]:
    """The float32 midpoints between neighbouring levels."""
    import numpy as np

    levels = np.array([LEVELS[quant_type][code] for code in ASCENDING[quant_type]], np.float32)
    return tuple(((levels[:-1] + levels[1:]) / 2).tolist())


@cache
def _pairs(quant_type: str) -> tuple[tuple[float, float], ...]:
    """The two levels of every byte."""
    levels = LEVELS[quant_type]
    return tuple((levels[byte >> 4], levels[byte & 15]) for byte in range(256))


def _quant_map(state: State) -> Tensor:
    import torch

    return torch.tensor(LEVELS[state.quant_type]).view(torch.uint8)


def _bytes(text: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _roundings(state: State, mean: float) -> Iterator[State]:
    """`state` around that mean, then around ones of fewer digits; any value is a valid offset."""
    yield replace(state, nested_offset=mean)
    for digits in range(9, 0, -1):
        yield replace(state, nested_offset=float(f"{mean:.{digits}g}"))
    yield replace(state, nested_offset=0.0)
