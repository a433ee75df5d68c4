"""An ONNX graph as it is written: nodes, small constants, and initializers that are ranges of a file still to be filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeport.errors import PlanViolation, need
from edgeport.tensor import Part

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

MICROSOFT = "com.microsoft"
OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
ALIGNMENT = 4096
"""Of each range in the data file, so that onnxruntime can map it."""
# safetensors name: TensorProto.DataType
TYPES = {"F32": 1, "U8": 2, "I8": 3, "I64": 7, "I32": 6, "F16": 10, "BF16": 16, "I4": 22}
"""I4 is no safetensors type: two signed codes a byte."""


@dataclass
class Graph:
    """Values are named by strings, and every method that adds a node returns the name of its first output."""

    name: str = "decoder"
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], Any] = field(default_factory=dict)
    views: dict[str, tuple[int, tuple[int, ...], tuple[Part, ...]]] = field(default_factory=dict)
    """Initializers in the data file: type, dimensions, and the stored tensors that follow each other there."""

    def __post_init__(self) -> None:
        self.onnx = need("onnx", "onnx")

    def input(self, name: str, dtype: str, dims: Sequence[str | int]) -> str:
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, TYPES[dtype], dims))
        return name

    def output(self, name: str, dtype: str, dims: Sequence[str | int]) -> str:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, TYPES[dtype], dims))
        return name

    def __call__(self, operator: str, *inputs: str, out: str | Sequence[str] = "", domain: str = "", **attributes: Any) -> str:
        """Add a node; `out` names its outputs, where the name matters or there are several."""
        name = f"{operator}_{len(self.nodes)}"
        outputs = [out or f"{name}_out"] if isinstance(out, str) else list(out)
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def cast(self, value: str, dtype: str, out: str = "") -> str:
        return self("Cast", value, out=out, to=TYPES[dtype])

    def number(self, value: float, dtype: str) -> str:
        """A scalar, also in a type that numpy lacks."""
        constant = self.constant(value, "float16" if dtype == "F16" else "float32")
        return self.cast(constant, dtype) if dtype == "BF16" else constant

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> str:
        """A small tensor inside the graph; equal ones are one."""
        import numpy as np

        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self.onnx.numpy_helper.from_array(array, f"constant_{len(self.constants)}")
        return str(self.constants[key].name)

    def stored(self, name: str, dtype: str, dims: Sequence[int], *parts: Part) -> str:
        """An initializer made of stored tensors, end to end. Several may be made of the same ones."""
        self.views[name] = (TYPES[dtype], tuple(dims), parts)
        return name

    def places(self) -> tuple[dict[str, int], int]:
        """Where each stored tensor begins in the data file, and the file's size."""
        offsets: dict[str, int] = {}
        end = 0
        for _, _, parts in self.views.values():
            if parts[0].spec.name in offsets:
                continue
            end += -end % ALIGNMENT
            for part in parts:
                offsets[part.spec.name] = end
                end += part.spec.nbytes
        return offsets, end

    def serialize(self, data_file: str, offsets: Mapping[str, int], about: Mapping[str, str]) -> bytes:
        """The model's file, whose initializers point into `data_file`."""
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        initializers = list(self.constants.values())
        for name, (dtype, dims, parts) in self.views.items():
            begin, length = offsets[parts[0].spec.name], sum(part.spec.nbytes for part in parts)
            if offsets[parts[-1].spec.name] + parts[-1].spec.nbytes != begin + length:
                raise PlanViolation(f"the stored tensors of {name} do not follow each other")
            tensor = proto(name=name, data_type=dtype, dims=dims, data_location=proto.EXTERNAL)
            for key, value in (("location", data_file), ("offset", begin), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        domains = {node.domain for node in self.nodes}
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)] * (MICROSOFT in domains)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeport")
        helper.set_model_props(model, dict(about))
        return bytes(model.SerializeToString())
