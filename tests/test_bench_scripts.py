"""Every script of `bench` can be loaded, whatever has changed in what it imports."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import bench

SCRIPTS = sorted(path.stem for path in Path(bench.__path__[0]).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_loaded(name: str) -> None:
    assert import_module(f"bench.{name}")
