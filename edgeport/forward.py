"""A transformers model that leaves its weights on disk: run by transformers' own code, a block of rows at a time.

The model is built without its parameters. Each linear layer then multiplies by a few rows of its matrix at a time, an
embedding looks up only the rows it is asked for, and every other module has its own few numbers read just before it
runs and dropped after. What stays in memory is activations, whatever the number of layers or the size of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from edgeport.blocks import Readable, decode_rows, ranges
from edgeport.errors import CorruptCheckpoint, MissingTensor, UnsupportedArchitecture, about, need
from edgeport.hub import called
from edgeport.memory import trim_heap
from edgeport.probing import FUSED
from edgeport.seams import Executable, Scorer, Source
from edgeport.tensor import Weight, is_buffer

if TYPE_CHECKING:
    from torch import Tensor, nn

Done = Callable[[], None]
"""Called whenever a layer has run."""
Model = Any
"""A transformers PreTrainedModel, whose methods have too few annotations for a strict check."""
BLOCK_ELEMENTS = 1 << 18
"""Elements of a weight that are in memory at once, where its format lets it be cut so small: enough that reading and
multiplying take far longer than the call."""
# What would make transformers look for code or kernels that the decoded weights do not need.
NOT_THE_MODEL = ("auto_map", "quantization_config")


def silent() -> None:
    """For those who do not watch."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """A causal language model over a source. `head` spells the output matrix: lm_head, or the embedding when tied."""

    model: Model
    source: Source
    head: Weight
    head_bias: Tensor | None

    def hidden(self, tokens: Tensor) -> Tensor:
        """float32 [batch, length, hidden]: what the head is given, after the final norm."""
        import torch

        with torch.no_grad(), meta_explained(self.model):
            return cast("Tensor", self.model.base_model(tokens, use_cache=False)[0])

    def logits(self, tokens: Tensor, hidden: Tensor, rows: range) -> Tensor:
        """float32 [batch, length, len(rows)]: logits of the tokens `rows` of the vocabulary.

        The model's own forward makes them from `hidden`, so whatever it does to logits (soft caps, scales) is done.
        """
        import torch
        from torch.nn.functional import linear
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        bias = None if self.head_bias is None else self.head_bias[rows.start : rows.stop]
        matrix = read_rows(self.source, self.head, rows)
        body, head = self.model.base_model, self.model.get_output_embeddings()
        body.forward = lambda *_, **__: Output(last_hidden_state=hidden)
        head.forward = lambda states: linear(states, matrix, bias)
        try:
            with torch.no_grad():
                return cast("Tensor", self.model(tokens, use_cache=False).logits)
        finally:
            del body.forward, head.forward


def stream(source: Source, done: Done = silent) -> Streamed:
    """The model that `source.config` describes, with every weight bound to the source.

    Raises UnsupportedArchitecture; MissingTensor where model and source do not have the same weights;
    CorruptCheckpoint where a weight has another shape than the config says.
    """
    from torch import nn

    model = build(source.config)
    head = model.get_output_embeddings()
    if model.base_model is model or type(head) is not nn.Linear:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} is not a body with a linear head, and only such models are compared"
        )
    paths = {module: path for path, module in model.named_modules()}
    table, name = f"{paths[model.get_input_embeddings()]}.weight", f"{paths[head]}.weight"
    tied = name not in source.weights and bool(model.config.tie_word_embeddings)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if not (tied and key == name)}
    check(source, shapes, list(model._keys_to_ignore_on_load_unexpected or ()), padded={table, name})
    owned: dict[str, dict[str, Weight]] = {}
    for key in shapes:
        path, _, attribute = key.rpartition(".")
        owned.setdefault(path, {})[attribute] = source.weights[key]
    bias = owned.pop(paths[head], {}).get("bias")
    for path, weights in owned.items():
        bind(model.get_submodule(path), source, weights, table=path == paths[model.get_input_embeddings()])
    for stack in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for layer in stack:
            # freed blocks of many sizes would stay resident and grow by tens of MiB over the layers
            layer.register_forward_hook(lambda *_: trim_heap())
            layer.register_forward_hook(lambda *_: done())
    matrix = source.weights[table if tied else name]
    return Streamed(model, source, matrix, None if bias is None else read_whole(source, bias))


def scorer(source: Source) -> Scorer:
    """The source's own program where it has one, else the streamed model. Raises what `stream` does."""
    return source.execute() if isinstance(source, Executable) else stream(source)


def build(config: Mapping[str, Any]) -> Model:
    """The causal language model of a config.json, its parameters without memory and its buffers computed.

    Raises UnsupportedArchitecture where transformers has none for it.
    """
    transformers = need("transformers", "hf")
    attention = "sdpa" if config.get("model_type") in FUSED else "eager"
    make = partial(transformers.AutoModelForCausalLM.from_config, attn_implementation=attention)
    return made(config, make, "causal language model")


def build_class(config: Mapping[str, Any], name: str) -> Model:
    """The same of a class of transformers. Raises UnsupportedArchitecture where it has none of that name."""
    known = getattr(need("transformers", "hf"), name, None)
    if not isinstance(known, type) or not hasattr(known, "_from_config"):
        raise UnsupportedArchitecture(f"transformers has no model class {name}, which config.json names")
    return made(config, partial(known._from_config, attn_implementation="eager"), name)


def made(config: Mapping[str, Any], make: Callable[..., Model], what: str) -> Model:
    transformers, torch = need("transformers", "hf"), need("torch", "hf")
    strict = need("huggingface_hub.errors", "hf").StrictDataclassError
    fields = {key: deepcopy(value) for key, value in config.items() if key not in NOT_THE_MODEL}
    try:
        described = transformers.AutoConfig.for_model(fields.pop("model_type", "none at all"), **fields)
        with parameters_without_memory():
            model = make(described, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError, strict) as error:
        # of settings that are missing, of another kind, beyond each other, or 0
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = " ".join(told.split())[:120]
        raise UnsupportedArchitecture(
            f"transformers has no {what} for a config.json of type {config.get('model_type')!r}: {reason}"
        ) from error
    return model.eval()


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Move each parameter to the meta device as it is registered: before it is filled, so its pages are never touched.

    Building on the meta device instead would lose the buffers that are computed from the config (rotary frequencies).
    """
    from torch.nn import Parameter
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def emptied(module: nn.Module, name: str, parameter: Parameter) -> Any:
        # a tied parameter is registered twice, and has to stay one object
        return parameter if parameter.is_meta else Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


def check(source: Source, shapes: Mapping[str, tuple[int, ...]], ignored: list[str], padded: set[str]) -> None:
    """The source has the weights that the model has, and no others. The `padded` ones may have any number of rows."""
    absent = [name for name in shapes if name not in source.weights]
    extra = [name for name in source.weights if name not in shapes]
    unused = [name for name in extra if not is_buffer(name) and not any(re.search(pattern, name) for pattern in ignored)]
    for names, what in ((absent, "it lacks"), (unused, "the model that its config describes has no place for")):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise MissingTensor(f"{called(source.path)}: {what} {', '.join(names[:5])}{more}")
    for name, shape in shapes.items():
        stored = source.weights[name].shape
        if stored[name in padded :] != shape[name in padded :]:
            raise CorruptCheckpoint(f"{name} has shape {list(stored)} where config.json says {list(shape)}")


def bind(module: nn.Module, source: Source, weights: Mapping[str, Weight], *, table: bool) -> None:
    """Make `module` read its own tensors, `weights` by attribute, from the source whenever it runs.

    Of a `table`, the embedding of tokens, it reads the rows that its input names.
    """
    from torch import nn

    if type(module) is nn.Linear:
        # an attribute of the instance goes before the class's method
        bias = (source, weights["bias"]) if "bias" in weights else None
        vars(module)["forward"] = partial(multiply, source, weights["weight"], bias)
        return
    empty = {attribute: getattr(module, attribute) for attribute in weights}
    inside = 0
    """Texts that are in the module at once: several take turns in a layer, and the first to leave it takes nothing away."""

    def load(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if table:
            rows, ids = look_up(source, weights["weight"], inputs[0])
            module.weight = nn.Parameter(rows, requires_grad=False)
            return (ids,)
        nonlocal inside
        inside += 1
        for attribute, weight in weights.items() if inside == 1 else ():
            value = read_whole(source, weight).to(empty[attribute].dtype)
            # state_dict holds persistent buffers as well
            is_parameter = isinstance(empty[attribute], nn.Parameter)
            setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        return inputs

    def drop(*_: Any) -> None:
        nonlocal inside
        inside = max(inside - 1, 0)
        for attribute, tensor in empty.items() if not inside else ():
            setattr(module, attribute, tensor)

    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # concerns gradients only, and would have to be a row of the looked-up ones
    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


def multiply(source: Readable, weight: Weight, bias: tuple[Source, Weight] | None, inputs: Tensor) -> Tensor:
    """inputs [..., columns] @ weight.T + bias, float32 [..., rows]; one block of the weight in memory."""
    from torch.nn.functional import linear

    outputs = inputs.new_empty((*inputs.shape[:-1], weight.rows))
    for rows in ranges(weight, block_rows(weight)):
        outputs[..., rows.start : rows.stop] = linear(inputs, read_rows(source, weight, rows))
    return outputs if bias is None else outputs.add_(read_whole(*bias))


def look_up(source: Source, weight: Weight, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a table that `ids` name, each once, and the ids that name the same rows in it."""
    import torch

    unique, inverse = torch.unique(ids, return_inverse=True)
    if int(unique[-1]) >= weight.rows:
        with about(weight.name):
            raise MissingTensor(f"there is no row for token {int(unique[-1])} in a vocabulary of {weight.rows}")
    return torch.cat([read_rows(source, weight, range(row, row + 1)) for row in unique.tolist()]), inverse


def block_rows(weight: Weight) -> int:
    """Rows of about BLOCK_ELEMENTS elements, in whole granules."""
    wanted = BLOCK_ELEMENTS // max(weight.columns, 1)
    return max(wanted // weight.row_granule, 1) * weight.row_granule


def read_rows(source: Readable, weight: Weight, rows: range) -> Tensor:
    """float32 [len(rows), columns], decoded with the rows of the granules around them."""
    granule = weight.row_granule
    start = rows.start // granule * granule
    stop = min(-(-rows.stop // granule) * granule, weight.rows)
    with about(weight.name):
        return decode_rows(source, weight, range(start, stop))[rows.start - start : rows.stop - start]


def read_whole(source: Source, weight: Weight) -> Tensor:
    """float32, in the weight's own shape."""
    return read_rows(source, weight, range(weight.rows)).reshape(weight.shape)


@contextmanager
def meta_explained(model: Model) -> Iterator[None]:
    """Say so where the model's code uses a parameter of a module without calling the module: it was never read."""
    try:
        yield
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise UnsupportedArchitecture(
            f"{type(model).__name__} uses weights apart from the modules that hold them; it cannot be run in blocks"
        ) from error
