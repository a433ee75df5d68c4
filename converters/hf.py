"""The transformers folder: safetensors or `.bin`, one file or shards, with config and tokenizer files beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.hf_quants import BITSANDBYTES, METHODS, QUANTS, WHOLE_NUMBERS, Quant, choose, is_linear
from edgeport.checkpoint import Stored, open_checkpoint, read_config, read_json, read_lines, read_range, safetensors_bytes
from edgeport.codecs.plain import TYPES
from edgeport.errors import (
    AmbiguousFormat,
    ConvertError,
    CorruptCheckpoint,
    MissingTensor,
    NotACheckpoint,
    UnknownName,
    about,
)
from edgeport.patches.lora_config import lora_config, spelled, task_of
from edgeport.patches.names import PEFT_PREFIX, is_turned, loaded
from edgeport.registry import claim, codec, miss
from edgeport.seams import Factors, FileLayout, Source, Target
from edgeport.steps import stored_alike
from edgeport.tensor import EMBEDDING, HEAD, TensorSpec, Weight
from edgeport.ties import HEADS

if TYPE_CHECKING:
    from torch import Tensor

HOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What holds the weights, or says which shards do, in transformers' order of preference (`_get_resolved_checkpoint_files`)."""
ASSETS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template*", "*.tiktoken", "*.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
PRECISIONS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DEFAULT_SHARD_BYTES = 5 * 10**9
QUANT_FILES = ("quantize_config.json", "quant_config.json")
"""Where GPTQ's and AWQ's own packages keep what config.json's quantization_config says."""
TEMPLATES = "additional_chat_templates/*.jinja"
QUANTIZED = re.compile(r".+\.(?:qweight|q_weight|qzeros|weight_packed|weight_scale(?:_inv|_2)?|scale_weight|absmax|SCB)")
"""Tensors that stand beside a quantized weight, or in its place."""
ADAPTER = "adapter"
"""The folder of a PEFT adapter that belongs to the model it stands in."""
PEEK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Folder:
    """A transformers folder, opened by its headers."""

    path: Path
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    weights: Mapping[str, Weight]
    files: Sequence[Path]
    container: str = "hf"

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        place = self.stored[spec.name]
        return read_range(place.path, place.offset + start, place.offset + stop)

    def read_lines(self, spec: TensorSpec, start: int, stop: int, lines: int) -> bytearray:
        place = self.stored[spec.name]
        return read_lines(place.path, place.offset + start, stop - start, lines, spec.nbytes // lines)

    def assets(self, staging: Path) -> Mapping[str, Path]:
        return asset_files(self.path)


def asset_files(folder: Path) -> dict[str, Path]:
    """Config, tokenizer and generation files of a folder, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = {name: folder / name for name in names if any(fnmatch(name, pattern) for pattern in ASSETS)}
    # a model with code of its own names a part of it, which imports the rest
    if any(b'"auto_map"' in found[name].read_bytes() for name in ("config.json", "tokenizer_config.json") if name in found):
        found |= {name: folder / name for name in names if name.endswith(".py")}
    return found | {str(path.relative_to(folder)): path for path in sorted(folder.glob(TEMPLATES))}


def copy_assets(assets: Mapping[str, Path], staging: Path) -> None:
    """Bring the files into `staging` verbatim. A source may have put its own there already."""
    for name, path in assets.items():
        if path != staging / name:
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, staging / name)


def holder_of(folder: Path) -> Path | None:
    """The file of all weights, or the index of their shards; None where there is neither."""
    return next((folder / name for name in HOLDERS if (folder / name).is_file()), None)


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises NotACheckpoint, CorruptCheckpoint for a shard outside the folder."""
    index = holder_of(folder)
    if index is None:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f"; if {others[0]} is the model, rename it" if others else ""
        raise NotACheckpoint(f"{folder} holds none of {', '.join(HOLDERS)}{hint}")
    if index.suffix != ".json":
        return [index]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptCheckpoint(f"{index.name} has no weight_map of tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CorruptCheckpoint(f"{index.name} names the shard {name!r}, which is not a file of the same folder")
        if not (folder / name).is_file():
            raise NotACheckpoint(f"{index.name} names the shard {name}, which is missing from {folder}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def open_folder(path: Path) -> Folder:
    if not (path / "config.json").is_file():
        raise NotACheckpoint(f"{path} has no config.json; a transformers model folder was expected")
    config = read_config(path)
    mlx = config.get("quantization")
    quantization = config.get("quantization_config") or (mlx if isinstance(mlx, dict) and "bits" in mlx else None)
    if quantization and (method := quant_method(quantization)) not in METHODS:
        raise AmbiguousFormat(
            f"{path} is quantized ({method}), which edgeport does not read yet; give the unquantized folder or a GGUF file"
        )
    files = checkpoint_files(path)
    stored: dict[str, Stored] = {}
    for file in files:
        for name, place in open_checkpoint(file).items():
            if name in stored:
                raise CorruptCheckpoint(f"tensor {name} stands in {stored[name].path.name} and in {file.name}")
            stored[name] = place
    index = holder_of(path)
    absent = sorted(set(read_json(index)["weight_map"]) - set(stored)) if index and index.suffix == ".json" else []
    if index and absent:
        more = " ..." if len(absent) > 5 else ""
        raise MissingTensor(f"{len(absent)} of the tensors in {index.name} are in no shard ({', '.join(absent[:5])}{more})")

    def peek(name: str) -> bytes:
        place = stored[name]
        if place.nbytes > PEEK_BYTES:
            raise CorruptCheckpoint(f"{name} has {place.nbytes} bytes, where a few were expected")
        return bytes(read_range(place.path, place.offset, place.offset + place.nbytes))

    weights = {weight.name: weight for weight in claim(stored, config, peek)}
    unread = next((name for name, weight in weights.items() if weight.codec == "plain" and QUANTIZED.fullmatch(name)), None)
    if unread:
        raise AmbiguousFormat(f"{unread} belongs to a quantized weight, and {where_told(path, config)}")
    if quantization and all(weight.codec == "plain" for weight in weights.values()):
        raise CorruptCheckpoint(
            f"config.json says that {path} is quantized ({quant_method(quantization)}), and no weight of it is; take "
            "quantization_config out of config.json if that is so"
        )
    return Folder(path, config, stored, weights, files)


def quant_method(told: Any) -> str:
    """Whose a quantization_config is. bitsandbytes' may leave out the word (transformers' `AutoQuantizationConfig.from_dict`)."""
    if not isinstance(told, dict):
        return "a quantization_config of no known form"
    if told.get("load_in_4bit") or told.get("load_in_8bit"):
        return BITSANDBYTES
    return str(told.get("quant_method") or "a quantization_config without quant_method, as MLX writes it")


def where_told(path: Path, config: Mapping[str, Any]) -> str:
    """Why a folder's quantized weights are not read, and what to do."""
    if config.get("quantization_config"):
        return "quantization_config does not say that it is quantized; give the unquantized folder or a GGUF file"
    beside = next((name for name in QUANT_FILES if (path / name).is_file()), None)
    place = beside or ("its compression_config" if "compression_config" in config else None)
    known = f"write there what {place} says, in transformers' words (with a quant_method)"
    remedy = known if place else "give the unquantized folder or a GGUF file"
    return f"config.json has no quantization_config to say how it is stored; {remedy}"


@dataclass(frozen=True, slots=True)
class FolderSink:
    """Writes a transformers folder: each weight in the format it has, unless `format` or `quant` say another."""

    source: Source
    target: Target
    format: str | None
    """The plain format of every weight that is not to be in `quant`."""
    quant: Quant | None = None
    """What the linear layers become."""
    folder: bool = True
    importance: Mapping[str, Tensor] | None = None
    notes: Sequence[str] = ()

    def place(self, weight: Weight) -> Weight:
        if weight.name in self.target.formats:
            return codec("plain").layout(weight.name, weight.shape, self.target.formats[weight.name])
        if self.quant and is_linear(weight):
            with about(weight.name):
                placed = self.quant.lay_out(weight)
        elif weight.codec != "plain":
            # a quantized head has no place in another quantization_config
            format = self.format or (self.quant and plain_format(self.target.config))
            placed = codec("plain").layout(weight.name, weight.shape, format) if format else weight
        else:
            format = self.format if self.format and weight.format not in WHOLE_NUMBERS else weight.format
            placed = codec("plain").layout(weight.name, weight.shape, format)
        # one object for both sides, since there are thousands; a tied head is stored under the embedding's name
        names = ([part.spec.name for part in parts.values()] for parts in (weight.parts, placed.parts))
        return weight if stored_alike(weight, placed) and next(names) == next(names) else placed

    def finer(self, weight: Weight) -> Sequence[Weight]:
        # a bitsandbytes config can name layers that stay as they are
        if weight.codec not in ("bnb4", "int8") or weight.name in (EMBEDDING, HEAD):
            return ()
        return [codec("plain").layout(weight.name, weight.shape, plain_format(self.target.config))]

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        shards = self.shards(weights)
        layouts = []
        for name, specs in shards.items():
            header, ranges = safetensors_bytes(specs, {"format": "pt"})
            size = len(header) + sum(spec.nbytes for spec in specs.values())
            layouts.append(FileLayout(name, size, ((0, header),), ranges))
        if len(shards) > 1:
            total = sum(spec.nbytes for specs in shards.values() for spec in specs.values())
            parameters = sum(weight.elements for weight in weights)
            weight_map = {name: shard for shard, specs in shards.items() for name in specs}
            index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
            layouts.append(_whole(HOLDERS[1], json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"))
        return layouts

    def shards(self, weights: Sequence[Weight]) -> dict[str, dict[str, TensorSpec]]:
        """Weights in order, cut where the next would exceed --max-shard-size, as transformers cuts them."""
        limit = self.target.max_shard_bytes or DEFAULT_SHARD_BYTES
        groups: list[dict[str, TensorSpec]] = [{}]
        filled = 0
        for weight in weights:
            if groups[-1] and filled + weight.nbytes > limit:
                groups.append({})
                filled = 0
            groups[-1].update({part.spec.name: part.spec for part in weight.parts.values()})
            filled += weight.nbytes
        groups = [aligned(group) for group in groups]
        if len(groups) == 1:
            return {HOLDERS[0]: groups[0]}
        return {f"model-{n:05}-of-{len(groups):05}.safetensors": specs for n, specs in enumerate(groups, 1)}

    def factors(self, weight: Weight, rank: int) -> Factors:
        if weight.name in HEADS or not weight.name.endswith(".weight"):
            raise ConvertError("a low-rank change of it has no place in a PEFT adapter of linear layers; leave off --sidecar")
        if is_turned(weight.name.removesuffix(".weight"), self.source.config):
            raise ConvertError("it is stored turned, as no layer of an adapter can be; leave off --sidecar or --residual")
        module = f"{PEFT_PREFIX}{self.module(weight.name)}"
        lay_out = codec("plain").layout
        down = lay_out(f"{module}.lora_A.weight", (rank, weight.columns), "F32")
        return Factors(weight.name, down, lay_out(f"{module}.lora_B.weight", (weight.rows, rank), "F32"))

    def module(self, name: str) -> str:
        """What PEFT calls the layer of a weight."""
        return loaded(name, self.source.weights).removesuffix(".weight")

    def adapter(self, factors: Sequence[Factors], alpha: int) -> tuple[str, Sequence[FileLayout]]:
        specs = {part.spec.name: part.spec for one in factors for weight in (one.down, one.up) for part in weight.parts.values()}
        header, ranges = safetensors_bytes(specs, {"format": "pt"})
        size = len(header) + sum(spec.nbytes for spec in specs.values())
        ranks = {self.module(one.target): one.rank for one in factors}
        config = spelled(lora_config(ranks, alpha, task_type=task_of(self.source.config)))
        file = FileLayout(f"{ADAPTER}/adapter_model.safetensors", size, ((0, header),), ranges)
        return ADAPTER, [file, _whole(f"{ADAPTER}/adapter_config.json", config)]

    def finish(self, staging: Path) -> None:
        """Copy the asset files verbatim; config.json is written anew only where the port changed it."""
        copy_assets({**self.source.assets(staging), **self.target.assets}, staging)
        config = dict(self.target.config)
        if self.format:
            key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
            config[key] = CONFIG_DTYPES[self.format]
            config.pop("quantization_config", None)
        if self.quant:
            config["quantization_config"] = dict(self.quant.config)
        told = config.get("quantization_config")
        if self.target.formats and told:
            told = config["quantization_config"] = with_skipped(told, self.target.formats)
        if told and told == self.source.config.get("quantization_config"):
            beside = {name: self.source.path / name for name in QUANT_FILES}
            copy_assets({name: path for name, path in beside.items() if path.is_file()}, staging)
        if config != dict(self.source.config) or not (staging / "config.json").exists():
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def plain_format(config: Mapping[str, Any]) -> str:
    """The type that the model computes in, in which transformers has a weight before it quantizes it."""
    stated = config.get("dtype", config.get("torch_dtype"))
    return next((format for format, dtype in CONFIG_DTYPES.items() if dtype == stated), "BF16")


def with_skipped(config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
    """bitsandbytes' config that leaves further layers alone.

    Without a list of its own transformers leaves the head alone, and with one nothing else than what it names.
    """
    skipped = config.get("llm_int8_skip_modules") or [HEAD.removesuffix(".weight")]
    return {**config, "llm_int8_skip_modules": [*skipped, *(name.removesuffix(".weight") for name in weights)]}


def aligned(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The widest types first, as safetensors orders them, so that every tensor starts on a multiple of its element."""
    return dict(sorted(specs.items(), key=lambda item: -TYPES[item[1].dtype][0]))


def _whole(name: str, content: bytes) -> FileLayout:
    return FileLayout(name, len(content), ((0, content),), {})


class HuggingFace:
    name = "hf"
    reads = True
    writes = True

    def detect(self, path: Path) -> bool:
        weights = holder_of(path) is not None
        # an ONNX folder has a config.json as well
        return path.is_dir() and (path / "config.json").is_file() and (weights or not (path / "model.onnx").is_file())

    def open(self, path: Path) -> Folder:
        return open_folder(path)

    def sink(self, source: Source, target: Target) -> FolderSink:
        """Keeps each weight's own type, unless --quant says another or the source has no plain types to keep."""
        given = target.imatrix or target.tensor_types or target.output_tensor_type or target.token_embedding_type
        if given:
            raise ConvertError("--imatrix, --tensor-type, --output-tensor-type and --token-embedding-type are not for --to hf")
        target.refuse_onnx_options(self.name)
        if target.output.suffix == ".gguf":
            raise ConvertError(f"{target.output.name} is named like a file, and --to hf writes a folder; give --to gguf")
        quant = (target.quant or "").lower().replace("_", "-")  # `edgeport formats` has NF4_DQ and GPTQ_4
        if quant and quant not in {*PRECISIONS, *QUANTS}:
            raise UnknownName(miss([*PRECISIONS, *QUANTS], quant, "--quant of an HF folder"))
        kept = source.container == self.name or all(weight.codec == "plain" for weight in source.weights.values())
        format = PRECISIONS.get(quant, None if kept else "BF16")
        if quant not in QUANTS:
            return FolderSink(source, target, format)
        dtype = CONFIG_DTYPES[format or plain_format(target.config)]
        return FolderSink(source, target, format, choose(quant, source.weights.values(), dtype))


converter = HuggingFace()
