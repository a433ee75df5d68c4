"""llama.cpp without its log."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def silence(llama: Any) -> Any:
    """Make llama.cpp log nothing from here on. The cache keeps the callback: llama.cpp would call it after it is gone."""
    callback = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(callback, None)
    return callback
