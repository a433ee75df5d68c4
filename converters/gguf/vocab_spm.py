"""A SentencePiece BPE vocabulary, from tokenizer.json or tokenizer.model, as llama.cpp's "llama" vocabulary.

llama.cpp has no merge list here: of two neighbouring pieces it joins those whose union is the piece of the highest
score (`llm_tokenizer_spm_session`). tokenizer.json has a list of pairs. The two mean the same when every way to split
a piece is in the list and the ways to split one piece stand together, as transformers writes them from a SentencePiece
model; then the score of a piece is its place in the list. A list that is otherwise is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.errors import ConvertError, UnsupportedArchitecture

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types: the same numbers in sentencepiece_model.proto and in GGUF."""

SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# What tokenizer.json does with spaces, and whether that is llama.cpp's add_space_prefix. Metaspace adds no space to a
# text that begins with one, and under "first" none after a special token; llama.cpp does, and cannot be told not to.
SPACES = {
    ("prepend", "replace"): True,
    ("metaspace always",): True,
    ("metaspace first",): True,
    ("metaspace never",): False,
    ("replace",): False,
    ("replace", "split"): False,
}


@dataclass(frozen=True, slots=True)
class Pieces:
    tokens: dict[int, str]
    scores: dict[int, float]
    types: dict[int, int]
    space_prefix: bool


def from_json(tokenizer: Mapping[str, Any], special: Collection[str]) -> Pieces:
    """The pieces of a tokenizer.json; `special` tokens are matched before BPE and need no merges."""
    model = tokenizer["model"]
    vocab: dict[str, int] = model["vocab"]
    steps = (*_normalizer(tokenizer.get("normalizer")), *_pre_tokenizer(tokenizer.get("pre_tokenizer")))
    if steps not in SPACES:
        raise UnsupportedArchitecture(f"llama.cpp cannot treat spaces as tokenizer.json does: {' then '.join(steps)}")
    order = _ranks(vocab, model["merges"], special)
    types = {vocab[piece]: BYTE for piece in BYTES if piece in vocab}
    if (unknown := model.get("unk_token")) in vocab:
        types[vocab[unknown]] = UNKNOWN
    _need_bytes(vocab)
    # A piece without merges is a single letter, or never made: it comes after all others.
    scores = {index: -float(order.get(piece, len(order))) for piece, index in vocab.items()}
    return Pieces({index: piece for piece, index in vocab.items()}, scores, types, SPACES[steps])


def _ranks(vocab: Mapping[str, int], merges: list[Any], special: Collection[str]) -> dict[str, int]:
    """Each merged piece's place in the list of merges. Raises UnsupportedArchitecture where scores cannot say the same."""
    order: dict[str, int] = {}
    ways: dict[str, int] = {}
    last = ""
    for pair in merges:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        piece = left + right
        if piece != last and piece in order:
            raise UnsupportedArchitecture(
                f"llama.cpp joins pieces by score, and the merges of {piece!r} in tokenizer.json do not stand together"
            )
        order.setdefault(piece, len(order))
        ways[piece] = ways.get(piece, 0) + 1
        last = piece
    for piece in vocab:
        splits = sum(piece[:at] in vocab and piece[at:] in vocab for at in range(1, len(piece)))
        if splits != ways.get(piece, 0) and piece not in special:
            raise UnsupportedArchitecture(
                f"llama.cpp joins pieces by score, in {splits} ways to {piece!r}, and tokenizer.json in"
                f" {ways.get(piece, 0)}: this is not the tokenizer of a SentencePiece model"
            )
    return order


def _normalizer(section: Mapping[str, Any] | None) -> Iterator[str]:
    if section is None:
        return
    if section["type"] == "Sequence":
        for node in section["normalizers"]:
            yield from _normalizer(node)
    elif section["type"] == "Prepend" and section["prepend"] == SPACE:
        yield "prepend"
    elif section["type"] == "Replace" and section["pattern"] == {"String": " "} and section["content"] == SPACE:
        yield "replace"
    else:
        yield str(dict(section))


def _pre_tokenizer(section: Mapping[str, Any] | None) -> Iterator[str]:
    if section is None:
        return
    if section["type"] == "Metaspace" and section["replacement"] == SPACE and section.get("split") is False:
        scheme = section.get("prepend_scheme", "always" if section.get("add_prefix_space", True) else "never")
        yield f"metaspace {scheme}"
    elif section["type"] == "Split" and section["pattern"] == {"String": " "}:
        yield "split"
    else:
        yield str(dict(section))


def from_model(data: bytes) -> Pieces:
    """The pieces of a tokenizer.model (github.com/google/sentencepiece, src/sentencepiece_model.proto)."""
    tokens: dict[int, str] = {}
    scores: dict[int, float] = {}
    types: dict[int, int] = {}
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _message(data):
            if field == 1:
                piece = dict(_message(value))
                index = len(tokens)
                types[index] = piece.get(3, NORMAL)
                text = piece[1].decode()
                # llama.cpp looks for user-defined tokens before it spells spaces as ▁.
                tokens[index] = text.replace(SPACE, " ") if types[index] == USER_DEFINED else text
                scores[index] = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            elif field == 2:
                trainer = dict(_message(value))
            elif field == 3:
                normalizer = dict(_message(value))
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise ConvertError("tokenizer.model is not a SentencePiece model") from error
    if trainer.get(3, 1) != 2:
        raise UnsupportedArchitecture("tokenizer.model is not a BPE model; llama.cpp's \"llama\" vocabulary is one")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        raise UnsupportedArchitecture(
            "tokenizer.model changes text before it cuts it (a character map, or extra spaces removed);"
            " llama.cpp's \"llama\" vocabulary does not"
        )
    _need_bytes(tokens.values())
    return Pieces(tokens, scores, types, bool(normalizer.get(3, 1)))


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of each field of a protobuf message (protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size, at = _varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
        if at + size > len(data):
            raise ValueError("a field ends after its message")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _need_bytes(pieces: Collection[str]) -> None:
    # llama.cpp spells what is in no piece as bytes, and fails at run time where one is missing. A byte that is a
    # letter of its own may be a piece under that letter (Gemma's tab).
    known = set(pieces)
    missing = [name for byte, name in enumerate(BYTES) if name not in known and (byte > 127 or chr(byte) not in known)]
    if missing:
        raise UnsupportedArchitecture(f"llama.cpp needs a piece for each byte; this vocabulary lacks {len(missing)}")
