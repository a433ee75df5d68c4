"""Encoders that are exported by tracing transformers' own code: which there are, and what they are given.

Another family is another entry of a table, if torch can trace it and its inputs are one of the three kinds below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeport.errors import ConvertError, UnsupportedArchitecture

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
TEXT = (
    "albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip
IMAGE = ("beit", "deit", "dinov2", "vit")
AUDIO = ("whisper",)
ENCODERS = (*TEXT, *IMAGE, *AUDIO)
"""By model_type."""
PART = {"WhisperModel": "encoder", "WhisperForConditionalGeneration": "model.encoder"}
"""Of a class that has more than an encoder: the module that the graph computes."""
LENGTH = 9
"""Of the example that is traced; the graph takes any."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model of an encoder's kind, by the class that its config.json names."""

    config: Config
    architecture: str

    @property
    def part(self) -> str:
        """The module that the graph computes; "": the whole model."""
        return PART.get(self.architecture, "")

    @property
    def reads_text(self) -> bool:
        return self.config["model_type"] in TEXT

    @property
    def picture(self) -> tuple[int, int] | None:
        """Height and width, of a model that looks at pictures."""
        if self.config["model_type"] not in IMAGE:
            return None
        size = self.config.get("image_size", 224)
        height, width = size if isinstance(size, list) else (size, size)
        return height, width

    def dims(self) -> dict[str, tuple[str | int, ...]]:
        """Inputs and their dimensions, those that vary by name. Raises ConvertError."""
        kind, config = self.config["model_type"], self.config
        try:
            if self.reads_text:
                typed = config.get("type_vocab_size", 1) > 1 and kind != "modernbert"
                names = ["input_ids", "attention_mask", *["token_type_ids"] * typed]
                return dict.fromkeys(names, ("batch", "length"))
            if self.picture:
                return {"pixel_values": ("batch", config.get("num_channels", 3), *self.picture)}
            # two frames a position: the encoder's second convolution has a stride of two
            return {"input_features": ("batch", config["num_mel_bins"], 2 * config["max_source_positions"])}
        except KeyError as error:
            raise ConvertError(f"config.json says nothing of {error.args[0]}, which the graph of {kind} needs") from error

    def example(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Inputs of these sizes: tokens of the vocabulary, the last text half padded; else normally distributed numbers."""
        import torch

        draw = torch.Generator().manual_seed(0)
        shapes = {name: [sizes[dim] if isinstance(dim, str) else dim for dim in dims] for name, dims in self.dims().items()}
        given = {}
        for name, shape in shapes.items():
            if name == "attention_mask":
                given[name] = torch.ones(shape, dtype=torch.int64)
                given[name][-1, shape[1] // 2 + 1 :] = 0
            elif name == "token_type_ids":
                given[name] = torch.randint(0, 2, shape, generator=draw)
            elif name == "input_ids":
                given[name] = torch.randint(3, self.config.get("vocab_size", 1000), shape, generator=draw)
            else:
                given[name] = torch.randn(shape, generator=draw)
        return given


def encoder(config: Config) -> Encoder | None:
    """The encoder of a config.json, or None for another kind of model. Raises UnsupportedArchitecture."""
    if config.get("model_type") not in ENCODERS:
        return None
    architecture = str(next(iter(config.get("architectures") or ()), ""))
    if not architecture or config.get("is_decoder"):
        what = "is_decoder is set" if architecture else "it names no architecture"
        raise UnsupportedArchitecture(
            f"config.json is of type {config['model_type']} and {what}; an encoder such as BertModel or "
            "BertForSequenceClassification was expected"
        )
    return Encoder(config, architecture)


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The model's own names of its weights to the checkpoint's, by the renamings that transformers loads it with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    state = model.state_dict()
    changes: list[Any] = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    spelled = {}
    for name in names:
        own, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            spelled[own] = name
    return spelled


def shared(model: Any, part: str) -> dict[str, str]:
    """The weights of a part of the model, each by its full name; a tied one by the name that its first owner gives it."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    prefix = f"{part}." if part else ""
    inner = model.get_submodule(part)
    found = {name: first[id(parameter)] for name, parameter in inner.named_parameters(remove_duplicate=False)}
    return {name: prefix + name for name in inner.state_dict()} | found
