"""From a patch's tensor names to the model's: tables of prefixes and renames, never string surgery in passing."""

from __future__ import annotations

import re
from collections.abc import Container

PEFT_PREFIX = "base_model.model."

# A fine-tune saved by one version of transformers, and a base saved by another or by a sub-model class, spell the
# same weight with these differences (transformers 5: `conversion_mapping`, `_checkpoint_conversion_mapping`).
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^", r""),
    (r"^model\.", r""),
    (r"^", r"model."),
    (r"^language_model\.model\.", r"model.language_model."),
    (r"^model\.language_model\.", r"language_model.model."),
    (r"^language_model\.lm_head\.", r"lm_head."),
    (r"^model\.language_model\.", r"model."),
    (r"^transformer\.", r""),
    (r"^", r"transformer."),
    (r"\.gamma$", r".weight"),
    (r"\.beta$", r".bias"),
)


def resolve(name: str, known: Container[str]) -> str | None:
    """The spelling of weight `name` among the base's `known` names, or None."""
    for pattern, replacement in RENAMES:
        candidate = re.sub(pattern, replacement, name, count=1)
        if candidate in known:
            return candidate
    return None
