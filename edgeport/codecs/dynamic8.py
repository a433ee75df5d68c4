"""bitsandbytes' dynamic 8-bit numbers, in which double quantization keeps the scales of blocks."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@cache
def dynamic_map() -> Tensor:
    """float32 [256]: the signed numbers of an 8-bit float whose exponent takes as many bits as it needs, ascending.

    Source: bitsandbytes `functional.create_dynamic_map` (https://arxiv.org/abs/1511.04561).
    """
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _table() -> Tensor:
    """uint8 [65536]: the code nearest to each of so many even steps from -1 to 1, as bitsandbytes looks it up on a CPU."""
    import torch

    levels = dynamic_map()
    steps = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(steps, 0.5 * (levels[:-1] + levels[1:])).to(torch.uint8)


def quantize(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """float32 [values] to each block's absmax, and codes of the dynamic map. Source: csrc/cpu_ops.cpp `quantize_cpu_impl`."""
    import torch

    padded = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax)[:, None]).nan_to_num_(0.0).clamp_(-1, 1)
    codes = _table().index_select(0, ((scaled + 1) * 0.5 * 65535 + 0.5).to(torch.int32).view(-1))
    # a block of zeros has code 0, whatever it stands for: its scale is 0
    codes = codes.view(-1, blocksize) * (absmax > 0)[:, None]
    return absmax, codes.view(-1)[: values.numel()]


