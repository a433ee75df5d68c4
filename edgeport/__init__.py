"""Port a fine-tune's patch onto an updated base, one block of one weight at a time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeport.api import compare as compare
    from edgeport.api import diagnose as diagnose
    from edgeport.api import export as export
    from edgeport.api import extract as extract
    from edgeport.api import formats as formats
    from edgeport.api import inspect as inspect
    from edgeport.api import liken as liken
    from edgeport.api import plan as plan
    from edgeport.api import port as port
    from edgeport.api import verify as verify
    from edgeport.errors import EdgeportError as EdgeportError

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(
        ("compare", "diagnose", "export", "extract", "formats", "inspect", "liken", "plan", "port", "verify"), "edgeport.api"
    ),
    "EdgeportError": "edgeport.errors",
}

__all__ = [
    "EdgeportError", "compare", "diagnose", "export", "extract", "formats", "inspect", "liken", "plan", "port", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'edgeport' has no attribute {name!r}")
