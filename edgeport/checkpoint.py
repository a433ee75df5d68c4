"""Stored tensors in one file, by header and positioned reads: safetensors, and torch's zip (`.bin`).

Never memory-mapped: a mapped page counts as resident memory, and the memory bound is the point.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgeport.codecs.plain import TYPES, byte_count
from edgeport.errors import CorruptCheckpoint, NotACheckpoint
from edgeport.tensor import TensorSpec

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors format itself


@dataclass(frozen=True, slots=True)
class Stored(TensorSpec):
    """A tensor's header entry and where its bytes lie."""

    path: Path
    offset: int


def read_range(path: Path, start: int, stop: int) -> bytearray:
    """Bytes `start` to `stop` of a file. Raises CorruptCheckpoint where the file ends before."""
    buffer = bytearray(stop - start)
    with open(path, "rb", buffering=0) as file:
        fill(memoryview(buffer), file.fileno(), start, path.name)
    return buffer


def fill(view: memoryview, handle: int, start: int, name: str) -> None:
    """Read a buffer full of an open file from byte `start` on. Raises CorruptCheckpoint where it ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done : done + (1 << 30)]], start + done)
        if count == 0:
            raise CorruptCheckpoint(f"{name} ends at byte {start + done}; bytes up to {start + len(view)} were expected")
        done += count


def read_lines(path: Path, start: int, width: int, lines: int, pitch: int) -> bytearray:
    """`width` bytes from `start` on, and from each multiple of `pitch` after it, one after the other.

    Raises CorruptCheckpoint where the file ends before.
    """
    buffer = bytearray(width * lines)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        handle = file.fileno()
        for line in range(lines):
            piece, begin = view[line * width : (line + 1) * width], start + line * pitch
            if os.preadv(handle, [piece], begin) < width:
                piece[:] = read_range(path, begin, begin + width)
    return buffer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CorruptCheckpoint."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path.name} holds {type(value).__name__} where a JSON object was expected")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """A transformers model's config.json. Raises CorruptCheckpoint."""
    config = read_json(folder / "config.json")
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if kind is not None and not isinstance(kind, str):
        raise CorruptCheckpoint(f"config.json has the model_type {kind!r:.40} where a word was expected")
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise CorruptCheckpoint(f"config.json has the architectures {classes!r:.40} where a list of words was expected")
    return config


def open_checkpoint(path: Path) -> dict[str, Stored]:
    """The tensors of a `.safetensors`, `.bin`, `.pt` or `.pth` file, in the order of their bytes."""
    if not path.is_file():
        raise NotACheckpoint(f"{path} is not a file")
    return safetensors_header(path) if path.suffix == ".safetensors" else torch_header(path)


def safetensors_header(path: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file, every claim of its header checked against the file.

    Format: https://github.com/huggingface/safetensors#format. Raises CorruptCheckpoint.
    """
    size = path.stat().st_size
    if size < 8:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CorruptCheckpoint(
            f"{path.name} declares a header of {length} bytes, and has {size - 8} after the first eight: "
            "it is truncated or not a safetensors file"
        )
    try:
        header = json.loads(read_range(path, 8, 8 + length), object_pairs_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the header of {path.name} is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CorruptCheckpoint(f"the header of {path.name} is not a JSON object")
    header.pop("__metadata__", None)
    begin = 8 + length
    entries = [_entry(path, name, fields, begin, size) for name, fields in header.items()]
    entries.sort(key=lambda stored: (stored.offset, stored.nbytes))
    expected = begin
    for stored in entries:
        if stored.offset != expected:
            raise CorruptCheckpoint(
                f"{path.name}: tensor {stored.name} starts at byte {stored.offset}, "
                f"and the one before it ends at {expected} (they overlap or leave a hole)"
            )
        expected += stored.nbytes
    if expected != size:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes, and its header accounts for {expected}")
    return {stored.name: stored for stored in entries}


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object of a header: a tensor's entry as (dtype, shape, start, stop), any other as it is.

    Thousands of entries as tables, gone a moment later, would leave memory that is too scattered to be given back.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    match table:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if all(
            type(n) is int for n in shape
        ):
            return sys.intern(dtype), shared(tuple(shape)), start, stop
    return table


def _entry(path: Path, name: str, fields: Any, begin: int, size: int) -> Stored:
    if not isinstance(fields, tuple):
        raise CorruptCheckpoint(f"{path.name}: the header entry of {name} lacks dtype, data_offsets or a shape of whole numbers")
    if not is_text(name):
        raise CorruptCheckpoint(f"{path.name}: the header names a tensor {name!r}, which is no text")
    dtype, shape, start, stop = fields
    if dtype not in TYPES:
        raise CorruptCheckpoint(f"{path.name}: tensor {name} has the unknown dtype {dtype!r}")
    if not all(0 <= n < 1 << 48 for n in shape):
        raise CorruptCheckpoint(f"{path.name}: tensor {name} has the impossible shape {list(shape)}")
    nbytes = byte_count(dtype, shape)
    if not 0 <= start <= stop or begin + stop > size:
        raise CorruptCheckpoint(
            f"{path.name}: tensor {name} lies at bytes {start} to {stop} of {size - begin}: the file is truncated "
            "or its header is wrong"
        )
    if stop - start != nbytes:
        raise CorruptCheckpoint(f"{path.name}: tensor {name} has {stop - start} bytes where {dtype} {list(shape)} takes {nbytes}")
    return Stored(name, dtype, shape, nbytes, path, begin + start)


def is_text(name: object) -> bool:
    """Whether a tensor's name can be written again: JSON may spell halves of characters."""
    return isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name)


@cache
def shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all tensors of a shape: a model has thousands of tensors in a dozen shapes."""
    return shape


def torch_header(path: Path) -> dict[str, Stored]:
    """Tensors of a file that torch.save wrote, read with `weights_only=True` and without their data.

    torch's own unpickler builds the tensors under FakeTensorMode, which leaves each storage's place in the zip.
    Raises NotACheckpoint for the format of before torch 1.6, and for a pickle that holds more than tensors.
    """
    from pickle import UnpicklingError

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    convert = "convert it once with safetensors.torch.save_file on a machine that trusts it"
    if not zipfile.is_zipfile(path):
        raise NotACheckpoint(f"{path.name} is not a zip file as torch.save writes; if it is older than torch 1.6, {convert}")
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        raise NotACheckpoint(f"{path.name} holds more than tensors, and reading it could run its code; {convert}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotACheckpoint(f"{path.name} cannot be read as tensors only ({reason}); {convert}") from error
    if not isinstance(state, Mapping):
        raise NotACheckpoint(f"{path.name} holds a {type(state).__name__} where a table of tensors was expected; {convert}")
    names = {torch_name: name for name, (_, torch_name, _) in TYPES.items()}
    found = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not is_text(name):
            raise NotACheckpoint(
                f"{path.name}: {name!r} is a {type(tensor).__name__} where a tensor by name was expected; {convert}"
            )
        dtype = names.get(str(tensor.dtype).removeprefix("torch."))
        strided = tensor.layout is torch.strided
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if strided else None
        if dtype is None or begin is None or not tensor.is_contiguous():
            raise NotACheckpoint(f"{path.name}: {name} ({tensor.dtype}) is not stored as one plain block; {convert}")
        nbytes = tensor.numel() * tensor.element_size()
        offset = begin + tensor.storage_offset() * tensor.element_size()
        if offset + nbytes > path.stat().st_size:
            raise CorruptCheckpoint(f"{path.name}: tensor {name} reaches beyond the end of the file")
        found[name] = Stored(name, dtype, tuple(tensor.shape), nbytes, path, offset)
    return dict(sorted(found.items(), key=lambda item: item[1].offset))


def safetensors_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file with these tensors in this order, and where each one's bytes go."""
    text = bytearray(b"{" + b'"__metadata__":' * bool(metadata) + (_json(dict(metadata)) if metadata else b""))
    relative = {}
    end = 0
    for name, spec in specs.items():
        # entry by entry: a table of them all would scatter memory for good, as in _compact
        entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (end, end + spec.nbytes)}
        text += b"," * (len(text) > 1) + _json(name) + b":" + _json(entry)
        relative[name] = end
        end += spec.nbytes
    text += b"}"
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + offset for name, offset in relative.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
