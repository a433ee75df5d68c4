"""Importance matrices as llama-imatrix writes them: the mean square of each input channel of each matrix.

    legacy .dat:  entries i32 | per entry: name length i32, name, calls i32, values n i32, n float32 | chunks, dataset
    GGUF:         a tensor NAME.in_sum2 (sums of squares) and a tensor NAME.counts (tokens seen, by expert) per entry

Sources: llama.cpp's common/imatrix-loader.cpp, and tools/quantize/quantize.cpp for what becomes of the values.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from converters.gguf.header import MAGIC, Header, StoredTensor, read_header
from edgeport.checkpoint import read_range
from edgeport.errors import CorruptCheckpoint, NotACheckpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_NAME_BYTES = 4096


def read_imatrix(path: Path | str) -> dict[str, NDArray[np.float32]]:
    """Importance by GGUF tensor name, each [columns], or [experts * columns] for a stack of experts.

    Values are what llama-quantize hands to its encoders: mean squares; 1 for an expert that saw no token.
    Raises NotACheckpoint, CorruptCheckpoint.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            found = _read_gguf(path) if start == MAGIC else _read_legacy(path, file)
    except OSError as error:
        raise NotACheckpoint(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise NotACheckpoint(f"{path} is no importance matrix: it has no tensor whose name ends in {SUMS}")
    for name, values in found.items():
        # a comparison that no NaN passes
        if not ((values >= 0) & (values < float("inf"))).all():
            _fail(path, f"the importance of {name[:64]!r} has values that are negative or not finite")
    return found


def _fail(path: Path, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"{path}: {what}")


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    header = read_header(path)
    names = {suffix: {key.removesuffix(suffix) for key in header.tensors if key.endswith(suffix)} for suffix in (SUMS, COUNTS)}
    if alone := sorted(names[SUMS] ^ names[COUNTS]):
        _fail(path, f"{alone[0][:64]!r} has only one of {SUMS} and {COUNTS}")
    return {name: _means(header, name) for name in sorted(names[SUMS])}


def _means(header: Header, name: str) -> NDArray[np.float32]:
    """Sums over counts, in float32 and with whole counts, as llama-quantize divides; 1 where nothing was counted."""
    import numpy as np

    sums, counts = (_values(header, header.tensors[name + suffix]) for suffix in (SUMS, COUNTS))
    if sums.size % counts.size:
        _fail(header.path, f"{name[:64]!r} has {sums.size} sums, which do not divide among {counts.size} counts")
    if not ((counts >= 0) & (counts < 1 << 62)).all():
        _fail(header.path, f"{name[:64]!r} has counts that are negative or not finite")
    whole = np.floor(counts + np.float32(0.5))[:, None]
    seen = whole > 0
    means = np.ones((counts.size, sums.size // counts.size), np.float32)
    with np.errstate(over="ignore"):  # read_imatrix looks at the values
        np.divide(sums.reshape(counts.size, -1), whole, out=means, where=seen)
    return means.ravel()


def _values(header: Header, tensor: StoredTensor) -> NDArray[np.float32]:
    import numpy as np

    if tensor.dtype != "F32":
        _fail(header.path, f"{tensor.name[:64]!r} should be F32 and is {tensor.dtype}")
    return np.frombuffer(read_range(header.path, tensor.offset, tensor.offset + tensor.nbytes), dtype="<f4")


def _read_legacy(path: Path, file: BinaryIO) -> dict[str, NDArray[np.float32]]:
    """The format has no magic: what does not add up is as likely no importance matrix at all."""
    import numpy as np

    size = os.fstat(file.fileno()).st_size

    def take(count: int, what: str) -> bytes:
        if not 0 <= count <= size - file.tell():
            _fail(path, f"this is no importance matrix: {what} of {count} bytes at {file.tell()} of {size}")
        return file.read(count)

    def integer(what: str) -> int:
        return int.from_bytes(take(4, what), "little", signed=True)

    entries = integer("a count of entries")
    # an entry takes 17 bytes, with a name of one byte and one value
    if not 0 < entries <= size // 17:
        _fail(path, f"this is no importance matrix: {entries} entries in {size} bytes")
    found: dict[str, NDArray[np.float32]] = {}
    for number in range(entries):
        length = integer("the length of a name")
        if not 0 < length <= MAX_NAME_BYTES:
            _fail(path, f"this is no importance matrix: entry {number} has a name of {length} bytes")
        raw = take(length, "a name").split(b"\0")[0]
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            _fail(path, f"this is no importance matrix: the name of entry {number} is {raw[:40]!r}")
        if name in found:
            _fail(path, f"the importance of {name[:64]!r} is there twice")
        calls, count = integer("a count of calls"), integer("a count of values")
        if count < 1:
            _fail(path, f"the importance of {name[:64]!r} has {count} values")
        # the file holds the mean over tokens, times the number of calls
        values = np.frombuffer(take(4 * count, f"the importance of {name[:64]!r}"), dtype="<f4")
        found[name] = np.divide(values, max(calls, 1), dtype=np.float32)
    return found
