"""GGUF, llama.cpp's container.

`families` says what a tensor and a setting are called, `vocab` what the tokenizer is, `mixes` which type each
tensor gets, `header` how all that is spelled; `source` reads a model by them and `sink` writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf import adapter, families, header, mixes
from converters.gguf.imatrix import read_imatrix
from converters.gguf.sink import GGUFSink
from converters.gguf.source import GGUFSource, open_gguf, well_formed
from converters.gguf.values import Field, ValueType
from edgeport.codecs.plain import TYPES as PLAIN
from edgeport.errors import ConvertError
from edgeport.seams import Source, Target
from edgeport.tensor import EMBEDDING, HEAD, is_buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
FLOAT_TYPES = ("BF16", "F16", "F32")
TEMPLATE = "tokenizer.chat_template"
"""How the keys of chat templates begin."""


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


def tensor_names(source: Source, family: families.Family, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name and shape of every weight that the output will have."""
    shapes = {name: weight.shape for name, weight in source.weights.items() if not is_buffer(name)}
    # Gemma's own config.json leaves the word out and means that they are
    if config.get("tie_word_embeddings") is False and HEAD not in shapes and EMBEDDING in shapes:
        shapes[HEAD] = shapes[EMBEDDING]  # a patch unties them
    return {name: (family.tensor(name, config)[0], shape) for name, shape in shapes.items()}


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


def widest(source: Source) -> str:
    """The plain type that holds every weight of a source, without loss but of float64."""
    formats = {weight.format for name, weight in source.weights.items() if not is_buffer(name)}
    if not formats <= set(PLAIN):
        return "BF16"
    if formats & {"F32", "F64"} or formats >= {"F16", "BF16"}:
        return "F32"
    return "BF16" if "BF16" in formats else "F16"


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
            told = tokenizer(target.assets, target.config)
            # a chat template is the base's where the new tokenizer comes without one, as in a folder
            kept = () if any(key.startswith(TEMPLATE) for key in told) else (TEMPLATE,)
            metadata = {key: field for key, field in metadata.items() if not key.startswith("tokenizer.") or key.startswith(kept)}
            metadata |= told
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
