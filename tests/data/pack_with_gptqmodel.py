"""Quantize and pack layers with GPTQModel itself, and keep them beside the numbers that it reads from them.

pip install --no-deps gptqmodel pypcre logbar device-smi tokenicer defuser
python -m tests.data.pack_with_gptqmodel

It pins newer releases of torch and numpy than the tests run with, so it is in no extra: the file is what the tests read.
Each layer is [32 rows, 64 columns] in groups of 32: `gptq-BITS-SYMMETRY-ORDER-vVERSION.ROLE` and `awq-4.ROLE`, and as the role
`weight` what the package reads in it, [columns, rows] in float16. All are of one `matrix`.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.quantizer import Quantizer
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

LAYERS = Path(__file__).with_name("packed_with_gptqmodel.safetensors")
ROWS, COLUMNS, GROUP = 32, 64, 32


def ranges(matrix: torch.Tensor, index: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, each [rows, groups], as the package's own quantizer finds them."""
    found = []
    for group in range(COLUMNS // GROUP):
        quantizer = Quantizer(QuantizeConfig(bits=bits, group_size=GROUP, sym=symmetric))
        quantizer.configure(perchannel=True)
        quantizer.find_params(matrix[:, index == group], weight=True)
        found.append((quantizer.scale, quantizer.zero))
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    in_order = torch.arange(COLUMNS) // GROUP
    stored = {"matrix": linear.weight.data}

    def keep(name: str, layer: torch.nn.Module, roles: tuple[str, ...]) -> None:
        stored.update({f"{name}.{role}": getattr(layer, role).clone() for role in roles})

    for bits, symmetric, act_order in product((2, 3, 4, 8), (True, False), (False, True)):
        index = in_order[torch.randperm(COLUMNS, generator=generator)] if act_order else in_order
        layer = TorchLinear(
            bits=bits, group_size=GROUP, sym=symmetric, desc_act=act_order, in_features=COLUMNS, out_features=ROWS, bias=False,
            pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        layer.pack(linear, *ranges(linear.weight.data, index, bits, symmetric), index.int())
        layer.post_init()
        name = f"gptq-{bits}-{'sym' if symmetric else 'asym'}-{'act' if act_order else 'plain'}"
        weight = layer.dequantize_weight().half()
        roles = ("qweight", "qzeros", "scales", "g_idx")
        keep(f"{name}-v2", layer, roles)
        convert_gptq_v2_to_v1_format_module(layer, type("Config", (), {"bits": bits, "pack_dtype": torch.int32}))
        keep(f"{name}-v1", layer, roles)
        stored |= {f"{name}-v{each}.weight": weight.clone() for each in (1, 2)}

    layer = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=COLUMNS, out_features=ROWS, bias=False,
        register_buffers=True,
    )  # fmt: skip
    layer.pack(linear, *ranges(linear.weight.data, in_order, 4, False))
    keep("awq-4", layer, ("qweight", "qzeros", "scales"))
    stored["awq-4.weight"] = layer(torch.eye(COLUMNS).half())
    save_file(stored, LAYERS, {"gptqmodel": version("gptqmodel")})


if __name__ == "__main__":
    main()
