"""LoRA as PEFT writes it: W + s B A, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2106.09685, 2312.03732).

PEFT's adapter also carries whole values that training replaced: biases, `modules_to_save`, resized embeddings and
single rows (`trainable_token_indices`). With the old base at hand such a value becomes its difference to the old
one; without it, the new base's value is replaced, as PEFT's own merge does. The frozen weight that PEFT saves under an
embedding's or a head's factors or rows gives those of new tokens alone: all others are the new base's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from sys import float_info
from typing import Any

from edgeport.checkpoint import Stored, open_checkpoint, read_json
from edgeport.errors import CorruptCheckpoint, NotACheckpoint, ShapeMismatch, TargetMissing, UnsupportedPatch
from edgeport.hub import called
from edgeport.patches.edits import LowRank, NewRows, Replace, ReplaceRows
from edgeport.patches.names import PEFT_PREFIX, TIED_BY_PEFT, TURNED_MODELS, find, has_turned_name, is_turned
from edgeport.seams import Edit, Source
from edgeport.tensor import TensorSpec, Weight
from edgeport.ties import ends, is_end, is_tied, names_end

FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
RECORD = "edgeport.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip

# Options that say how the adapter was trained or loaded and that leave W + s B A as it is.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying", "lora_bias",
}  # fmt: skip
# Initialisations that leave the base's own weights alone; the others subtract the initial B A from the base.
BASE_KEEPING_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")
"""Begins of those that PEFT can turn into an ordinary LoRA (`_convert_state_dict_for_initial_model`)."""

LOW_RANK = re.compile(
    r"^(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.(?!weight$|bias$)[^.]+)?"
    r"(?:\.(?P<leaf>weight|bias))?$"
)
TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
FROZEN = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.weight$")
"""The weight under an embedding's or a head's factors or rows: the old base's own, with more rows where tokens are new."""
WHOLE = re.compile(r"^(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<leaf>weight|bias)$")
REPLACED = re.compile(r"\.original_module\.(.+\.)?(weight|bias)$")
"""With bias="all" PEFT also saves what `modules_to_save` has put out of use, untrained as it is."""
SAVED_TWICE = re.compile(r"^(?P<outer>.+)\.modules_to_save\.[^.]+\.(?P<inner>.+\.bias)$")
"""And of a module that has modules in it the biases that it has saved under their own names."""


@dataclass(frozen=True)
class LoraPatch:
    path: Path
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    files: Sequence[Path]
    scale: float
    base_fingerprint: str | None = None
    made_tied: bool = False
    """Whether edgeport took it from a model whose embedding is its head."""
    kind: str = field(default="lora", init=False)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.stored

    @property
    def facts(self) -> Mapping[str, Any]:
        config = self.config
        pairs = {name for name in self.stored if (m := LOW_RANK.match(name)) and m["factor"].endswith("_A")}
        modules = {m["module"].removeprefix(PEFT_PREFIX): self.stored[name].shape[0]
                   for name in pairs if (m := LOW_RANK.match(name))}  # fmt: skip
        scalings = sorted({self.scaling(module, rank) for module, rank in modules.items()})
        return {
            "rank": sorted(set(modules.values())),
            "alpha": config.get("lora_alpha"),
            "scaling": scalings,
            "rslora": bool(config.get("use_rslora")),
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
            "modules_to_save": config.get("modules_to_save") or [],
            "base_model": config.get("base_model_name_or_path"),
            "base_fingerprint": self.base_fingerprint,
        }

    def scaling(self, module: str, rank: int) -> float:
        """s of one module, its patterns matched as PEFT matches them (`get_pattern_key`).

        Raises CorruptCheckpoint.
        """
        alpha = self.pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        rank_stated = self.pattern("rank_pattern", module, self.config.get("r", rank))
        if rank_stated != rank:
            raise CorruptCheckpoint(f"{CONFIG} gives {module} the rank {rank_stated:g}, and its tensors have {rank}")
        if rank == 0:
            raise CorruptCheckpoint(f"the LoRA factors of {module} have rank 0: there is nothing to merge")
        return float(alpha / (sqrt(rank) if self.config.get("use_rslora") else rank))

    def pattern(self, key: str, module: str, default: float) -> float:
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(spelled_out(pattern), module):
                return float(value)
        return float(default)

    def assets(self) -> Mapping[str, Path]:
        return {name: self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()}

    def edits(self, new: Source, old: Source | None) -> Sequence[Edit]:
        return list(self.match(new, old))

    def match(self, new: Source, old: Source | None) -> Iterable[Edit]:
        """One edit for each group of the adapter's tensors: values first, then the rows put over them, then what is added.

        A tensor that no form takes is left for the plan to report.
        """
        halves: dict[tuple[str, bool], dict[str, Stored]] = {}
        trained = {match["module"] for name in self.stored if (match := LOW_RANK.match(name) or TOKENS.match(name))}
        rows: dict[str, Stored] = {}
        frozen: dict[str, Stored] = {}
        whole: dict[str, list[Stored]] = {}
        for name, stored in self.stored.items():
            if match := LOW_RANK.match(name):
                if match["leaf"] == "bias":
                    raise UnsupportedPatch(f"{name}: a bias on a LoRA factor (lora_bias) is not merged yet")
                halves.setdefault((match["module"], "embedding" in match["factor"]), {})[match["factor"][-1]] = stored
            elif match := TOKENS.match(name):
                rows[match["module"]] = stored
            elif (match := FROZEN.match(name)) and match["module"] in trained:
                frozen[match["module"]] = stored
            elif match := WHOLE.match(name):
                whole.setdefault(f"{match['module']}.{match['leaf']}", []).append(stored)
        yield from self.new_rows(frozen, new)
        for name, values in whole.items():
            yield self.whole(self.find(name, new), values, old)
        for module, stored in rows.items():
            yield self.token_rows(module, stored, frozen.get(module), new, old)
        for (module, embedding), pair in halves.items():
            if len(pair) < 2:
                bare = module.removeprefix(PEFT_PREFIX)
                raise CorruptCheckpoint(f"{bare} has only one of its two LoRA factors ({', '.join(pair)})")
            yield self.low_rank(module, embedding, pair, frozen.get(module), new, old)

    def find(self, name: str, new: Source) -> Weight:
        """The base's weight of that name; the head of a tied base is its embedding. Raises TargetMissing."""
        bare = name.removeprefix(PEFT_PREFIX)
        if weight := find(bare, new.weights):
            return weight
        made_on = self.config.get("base_model_name_or_path") or "the model that the patch was made on"
        raise TargetMissing(
            f"the patch changes {bare}, which {called(new.path)} does not have; is {made_on} of the same architecture?"
        )

    def low_rank(
        self, module: str, embedding: bool, pair: Mapping[str, Stored], frozen: Stored | None, new: Source, old: Source | None
    ) -> Edit:
        bare = module.removeprefix(PEFT_PREFIX)
        weight = self.find(f"{module}.weight", new)
        down, up = pair["A"], pair["B"]
        if len(down.shape) != 2 or len(up.shape) != 2 or len(weight.shape) != 2:
            raise UnsupportedPatch(f"{bare}: LoRA on a convolution or another tensor that is no matrix is not merged yet")
        final = self.resized(weight, frozen)
        (rank, inner), (outer, other) = down.shape, up.shape
        # PEFT goes by the layer; its config keeps what it found of the last one, and over quantized layers what it was given
        if embedding or new.config.get("model_type") in TURNED_MODELS:
            transposed = embedding or is_turned(bare, new.config)
        elif inner == outer:
            transposed = bool(self.config.get("fan_in_fan_out")) and has_turned_name(bare)
        else:
            transposed = final == (inner, outer)
        shape = (inner, outer) if transposed else (outer, inner)
        if rank != other:
            raise CorruptCheckpoint(f"the factors of {bare} are of rank {rank} and {other}: they have no product")
        if shape != final:
            raise ShapeMismatch(f"the patch was made for {bare} of shape {list(shape)}; the base has {list(weight.shape)}")
        self.before(weight, old)
        idle = (frozen.name,) if frozen else ()
        scaling, tied = self.scaling(bare, rank) * self.scale, self.keeps_tie(weight)
        return LowRank(weight.name, final, down, up, scaling, transposed, tied, idle=idle)

    def resized(self, weight: Weight, stored: Stored | None) -> tuple[int, ...]:
        """The shape that the weight takes from the patch's own, which may have a larger vocabulary. Raises ShapeMismatch."""
        shape = stored.shape if stored else weight.shape
        vocabulary = is_end(weight.name)
        if shape != weight.shape and not (vocabulary and shape[1:] == weight.shape[1:] and shape[0] > weight.shape[0]):
            raise ShapeMismatch(f"the patch has {weight.name} of shape {list(shape)}; the base has {list(weight.shape)}")
        return shape

    def new_rows(self, frozen: Mapping[str, Stored], new: Source) -> Iterable[Edit]:
        """What resized matrices have beyond the base's; what stands under a tied base's head is its embedding."""
        found = {}
        model = ends(new.weights) if is_tied(new.weights, new.config) else None
        for module, stored in frozen.items():
            weight = self.find(f"{module}.weight", new)
            if model and weight.name == model.head:
                weight = new.weights[model.embedding]
            if self.resized(weight, stored) != weight.shape:
                found[weight.name] = NewRows(weight.name, stored.shape, stored, weight.rows)
        return found.values()

    def whole(self, weight: Weight, values: Sequence[Stored], old: Source | None) -> Edit:
        """`values`: one matrix, which PEFT saves a second time, under the bare name, where a vocabulary has grown."""
        stored, *others = sorted(values, key=lambda one: ".modules_to_save." not in one.name)
        shape = self.resized(weight, stored)
        # a head of the old size cannot stay beside a grown embedding
        tied = self.keeps_tie(weight) or (shape != weight.shape and not self.names_head)
        idle = tuple(one.name for one in others)
        return Replace(weight.name, shape, stored, weight.rows, self.scale, self.before(weight, old), tied, idle)

    def token_rows(self, module: str, stored: Stored, frozen: Stored | None, new: Source, old: Source | None) -> Edit:
        weight = self.find(f"{module}.weight", new)
        indices = self.token_indices(module)
        if len(stored.shape) != 2 or stored.shape[0] != len(indices):
            raise CorruptCheckpoint(f"{stored.name} has shape {list(stored.shape)}; {len(indices)} tokens were expected")
        if stored.shape[1] != weight.columns:
            raise ShapeMismatch(f"{stored.name} is of tokens of width {stored.shape[1]}; the base's have {weight.columns}")
        shape, idle = self.resized(weight, frozen), (frozen.name,) if frozen else ()
        if indices and max(indices) >= shape[0]:
            raise ShapeMismatch(f"the patch trains token {max(indices)}; the base has {shape[0]} tokens")
        before = self.before(weight, old)
        return ReplaceRows(weight.name, shape, stored, weight.rows, indices, self.scale, before, self.ties_rows, idle)

    def token_indices(self, module: str) -> tuple[int, ...]:
        given = self.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((rows for key, rows in given.items() if module == key or module.endswith(f".{key}")), None)
        if not isinstance(given, list) or not all(type(index) is int and index >= 0 for index in given):
            raise CorruptCheckpoint(f"{CONFIG} has no list of trainable_token_indices for {module}")
        return tuple(given)

    @property
    def ties_rows(self) -> bool:
        """Whether PEFT gives the rows of an embedding to a tied head: not where both name rows, and other ones."""
        given = self.config.get("trainable_token_indices")
        named = given if isinstance(given, Mapping) else {}
        of_ends = [rows for module, rows in named.items() if names_end(module)]
        return all(rows == of_ends[0] for rows in of_ends)

    @property
    def names_head(self) -> bool:
        return any(".lm_head." in f".{name}" for name in self.stored)

    def keeps_tie(self, weight: Weight) -> bool:
        """Whether a change of the embedding is the head's too."""
        return self.made_tied or (weight.name.endswith(TIED_BY_PEFT) and bool(self.config.get("ensure_weight_tying")))

    def before(self, weight: Weight, old: Source | None) -> tuple[Source, Weight] | None:
        """The weight in the old base, where there is one. Raises TargetMissing, ShapeMismatch."""
        if old is None:
            return None
        known = self.find(weight.name, old)
        grown = is_end(weight.name) and known.shape[1:] == weight.shape[1:]
        if known.shape != weight.shape and not grown:
            raise ShapeMismatch(
                f"{weight.name} has shape {list(known.shape)} in the old base and {list(weight.shape)} in the new one; "
                "both must be of the same architecture and size"
            )
        return old, known


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse, by name, whatever would make the result differ from W + s B A."""
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UnsupportedPatch(f"the patch is of kind {kind}, and edgeport merges LORA so far")
    unknown = sorted(key for key, value in config.items() if key not in HARMLESS and value)
    if unknown:
        raise UnsupportedPatch(f"the patch uses {', '.join(unknown)}, which edgeport does not merge")
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in BASE_KEEPING_INITS:
        remedy = (
            "Save it with PEFT's path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA"
            if init.startswith(CONVERTIBLE_INITS) else "Merge it with PEFT, and take the patch from that with `edgeport extract`"
        )  # fmt: skip
        raise UnsupportedPatch(
            f"the patch was initialised by {init}, which changes the base's own weights: B A alone is not its change. {remedy}"
        )
    if config.get("lora_bias"):
        raise UnsupportedPatch("the patch uses lora_bias, which edgeport does not merge")
    check_numbers(config)


def check_numbers(config: Mapping[str, Any]) -> None:
    """What the scaling is computed from is what PEFT would write. Raises CorruptCheckpoint."""
    for key in ("lora_alpha", "r"):
        if not is_number(config.get(key, 8)):
            raise CorruptCheckpoint(f"{CONFIG} has the {key} {config[key]!r:.40} where a number was expected")
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(map(is_number, table.values())):
            raise CorruptCheckpoint(f"{CONFIG} has a {key} that is no table of module names to numbers")
        for pattern in table:
            try:
                re.compile(spelled_out(pattern))
            except re.error as error:
                raise CorruptCheckpoint(f"{CONFIG}: {pattern!r} in {key} is no regular expression: {error}") from error


def spelled_out(pattern: str) -> str:
    """A pattern of module names, as PEFT matches it."""
    return rf"(.*\.)?({pattern})$"


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= float_info.max


def recorded(path: Path) -> tuple[str | None, bool]:
    """What the folder's edgeport.json says of the base that the patch was made on: its fingerprint, and whether it is tied."""
    if not (path / RECORD).is_file():
        return None, False
    record = read_json(path / RECORD)
    fingerprint = record.get("base_fingerprint")
    if not isinstance(fingerprint, str | None):
        raise CorruptCheckpoint(f"{RECORD} in {called(path)} has the base_fingerprint {fingerprint!r} where a text was expected")
    return fingerprint, bool(record.get("tied"))


def is_saved_twice(name: str, stored: Collection[str]) -> bool:
    found = SAVED_TWICE.match(name)
    return found is not None and f"{found['outer']}.{found['inner']}" in stored


class LoraKind:
    name = "lora"

    def detect(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def open(self, path: Path, scale: float) -> LoraPatch:
        config = read_json(path / CONFIG)
        check_config(config)
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise NotACheckpoint(f"{path} has {CONFIG} and none of {', '.join(FILES)}")
        stored = open_checkpoint(file)
        for name in [name for name in stored if REPLACED.search(name) or is_saved_twice(name, stored)]:
            del stored[name]
        if not stored:
            raise CorruptCheckpoint(f"{file.name} holds no tensors")
        for name, place in stored.items():
            if "F" not in place.dtype:
                raise UnsupportedPatch(f"the patch tensor {name} is of type {place.dtype}, and not of floating point")
            if (match := LOW_RANK.match(name)) and match["leaf"] != "bias" and len(place.shape) < 2:
                raise CorruptCheckpoint(
                    f"{file.name} has {name} of shape {list(place.shape)} where a matrix was expected; if it was saved from "
                    "shards (DeepSpeed ZeRO-3, FSDP), save it again with the parameters gathered"
                )
        return LoraPatch(path, config, stored, [file, path / CONFIG], scale, *recorded(path))


patch_kind = LoraKind()
