"""GGUF, llama.cpp's container: one file or a split set, read by header and positioned reads, written by plan.

`families` says what a tensor and a setting are called, `vocab` what the tokenizer is, `mixes` which type each
tensor gets, `header` how all that is spelled; here they become a Source and a Sink.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf import adapter, families, header, hf_tokenizer, mixes
from converters.gguf.header import Header, StoredTensor, read_header, serialize
from converters.gguf.imatrix import read_imatrix
from converters.gguf.values import Field, ValueType
from edgeport.checkpoint import read_range
from edgeport.codecs.plain import TYPES as PLAIN
from edgeport.errors import ConvertError, CorruptCheckpoint, EdgeportError, NotACheckpoint, about
from edgeport.registry import codec_of
from edgeport.seams import Factors, FileLayout, Source, Target
from edgeport.tensor import EMBEDDING, HEAD, Arrangement, Part, TensorSpec, Weight, is_buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
FINER = ("Q6_K", "Q8_0", "F16")
"""The types that a promotion gives, as llama-quantize's own mixes do for the tensors that suffer most."""
FLOAT_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class GGUFSource:
    """A GGUF model, opened by its headers."""

    path: Path
    headers: Sequence[Header]
    container: str = "gguf"

    @property
    def files(self) -> Sequence[Path]:
        return [one.path for one in self.headers]

    @property
    def metadata(self) -> Mapping[str, Field]:
        return self.headers[0].kv

    @cached_property
    def stored(self) -> Mapping[str, tuple[Path, StoredTensor]]:
        return {name: (one.path, tensor) for one in self.headers for name, tensor in one.tensors.items()}

    @cached_property
    def family(self) -> families.Family:
        return families.family_of(str(self.headers[0].value("general.architecture")))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        with self.well_formed():
            values = {key: self.headers[0].value(key) for key in self.metadata}
            config = self.family.config(values, self.rope_freqs())
            config["tie_word_embeddings"] = "output.weight" not in self.stored
            config |= self.family.biases(self.stored)
            if "token_embd.weight" in self.stored:
                config["vocab_size"] = self.stored["token_embd.weight"][1].shape[0]
            return config

    def well_formed(self) -> AbstractContextManager[None]:
        return well_formed(f"{self.path.name} holds metadata of another kind than llama.cpp reads", CorruptCheckpoint)

    def rope_freqs(self) -> Any:
        """The factors of Llama 3's rotary frequencies, where the file has them."""
        if families.ROPE_FREQS not in self.stored:
            return None
        import numpy as np

        spec = self.stored[families.ROPE_FREQS][1]
        return np.frombuffer(self.read(spec, 0, spec.nbytes), dtype=np.float32)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        found = {}
        with self.well_formed():
            for name, (_, spec) in self.stored.items():
                if name == families.ROPE_FREQS:
                    continue  # a setting in the guise of a tensor: `config` says what it means
                hf_name = self.family.hf_name(name)
                found[hf_name] = stored_weight(hf_name, spec, self.family.tensor(hf_name, self.config)[1])
            self.family.check(self.config, {name: weight.shape for name, weight in found.items()}, "the metadata")
        return found

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        path, stored = self.stored[spec.name]
        return read_range(path, stored.offset + start, stored.offset + stop)

    def assets(self, staging: Path) -> Mapping[str, Path]:
        """Tokenizer files in transformers' form; config.json is `config`, and the HF sink writes it."""
        with self.well_formed():
            hf_tokenizer.write_tokenizer(self.headers[0].path, staging)
        return {str(path.relative_to(staging)): path for path in sorted(staging.rglob("*")) if path.is_file()}


def stored_weight(name: str, spec: TensorSpec, arrangement: Arrangement) -> Weight:
    """A weight that is one GGUF tensor."""
    block = header.TYPES[spec.dtype]
    columns = spec.shape[-1] if spec.shape else 1
    part = Part(TensorSpec(spec.name, spec.dtype, spec.shape, spec.nbytes), columns // block.size * block.nbytes)
    return Weight(name, spec.shape, codec_of(spec.dtype).name, spec.dtype, {"data": part}, arrangement=arrangement)


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF by its header, and the rest of its set when it is one of several files."""
    first = read_header(path)
    if adapter.says_adapter(first):
        raise NotACheckpoint(f"{path.name} is an adapter, not a model; give it as --patch")
    split = first.split
    if split is None:
        return GGUFSource(path, [first])
    match = SPLIT_NAME.match(path.name)
    if match is None or int(match["count"]) != split.count:
        raise CorruptCheckpoint(f"{path.name} says it is one of {split.count} files, and is not named like one")
    names = [f"{match['stem']}-{n:05}-of-{split.count:05}.gguf" for n in range(1, split.count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise NotACheckpoint(f"{path.name} is one of {split.count} files, and {', '.join(missing[:3])} is missing")
    headers = [read_header(path.parent / name) for name in names]
    count = sum(len(one.tensors) for one in headers)
    if len({name for one in headers for name in one.tensors}) != count or count != split.tensors:
        raise CorruptCheckpoint(
            f"the {split.count} files of {match['stem']} hold {count} tensors; {split.tensors} different ones were promised"
        )
    return GGUFSource(path, headers)


@dataclass(frozen=True)
class GGUFSink:
    """Writes a GGUF, or a split set."""

    source: Source
    target: Target
    family: families.Family
    metadata: Mapping[str, Field | tuple[int, Any]]
    types: Mapping[str, str]
    """ggml type by GGUF tensor name."""
    constants: Mapping[str, tuple[tuple[int, ...], bytes]]
    """float32 tensors that no weight of the model is."""
    matrix: Mapping[str, NDArray[np.float32]] | None
    """The importance matrix, [columns] by weight name."""
    folder: bool = False

    @property
    def notes(self) -> Sequence[str]:
        window = self.target.config.get("sliding_window")
        if self.family.arch != "llama" or not window or window >= self.target.config["max_position_embeddings"]:
            return ()
        return (f"llama.cpp has no sliding window for {self.family.arch}: it attends to more than the last {window} tokens too",)

    @cached_property
    def importance(self) -> Mapping[str, Tensor] | None:
        if self.matrix is None:
            return None
        import torch

        return {name: torch.from_numpy(values) for name, values in self.matrix.items()}

    def takes(self, name: str) -> bool:
        return not is_buffer(name)

    def place(self, weight: Weight) -> Weight:
        with about(weight.name):
            name, arrangement = self.family.tensor(weight.name, self.target.config)
            format = self.types[name]
            if format == weight.format and name == weight.parts["data"].spec.name:
                # also for types that can only be read: such a weight is copied
                spec = sized(weight.parts["data"], weight)
                return replace(stored_weight(weight.name, spec, arrangement), shape=weight.shape)
            placed = codec_of(format).layout(weight.name, weight.shape, format)
            part = placed.parts["data"]
            return replace(placed, parts={"data": replace(part, spec=replace(part.spec, name=name))}, arrangement=arrangement)

    def finer(self, weight: Weight) -> Sequence[Weight]:
        name = weight.parts["data"].spec.name
        now, columns = header.TYPES[weight.format], weight.columns
        better = [type for type in FINER if (block := header.TYPES[type]).nbytes * now.size > now.nbytes * block.size]
        fitting = [type for type in better if columns % header.TYPES[type].size == 0]
        return [replace(self, types={**self.types, name: type}).place(weight) for type in fitting]

    def layout(self, weights: Sequence[Weight]) -> Sequence[FileLayout]:
        entries = [(w.parts["data"].spec.name, w.shape, w.format, w.nbytes) for w in weights]
        entries = [(name, shape, "F32", len(data)) for name, (shape, data) in self.constants.items()] + entries
        groups = [entries]
        if limit := self.target.max_shard_bytes:
            heads = [len(serialize(self.keys(number, 2, len(entries)), [])[0]) for number in range(2)]
            groups = cut(entries, limit, heads)
        layouts = []
        for number, group in enumerate(groups):
            head, offsets, size = serialize(self.keys(number, len(groups), len(entries)), group)
            blobs = ((0, head), *((offsets[name], data) for name, (_, data) in self.constants.items() if name in offsets))
            ranges = {name: offset for name, offset in offsets.items() if name not in self.constants}
            layouts.append(FileLayout(self.name(number, len(groups)), size, blobs, ranges))
        return layouts

    def keys(self, number: int, files: int, tensors: int) -> dict[str, Field | tuple[int, Any]]:
        """The metadata of one of so many files, which hold so many tensors together."""
        keys = dict(self.metadata) if number == 0 else {}
        if files > 1:
            keys["split.no"] = (ValueType.UINT16, number)
            keys["split.count"] = (ValueType.UINT16, files)
            keys["split.tensors.count"] = (ValueType.INT32, tensors)
        return keys

    def factors(self, weight: Weight, rank: int) -> Factors:
        name, arrangement = self.family.tensor(weight.name, self.target.config)
        if name not in self.types:
            raise ConvertError("a GGUF adapter cannot change a head tied to the embedding; leave off --sidecar to merge it")
        return adapter.factors(weight, name, arrangement, rank)

    def adapter(self, factors: Sequence[Factors], alpha: int) -> tuple[str, Sequence[FileLayout]]:
        name = self.target.output.name.removesuffix(".gguf") + adapter.STEM
        return name, [adapter.layout(name, self.family.arch, factors, alpha)]

    def name(self, number: int, count: int) -> str:
        output = self.target.output
        return output.name if count == 1 else f"{output.name.removesuffix('.gguf')}-{number + 1:05}-of-{count:05}.gguf"

    def finish(self, staging: Path) -> None:
        """A GGUF has everything inside."""


Entry = tuple[str, tuple[int, ...], str, int]


def cut(entries: Sequence[Entry], limit: int, heads: Sequence[int]) -> list[list[Entry]]:
    """Tensors in order, a new file where the next would exceed `limit` bytes, of which metadata takes `heads`.

    `heads`: of the first file, and of each later one. A tensor that is larger has a file of its own.
    """
    groups: list[list[Entry]] = [[]]
    filled = heads[0]
    for entry in entries:
        size = serialize({}, [entry])[2]  # with what the head says of it
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = heads[1]
        groups[-1].append(entry)
        filled += size
    return groups


def sized(part: Part, weight: Weight) -> TensorSpec:
    """The part's spec for a weight that may have grown rows."""
    return TensorSpec(part.spec.name, part.spec.dtype, weight.shape, part.stride * weight.rows)


def tensor_names(source: Source, family: families.Family, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name and shape of every weight that the output will have."""
    shapes = {name: weight.shape for name, weight in source.weights.items() if not is_buffer(name)}
    # Gemma's own config.json leaves the word out and means that they are
    if config.get("tie_word_embeddings") is False and HEAD not in shapes and EMBEDDING in shapes:
        shapes[HEAD] = shapes[EMBEDDING]  # a patch unties them
    return {name: (family.tensor(name, config)[0], shape) for name, shape in shapes.items()}


class Gguf:
    name = "gguf"
    reads = True
    writes = True

    def detect(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == header.MAGIC or path.suffix == ".gguf"

    def is_adapter(self, path: Path) -> bool:
        return adapter.is_adapter(path)

    def open_adapter(self, path: Path) -> adapter.StoredAdapter:
        return adapter.open_adapter(path)

    def open(self, path: Path) -> GGUFSource:
        return open_gguf(path)

    def sink(self, source: Source, target: Target) -> GGUFSink:
        if target.output.suffix != ".gguf":
            raise ConvertError(f"the output {target.output.name} should end in .gguf, as llama.cpp expects")
        target.refuse_onnx_options(self.name)
        told = "config.json or a tokenizer file holds a value of another kind than transformers writes"
        with well_formed(told, ConvertError):
            return self.described_sink(source, target)

    def described_sink(self, source: Source, target: Target) -> GGUFSink:
        config = target.config
        family = source.family if isinstance(source, GGUFSource) else families.family(config)
        names = tensor_names(source, family, config)
        facts = {name: source.weights.get(name, source.weights.get(EMBEDDING)) for name in names}
        kept = isinstance(source, GGUFSource) and target.quant is None
        if kept:
            if target.tensor_types or target.output_tensor_type or target.token_embedding_type:
                raise ConvertError(
                    "--tensor-type, --output-tensor-type and --token-embedding-type change what --quant gives; without it each "
                    "tensor of a GGUF keeps its own type, so give --quant too"
                )
            types = {stored: facts[name].format for name, (stored, _) in names.items()}  # type: ignore[union-attr]
            file_type = source.headers[0].value("general.file_type")  # type: ignore[attr-defined]
        else:
            ftype = mixes.file_type(target.quant or widest(source))
            settings = family.metadata(config)
            family.check(source.config, {name: weight.shape for name, weight in source.weights.items()})
            types = mixes.choose(
                ftype, list(names.values()), mixes.Facts.of(lambda key: settings.get(key, (None, None))[1]),
                tensor_types=target.tensor_types, output_tensor_type=target.output_tensor_type,
                token_embedding_type=target.token_embedding_type, has_imatrix=target.imatrix is not None,
            )  # fmt: skip
            file_type = mixes.FILE_TYPES[ftype]
        types |= {names[name][0]: format for name, format in target.formats.items()}
        metadata = described(source, family, target, file_type, any(name not in FLOAT_TYPES for name in types.values()))
        matrix = importance_matrix(target.imatrix, names) if target.imatrix else None
        return GGUFSink(source, target, family, metadata, types, constants(source, family, config), matrix)


def importance_matrix(path: Path, names: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, NDArray[np.float32]]:
    """The entries of a file for the weights in `names` (GGUF name and shape). Raises ConvertError for another model's file."""
    found = read_imatrix(path)
    matrix = {name: found[stored] for name, (stored, _) in names.items() if stored in found}
    odd = next((name for name, values in matrix.items() if len(values) != names[name][1][-1]), None)
    if odd is not None:
        columns = names[odd][1][-1]
        raise ConvertError(f"{path.name} has {len(matrix[odd])} columns for {odd}, which has {columns}: it is of another model")
    if not matrix:
        raise ConvertError(f"{path.name} has no entry for any weight of this model")
    return matrix


@contextmanager
def well_formed(told: str, kind: type[EdgeportError]) -> Iterator[None]:
    """Settings are read key by key: a value of another kind surfaces here, in one sentence that begins with `told`."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise kind(f"{told} ({type(error).__name__}: {error})") from error


def widest(source: Source) -> str:
    """The plain type that holds every weight of a source without loss."""
    formats = {weight.format for name, weight in source.weights.items() if not is_buffer(name)}
    return next((name for name in ("F32", "BF16", "F16") if name in formats), "F16") if formats <= set(PLAIN) else "BF16"


def constants(source: Source, family: families.Family, config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    if isinstance(source, GGUFSource):
        if families.ROPE_FREQS not in source.stored:
            return {}
        spec = source.stored[families.ROPE_FREQS][1]
        return {families.ROPE_FREQS: (spec.shape, bytes(source.read(spec, 0, spec.nbytes)))}
    return {name: (values.shape, values.tobytes()) for name, values in family.constants(config).items()}


def described(
    source: Source, family: families.Family, target: Target, file_type: int | None, quantized: bool
) -> dict[str, Field | tuple[int, Any]]:
    """Every key of the file. From a GGUF they are copied byte for byte, but for what the output changes."""
    metadata: dict[str, Field | tuple[int, Any]] = {}
    if isinstance(source, GGUFSource):
        # the matrix that the source's types were made with is not that of others
        left = ("split.", "quantize.imatrix.") if target.quant else ("split.",)
        metadata |= {key: field for key, field in source.metadata.items() if not key.startswith(left)}
        if target.assets:
            metadata = {key: field for key, field in metadata.items() if not key.startswith("tokenizer.")}
            metadata |= tokenizer(target.assets, target.config)
        if f"{family.arch}.vocab_size" in metadata:
            metadata[f"{family.arch}.vocab_size"] = (ValueType.UINT32, target.config["vocab_size"])
    else:
        metadata |= family.metadata(target.config)
        metadata["general.type"] = (ValueType.STRING, "model")
        # a folder source has its asset files in place: nothing is staged
        metadata |= tokenizer({**source.assets(source.path), **target.assets}, target.config)
    if file_type is not None:
        metadata["general.file_type"] = (ValueType.UINT32, file_type)
    if quantized:
        metadata["general.quantization_version"] = (ValueType.UINT32, QUANTIZATION_VERSION)
    return metadata


def tokenizer(assets: Mapping[str, Path], config: Mapping[str, Any]) -> Mapping[str, tuple[int, Any]]:
    from converters.gguf.vocab import tokenizer_metadata

    return tokenizer_metadata(assets, config)


converter = Gguf()
