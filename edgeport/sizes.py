"""The sizes that a config.json tells, by whichever of transformers' names, for bounds on memory and on texts.

It was written by another program, and may hold a size of each stage or layer (Segformer, Gemma 3n) or no number at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeport.errors import CorruptCheckpoint

ALSO_CALLED = {
    "hidden_size": ("n_embd", "d_model"), "intermediate_size": ("n_inner", "ffn_dim", "d_ff"),
    "num_attention_heads": ("n_head", "num_heads"), "num_hidden_layers": ("n_layer", "num_layers"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}  # fmt: skip
"""What GPT-2, T5, OPT and those after them say, as transformers' `attribute_map`s have it."""


def size(config: Mapping[str, Any], name: str, default: int) -> int:
    """The greatest where there are several; `default` where there is none, or none above 0. Raises CorruptCheckpoint."""
    told = next((value for key in (name, *ALSO_CALLED.get(name, ())) if (value := config.get(key)) is not None), None)
    several = told if isinstance(told, list) else [told or default]
    if not several or not all(isinstance(one, int) for one in several):
        raise CorruptCheckpoint(f"config.json has the {name} {told!r} where a number was expected")
    return most if (most := max(several)) > 0 else default
