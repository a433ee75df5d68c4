"""Whether the installed onnxruntime knows the operators of a graph, and computes them right, asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from converters.onnx.graph import MICROSOFT
from edgeport.errors import ConvertError, need
from edgeport.runtime import check_version


def check_operators(model: bytes) -> None:
    """Raises ConvertError for an operator or opset that it lacks. Without an onnxruntime there is nothing to ask."""
    if find_spec("onnxruntime") is None:
        return
    onnx = need("onnx", "onnx")
    state: Any = need("onnxruntime.capi.onnxruntime_pybind11_state", "onnx")
    loaded, version = onnx.load_from_string(model), need("onnxruntime", "onnx").__version__
    missing = unknown(loaded, state.get_all_operator_schema())
    if missing:
        raise ConvertError(
            f"the installed onnxruntime {version} has no {', '.join(missing)}; install a newer one"
            + (", or give --portable" if any(name.startswith("com.") for name in missing) else "")
        )


    if any(node.domain == MICROSOFT for node in loaded.graph.node):
        check_version(version)


def unknown(model: Any, schemas: Iterable[Any]) -> list[str]:
    """The opsets and operators of a model that are in none of the schemas, or take fewer inputs there."""
    wanted = {entry.domain: entry.version for entry in model.opset_import}
    inputs: dict[tuple[str, str], int] = {}
    newest: dict[str, int] = {}
    for schema in schemas:
        newest[schema.domain] = max(newest.get(schema.domain, 0), schema.since_version)
        if schema.since_version <= wanted.get(schema.domain, 0):
            key = (schema.domain, schema.name)
            inputs[key] = max(inputs.get(key, 0), schema.max_input)
    late = [f"opset {version} of {domain or 'ai.onnx'}" for domain, version in wanted.items() if version > newest.get(domain, 0)]
    used = {(node.domain, node.op_type, len(node.input)) for node in model.graph.node}
    absent = {(domain, name) for domain, name, count in used if inputs.get((domain, name), -1) < count}
    return late + [f"{domain or 'ai.onnx'}.{name}" for domain, name in sorted(absent)]
