"""The benchmark as one HTML page that needs no network: `page.html` with the results inside."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

from edgeport.benchmark.results import MODELS, Results

PLACE = "/*RESULTS*/null"


def page(results: Results) -> str:
    """The whole page."""
    template = (files("edgeport.benchmark") / "page.html").read_text(encoding="utf-8")
    rows = [replace(row, answers=None).to_json() for row in results.of_first_patches]
    content = json.dumps({**results.to_json(), "rows": rows, "models": MODELS}, separators=(",", ":"))
    # the end of a script element is the one thing that JSON in a script must not spell
    return template.replace(PLACE, content.replace("<", "\\u003c"), 1)
