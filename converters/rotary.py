"""Rotary position settings of a config.json, and the frequencies that they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeport.errors import ConvertError, UnsupportedArchitecture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""What `frequencies` knows: the types whose frequencies do not depend on the length of the text."""


POSITIVE = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip
NO_ANGLES = "config.json has the rotary settings {}, of which no angles can be made"


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one dict, from transformers 4's two keys or transformers 5's one.

    Where both are there, transformers takes rope_scaling as it is and nothing of the other, its rope_theta neither
    (`modeling_rope_utils.RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`).
    """
    told = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope = {name: value for name, value in told.items() if value is not None}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedArchitecture("config.json has rotary settings for each kind of layer, which no family here has")
    if config.get("original_max_position_embeddings") and rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


def check_positive(rope: Mapping[str, Any]) -> None:
    """Raises ConvertError for a number of which no angles can be made."""
    if wrong := [f"{name} {rope[name]!r}" for name in POSITIVE if name in rope and not is_positive(rope[name])]:
        raise ConvertError(NO_ANGLES.format(", ".join(wrong)))


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """[head_dim / 2] divisors of the rotary frequencies (`LlamaModel.generate_extra_tensors` of llama.cpp's converter).

    float32 at every step, as there: the file is to be the same to the bit.
    """
    import numpy as np

    low, high, context = (rope.get(name, default) for name, default in LLAMA3_DEFAULTS.items())
    factor = rope.get("factor", 8.0)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Powers in float64, then rounded: numpy's own float32 powers are off by a bit here and there.
    frequencies = 1 / np.power(float(rope["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    factors = np.where(wavelengths < context / high, 1, np.where(wavelengths > context / low, factor, between))
    return factors.astype(np.float32)


def frequencies(rope: Mapping[str, Any], head_dim: int, positions: int) -> tuple[NDArray[np.float32], float]:
    """[head_dim / 2] angles from one position to the next, and the factor of both cosine and sine.

    `positions`: max_position_embeddings. Source: transformers `modeling_rope_utils.ROPE_INIT_FUNCTIONS`.
    Raises UnsupportedArchitecture for another type than `ROPE_TYPES`, ConvertError for a setting that is missing or impossible.
    """
    import numpy as np

    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise UnsupportedArchitecture(f"rope_type {kind!r} of config.json is not supported; {', '.join(ROPE_TYPES)} are")
    refused = [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    refused += ["partial_rotary_factor"] if rope.get("partial_rotary_factor", 1.0) != 1.0 else []
    if refused:
        raise UnsupportedArchitecture(f"the rotary settings {', '.join(refused)} of config.json are not supported")
    if kind in ("linear", "yarn") and "factor" not in rope:
        raise ConvertError(f"config.json gives rope_type {kind!r} without a factor")
    check_positive(rope)
    if kind == "llama3" and not rope.get("low_freq_factor", 1.0) < rope.get("high_freq_factor", 4.0):
        raise ConvertError(NO_ANGLES.format("a low_freq_factor that is not below high_freq_factor"))
    plain = 1 / np.power(float(rope["rope_theta"]), np.arange(0, head_dim, 2) / head_dim)
    if kind == "linear":
        plain = plain / rope["factor"]
    if kind == "llama3":
        plain = plain / llama3_factors({"original_max_position_embeddings": positions, **rope}, head_dim)
    if kind == "yarn":
        return _yarn(rope, plain, head_dim, positions)
    return plain.astype(np.float32), 1.0


def _yarn(rope: Mapping[str, Any], plain: NDArray[Any], head_dim: int, positions: int) -> tuple[NDArray[np.float32], float]:
    """High frequencies as they are, low ones divided, a ramp between (https://arxiv.org/abs/2309.00071)."""
    import numpy as np

    factor, context = rope["factor"], rope.get("original_max_position_embeddings", positions)
    theta, usual = rope["rope_theta"], 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

    def bound(rotations: float) -> float:
        """The index of the frequency that turns so often over the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = bound(rope.get("beta_fast") or 32), bound(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    return (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32), float(rope.get("attention_factor", usual))

