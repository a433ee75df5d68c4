"""About how long a plan takes: enough to tell seconds from hours, from rates of one core of a cloud machine."""

from __future__ import annotations

from collections.abc import Iterable

from edgeport.registry import roundings
from edgeport.rounding import AUTO, NEAREST
from edgeport.steps import Step

COPIED = 300e6
"""Bytes a second that are read and written, hashed and synced on the way."""
PLAIN, FAST = 250e6, 100e6
"""Weights a second to plain numbers, and to block formats of fresh scales but for those below."""
ENCODED = {"Q3_K": 30e6, "Q2_K": 20e6, "Q6_K": 21e6, "Q5_K": 10e6, "Q4_K": 9e6, "IQ4_NL": 3e6, "IQ4_XS": 2e6}
"""ggml's reference encoders, one thread."""
BY_CHANCE, CALIBRATED = 10e6, 1.2e6
"""Weights a second that a rule of rounding chooses codes for on a grid (`bench.rounding_speed`)."""


def seconds(steps: Iterable[Step]) -> float:
    """Of the whole loop, with the rounding that automatic choice may take; a probe and its text are not in it."""
    return sum((step.origin.nbytes + step.target.nbytes) / COPIED + step.target.elements / rate(step) for step in steps)


def rate(step: Step) -> float:
    """Weights a second beside reading and writing."""
    if step.copied:
        return float("inf")
    if step.rounding == AUTO and not step.edits:
        return CALIBRATED
    if step.rounding not in (AUTO, NEAREST):
        return CALIBRATED if roundings()[step.rounding].calibrated else BY_CHANCE
    return ENCODED.get(step.target.format, PLAIN if step.target.codec == "plain" else FAST)
