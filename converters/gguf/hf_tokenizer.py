"""A GGUF's tokenizer as the files of an HF folder.

transformers reads a GGUF's tokenizer too (`from_pretrained(folder, gguf_file=name)`), but drops what it has no table
for, such as SmolLM's cutting of numbers into digits, so the files are written here and transformers only loads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.gguf.header import read_header
from converters.gguf.pretokenizers import named
from converters.gguf.vocab_spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from edgeport.errors import ConvertError, CorruptCheckpoint, UnsupportedArchitecture

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_TEMPLATE_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]+")
"""What a file of the folder may be called: a name from a GGUF never becomes another path."""


def write_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat templates of the GGUF at `gguf_path` into `folder`."""
    header = read_header(gguf_path)
    kv = {name: header.value(name) for name in header.kv if name.startswith("tokenizer.")}
    for name, pieces in tokenizer_files(kv).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(pieces)


def tokenizer_files(kv: Mapping[str, Any]) -> dict[str, Iterable[str]]:
    """File name to content in pieces, from GGUF metadata (name to value). Raises UnsupportedArchitecture, CorruptCheckpoint."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in kv.items()}
    if "tokens" not in ggml:
        raise ConvertError("the GGUF holds no tokenizer: it has no tokenizer.ggml.tokens")
    kind = ggml.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedArchitecture(f"a GGUF tokenizer of kind {kind!r} has no table here; known: gpt2, llama")
    texts = _listed(ggml, "tokens", str)
    types = _listed(ggml, "token_type", int, len(texts)) if ggml.get("token_type") else [NORMAL] * len(texts)
    # Rows without a token are the embedding's, not the tokenizer's.
    tokens = {index: text for index, text in enumerate(texts) if types[index] != UNUSED}
    sections, model = _bpe(ggml, tokens) if kind == "gpt2" else _spm(ggml, tokens, types)
    special = {name: tokens[ggml[key]] for name, key in _SPECIAL.items() if ggml.get(key) in tokens}
    added = [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] != USER_DEFINED,
        }
        for index, text in tokens.items()
        if types[index] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    adds = {name: name in special and _flag(ggml, f"add_{name}_token", _adds(ggml, name)) for name in ("bos", "eos")}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **sections,
        "post_processor": _post_processor(adds, {name: (special[name], ggml[_SPECIAL[name]]) for name in special}),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"add_{name}_token": value for name, value in adds.items()},
        **{f"{name}_token": text for name, text in special.items()},
    }
    files: dict[str, Iterable[str]] = {"tokenizer.json": _with_model(tokenizer, model)}
    files["tokenizer_config.json"] = [json.dumps(settings, ensure_ascii=False, indent=2)]
    if "tokenizer.chat_template" in kv:
        files["chat_template.jinja"] = [_text(kv, "tokenizer.chat_template")]
    for name in kv.get("tokenizer.chat_templates") or []:
        if not _TEMPLATE_NAME.fullmatch(name):
            raise CorruptCheckpoint(f"tokenizer.chat_templates names the template {name!r}, which cannot be a file's name")
        if f"tokenizer.chat_template.{name}" not in kv:
            raise CorruptCheckpoint(f"tokenizer.chat_templates names the template {name!r}, and there is none of that name")
        files[f"additional_chat_templates/{name}.jinja"] = [_text(kv, f"tokenizer.chat_template.{name}")]
    return files


def _listed(ggml: Mapping[str, Any], key: str, kind: type | tuple[type, ...], count: int | None = None) -> list[Any]:
    """An array of a kind, cut to `count` elements. Raises CorruptCheckpoint, also for one that has fewer."""
    value = ggml.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise CorruptCheckpoint(f"tokenizer.ggml.{key} of the GGUF should be a list of {'strings' if kind is str else 'numbers'}")
    if count is not None and len(value) < count:
        raise CorruptCheckpoint(f"tokenizer.ggml.{key} of the GGUF is a list of {len(value)}, and there are {count} tokens")
    return value[:count]


def _flag(ggml: Mapping[str, Any], key: str, default: bool) -> bool:
    value = ggml.get(key, default)
    if not isinstance(value, bool):
        raise CorruptCheckpoint(f"tokenizer.ggml.{key} of the GGUF is {value!r}, where true or false was expected")
    return value


def _text(kv: Mapping[str, Any], key: str) -> str:
    if not isinstance(kv[key], str):
        raise CorruptCheckpoint(f"{key} of the GGUF is a {type(kv[key]).__name__}, where a text was expected")
    return str(kv[key])


def _adds(ggml: Mapping[str, Any], name: str) -> bool:
    """What llama.cpp does where the file does not say."""
    return name == "bos" and (ggml["model"] == "llama" or ggml.get("pre") in ("llama-bpe", "llama3", "llama-v3", "tekken"))


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of byte pairs. Lists of a hundred thousand are told a piece at a time, since as objects they outweigh a port."""

    vocab: Mapping[str, int]
    merges: Iterable[Sequence[str]]
    settings: Mapping[str, Any]


def _with_model(tokenizer: Mapping[str, Any], model: _Model) -> Iterator[str]:
    """The tokenizer with its model, as JSON."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    yield json.dumps(tokenizer, ensure_ascii=False)[:-1] + ', "model": '
    yield json.dumps({"type": "BPE", **plain, **flags, **model.settings}, ensure_ascii=False)[:-1] + ', "vocab": {'
    yield from _between_commas(f"{json.dumps(text, ensure_ascii=False)}: {index}" for text, index in model.vocab.items())
    yield '}, "merges": ['
    yield from _between_commas(json.dumps(pair, ensure_ascii=False) for pair in model.merges)
    yield "]}}"


def _between_commas(items: Iterable[str]) -> Iterator[str]:
    for place, item in enumerate(items):
        yield f", {item}" if place else item


def _bpe(ggml: Mapping[str, Any], tokens: Mapping[int, str]) -> tuple[dict[str, Any], _Model]:
    """How text is cut before and joined after, and the model."""
    if "pre" not in ggml or "merges" not in ggml:
        raise UnsupportedArchitecture("the GGUF does not say how its tokenizer cuts text (tokenizer.ggml.pre, merges)")
    pre = named(ggml["pre"])
    merges = _listed(ggml, "merges", str)
    if odd := next((line for line in merges if line.count(" ") != 1), None):
        raise CorruptCheckpoint(f"tokenizer.ggml.merges of the GGUF holds {odd!r}, which is no pair")
    # Added tokens too: `tokenizers` gives those that are not in the vocabulary other ids, from its end on.
    words = {text: index for index, text in tokens.items()}
    sections = {
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": pre.section(),
        "decoder": _BYTE_LEVEL,
    }
    return sections, _Model(words, (line.split(" ") for line in merges), {"ignore_merges": pre.ignore_merges})


def _spm(ggml: Mapping[str, Any], tokens: Mapping[int, str], types: list[int]) -> tuple[dict[str, Any], _Model]:
    """Likewise."""
    scores = _listed(ggml, "scores", (int, float), len(types))
    prefix = _flag(ggml, "add_space_prefix", True)
    unknown = tokens.get(ggml.get("unknown_token_id", 0))
    words = {text.replace(" ", SPACE) if types[index] == USER_DEFINED else text: index for index, text in tokens.items()}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    sections = {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }
    joined = {text: index for text, index in words.items() if types[index] not in (BYTE, CONTROL, UNKNOWN)}
    return sections, _Model(words, _merges(joined, scores), {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True})


def _merges(words: Mapping[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two, best piece first: what llama.cpp finds by score (see vocab_spm)."""
    for text in sorted(sorted(words, key=words.__getitem__), key=lambda text: -scores[words[text]]):
        for at in range(1, len(text)):
            if text[:at] in words and text[at:] in words:
                yield text[:at], text[at:]


def _post_processor(adds: Mapping[str, bool], special: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        before, after = (
            [{"SpecialToken": {"id": special[name][0], "type_id": type_id}}] if adds[name] else []
            for name in ("bos", "eos")
        )
        return [*before, text, *after]

    used = [special[name] for name in ("bos", "eos") if adds[name]]
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in used},
    }
