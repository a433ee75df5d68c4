"""Random numbers that depend on where they are used and on nothing else: not on order, block size, threads or device."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MASK = 0xFFFFFFFF


def uniform(weight: str, first: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """float32 [rows, columns] in [0, 1), a function of the weight's name, the row (from `first` on) and the column.

    A counter-based generator: MurmurHash3's 32-bit finalizer over the row's key and the column
    (https://github.com/aappleby/smhasher/wiki/MurmurHash3). The top 24 bits make the number.
    """
    import torch

    seed = int.from_bytes(hashlib.sha256(weight.encode()).digest()[:4], "little")
    row = mixed(torch.arange(first, first + rows, dtype=torch.int64, device=device) + seed)
    column = mixed(torch.arange(columns, dtype=torch.int64, device=device) + 0x9E3779B9)
    key = to_int32(row)[:, None] ^ to_int32(column)[None, :]
    return (mix_int32(key) >> 8 & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def mixed(keys: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int64 `keys`, modulo 2^32."""
    keys = keys & MASK
    keys = (keys ^ keys >> 16) * 0x85EBCA6B & MASK
    keys = (keys ^ keys >> 13) * 0xC2B2AE35 & MASK
    return keys ^ keys >> 16


def to_int32(keys: Tensor) -> Tensor:
    """The same 32 bits as a signed number: half the memory traffic of int64."""
    import torch

    return (keys - (keys >> 31 << 32)).to(torch.int32)


def mix_int32(keys: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int32 `keys`, which are lost; shifts are masked, since they carry the sign."""
    keys ^= keys >> 16 & 0xFFFF
    keys *= 0x85EBCA6B - (1 << 32)
    keys ^= keys >> 13 & 0x7FFFF
    keys *= 0xC2B2AE35 - (1 << 32)
    keys ^= keys >> 16 & 0xFFFF
    return keys
