"""The files of an ONNX output beside its graph and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgeport.seams import Source, Target

MODEL, DATA = "model.onnx", "model.onnx.data"
ABOUT = "edgeport"
"""The key of the model's metadata under which its settings stand."""


def companions(source: Source, target: Target, staging: Path) -> dict[str, Any]:
    """Copy tokenizer and processor files verbatim; write, and return, config.json as it is to be."""
    for name, path in {**source.assets(staging), **target.assets}.items():
        if path.parent != staging:
            shutil.copyfile(path, staging / name)
    config = {key: value for key, value in target.config.items() if key != "quantization_config"}
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config
