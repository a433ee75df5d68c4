"""The graph of an encoder, traced by torch's exporter from transformers' own code, without a weight in memory.

The model is built from its config with parameters that have shapes alone (`FakeTensorMode`). The exporter's graph then
names them; the sink streams them. This runs in a process of its own, since torch's exporter takes more memory to import
than a port does.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.onnx.graph import OPSET
from edgeport.aside import Watch, serve
from edgeport.encoders import LENGTH, Encoder, encoder, shared, stored_names
from edgeport.errors import UnsupportedArchitecture, need
from edgeport.forward import build_class

BATCH = 2
"""Of the example: with 1, torch takes the dimension for one that never varies."""


def main(job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """`job`: config, names of the source's weights, and the file that the graph is written to."""
    found = encoder(job["config"])
    assert found
    graph, table, absent = trace(found, job["names"])
    Path(job["output"]).write_bytes(graph)
    return {"table": table, "absent": absent}


def trace(found: Encoder, names: list[str]) -> tuple[bytes, str, list[str]]:
    """The serialized graph, its weights named as in the checkpoint and left empty; the table that tokens are looked up in
    ("": none); and the weights that the checkpoint lacks.

    `names`: of the checkpoint's weights. Raises UnsupportedArchitecture, MissingExtra.
    """
    import torch
    from torch._subclasses import FakeTensorMode

    need("onnxscript", "onnx")
    ir = need("onnx_ir", "onnx")
    model = build_class(found.config, found.architecture)
    spelled = stored_names(model, names)
    part = model.get_submodule(found.part)
    aliases = shared(model, found.part)
    paths = {id(module): path for path, module in part.named_modules()}
    table = f"{paths[id(part.get_input_embeddings())]}.weight" if found.reads_text else ""
    dims = found.dims()
    dynamic = {
        name: {at: torch.export.Dim.DYNAMIC for at, dim in enumerate(its) if isinstance(dim, str)} for name, its in dims.items()
    }
    example = found.example({"batch": BATCH, "length": LENGTH})
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        unfilled(part)
        given = {name: mode.from_tensor(values) for name, values in example.items()}
        try:
            exported = torch.export.export(part, (), kwargs=given, dynamic_shapes=dynamic, strict=False)
            # a run of our own would tell them too, and leave tensors without memory in caches that transformers keeps
            outputs = list(exported.call_spec.out_spec.context)
            program: Any = torch.onnx.export(
                exported, dynamo=True, optimize=False, opset_version=OPSET, verbose=False, output_names=outputs
            )
        except Exception as error:  # transformers' code and torch's exporter have no common kind
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedArchitecture(f"torch cannot trace {found.architecture}: {reason}") from error
    initializers = program.model.graph.initializers
    for name in aliases.keys() & initializers.keys():
        empty = initializers[name]
        empty.const_value = ir.ExternalTensor("", 0, 0, empty.dtype, shape=empty.shape, name=name)
    proto = ir.to_proto(program.model)
    full = {name: spelled.get(whole, whole) for name, whole in aliases.items()}
    tidy(proto, full, dims)
    needed = {tensor.name for tensor in proto.graph.initializer if tensor.data_location}
    return bytes(proto.SerializeToString()), full.get(table, ""), sorted(needed - set(names))


def unfilled(module: Any) -> None:
    """Give each parameter, which has no memory, a shape on the CPU under the fake mode in force; tied ones stay one."""
    import torch

    made: dict[int, Any] = {}
    for owner in list(module.modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                kept = made.setdefault(id(parameter), (parameter, torch.nn.Parameter(torch.empty(parameter.shape), False)))
                owner._parameters[name] = kept[1]


def tidy(proto: Any, names: Mapping[str, str], dims: Mapping[str, tuple[str | int, ...]]) -> None:
    """Weights and dimensions by their own names, each weight once, and nothing of the machine that traced it."""
    symbols = {
        entry.type.tensor_type.shape.dim[at].dim_param: dim
        for entry in proto.graph.input for at, dim in enumerate(dims[entry.name]) if isinstance(dim, str)
    }  # fmt: skip
    for entry in (*proto.graph.input, *proto.graph.output):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = symbols.get(dim.dim_param, dim.dim_param)
        del entry.metadata_props[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    used = {name for node in proto.graph.node for name in node.input}
    kept = {}
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        if tensor.name in used:
            kept[tensor.name] = tensor
    del proto.graph.initializer[:], proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    proto.graph.initializer.extend(kept.values())


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter complains of packages that it does not need, and of itself."""
    torch_logger = logging.getLogger("torch.onnx")
    level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)


if __name__ == "__main__":
    serve(main)
