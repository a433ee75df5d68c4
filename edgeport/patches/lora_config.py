"""adapter_config.json of a LoRA that edgeport writes: what PEFT's `LoraConfig` needs to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NO_TARGET = "dummy-target-modules"
"""PEFT's word for an adapter that changes no layer by factors (`peft.utils.constants.DUMMY_TARGET_MODULES`)."""

WRITES = re.compile(r"ForCausalLM|LMHeadModel|ForConditionalGeneration")
"""Classes of transformers that PEFT takes for the task CAUSAL_LM: it asks them for what only writing text needs."""


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's `task_type` for a model with that config.json; None for one that does not write text."""
    architecture = str(next(iter(config.get("architectures") or ()), "ForCausalLM"))
    return "CAUSAL_LM" if WRITES.search(architecture) else None


def lora_config(ranks: Mapping[str, int], alpha: int, **more: Any) -> dict[str, Any]:
    """For factors of these ranks, by module name, each product multiplied by `alpha` / rank."""
    return {
        "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": 0.0, "peft_type": "LORA", "r": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != alpha},
        "target_modules": list(ranks) or NO_TARGET, "task_type": "CAUSAL_LM", "use_rslora": False, **more,
    }  # fmt: skip


def spelled(config: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(config), indent=2).encode() + b"\n"
