"""A GGUF model as a source of weights: one file or a split set, by header and positioned reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.gguf import adapter, families, header, hf_tokenizer
from converters.gguf.header import Header, StoredTensor, read_header
from converters.gguf.values import Field
from edgeport.checkpoint import read_range
from edgeport.errors import CorruptCheckpoint, EdgeportError, NotACheckpoint
from edgeport.registry import codec_of
from edgeport.tensor import Arrangement, Part, TensorSpec, Weight

SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


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


@contextmanager
def well_formed(told: str, kind: type[EdgeportError]) -> Iterator[None]:
    """Settings are read key by key: a value of another kind surfaces here, in one sentence that begins with `told`."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise kind(f"{told} ({type(error).__name__}: {error})") from error
