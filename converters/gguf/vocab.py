"""Everything under `tokenizer.` of a GGUF, from the tokenizer files of an HF folder.

tokenizer.json is the authority where it is there, as it is for transformers; tokenizer.model stands in for it alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.gguf import vocab_bpe, vocab_spm
from converters.gguf.hf_tokenizer import write_tokenizer
from converters.gguf.keyvalues import KV, kv
from converters.gguf.vocab_spm import CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED
from edgeport.errors import ConvertError, UnsupportedArchitecture

__all__ = ["tokenizer_metadata", "write_tokenizer"]

# Key in tokenizer_config.json (`{}_token`) and config.json (`{}_token_id`), and its key in GGUF.
SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}

# Tokens that llama.cpp knows by their text. Where a vocabulary has two, llama.cpp's choice hangs on a hash order, so the
# first one here is written down (llama-vocab.cpp, "auto-detect special tokens by text").
KNOWN = {
    "eot_token_id": ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "<|endoftext|>", "<|end_of_text|>"),
    "eom_token_id": ("<|eom_id|>",),
    "fim_pre_token_id": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>"),
    "fim_suf_token_id": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>"),
    "fim_mid_token_id": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>"),
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}

# Tokens that are not marked special in the files of some models, and are.
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)

# The scores that llama.cpp's own converter gives; nothing is ever merged into these tokens by intent.
PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0


@dataclass(frozen=True, slots=True)
class Added:
    """A token that is looked for in the text before anything else happens to it."""

    text: str
    special: bool


def tokenizer_metadata(assets: Mapping[str, Path], config: Mapping[str, Any]) -> dict[str, KV]:
    """GGUF metadata that makes llama.cpp cut text as the tokenizer in `assets` (file name to path) does.

    Raises UnsupportedArchitecture for a tokenizer that llama.cpp cannot imitate, ConvertError for files that are
    missing or contradict each other or the model's `vocab_size`.
    """
    tokenizer = _read(assets, "tokenizer.json")
    settings = {**_read(assets, "special_tokens_map.json"), **_read(assets, "tokenizer_config.json")}
    added = _added(assets, tokenizer, settings)
    tokens: dict[int, str]
    scores: dict[int, float] | None = None
    if not tokenizer and "tokenizer.model" not in assets:
        raise ConvertError("the model has no tokenizer.json and no tokenizer.model: a GGUF cannot do without")
    if tokenizer and not tokenizer["model"].get("byte_fallback"):
        _need_bpe(tokenizer)
        flags, types = vocab_bpe.flags(tokenizer), {}
        tokens = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    else:
        if tokenizer:
            _need_bpe(tokenizer)
            pieces = vocab_spm.from_json(tokenizer, {token.text for token in added.values()})
        else:
            pieces = vocab_spm.from_model(assets["tokenizer.model"].read_bytes())
        tokens, scores, types = pieces.tokens, pieces.scores, pieces.types
        flags = {
            "tokenizer.ggml.model": kv("STRING", "llama"),
            "tokenizer.ggml.pre": kv("STRING", "default"),
            "tokenizer.ggml.add_space_prefix": kv("BOOL", pieces.space_prefix),
            "tokenizer.ggml.remove_extra_whitespaces": kv("BOOL", False),
        }
    _place(added, tokens, scores, types)
    ids = {token.text: index for index, token in added.items()}
    rows = _rows(tokens, config)
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(rows)]
    _no_twins(listed)
    kinds = [types.get(index, NORMAL) if index in tokens else UNUSED for index in range(rows)]
    metadata = {
        **flags,
        "tokenizer.ggml.tokens": kv("ARRAY", listed),
        "tokenizer.ggml.token_type": kv("ARRAY", kinds),
    }
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = kv("ARRAY", [scores.get(index, PADDING_SCORE) for index in range(rows)])
    lookup = {text: index for index, text in enumerate(listed)} | ids
    special = _special(settings, config, _read(assets, "generation_config.json"), lookup, rows)
    metadata |= {f"tokenizer.ggml.{SPECIAL[name]}": kv("UINT32", index) for name, index in special.items()}
    for key, texts in KNOWN.items():
        if found := [ids[text] for text in texts if text in ids]:
            metadata[f"tokenizer.ggml.{key}"] = kv("UINT32", found[0])
    metadata |= _ends(tokenizer, settings, special, lookup)
    return metadata | _templates(assets, settings)


def _read(assets: Mapping[str, Path], name: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    try:
        content = json.loads(assets[name].read_bytes())
    except ValueError as error:
        raise ConvertError(f"{assets[name]} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{assets[name]} should hold a JSON object")
    return content


def _need_bpe(tokenizer: Mapping[str, Any]) -> None:
    kind = tokenizer["model"].get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedArchitecture(f"tokenizer.json holds a {kind} model; edgeport writes BPE ones to GGUF")


def _added(
    assets: Mapping[str, Path], tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[int, Added]:
    """Added tokens by id: tokenizer.json's, then what the other files add to them."""
    entries: list[tuple[int, str, Mapping[str, Any]]] = [
        (entry["id"], entry["content"], entry) for entry in tokenizer.get("added_tokens") or []
    ]
    decoder = settings.get("added_tokens_decoder") or {}
    entries += [(int(index), entry["content"], entry) for index, entry in decoder.items()]
    if not tokenizer:
        entries += [(index, text, {}) for text, index in _read(assets, "added_tokens.json").items()]
    added: dict[int, Added] = {}
    for index, text, entry in entries:
        stripping = [flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]
        if stripping:
            raise UnsupportedArchitecture(f"the added token {text!r} is {', '.join(stripping)}: GGUF cannot say so")
        if added.setdefault(index, Added(text, bool(entry.get("special")))).text != text:
            raise ConvertError(f"the tokenizer's files disagree on token {index}: {added[index].text!r}, {text!r}")
    return added


def _place(
    added: Mapping[int, Added], tokens: dict[int, str], scores: dict[int, float] | None, types: dict[int, int]
) -> None:
    """Put the added tokens among `tokens`, with their types."""
    for index, token in added.items():
        control = token.special or LOOKS_SPECIAL.fullmatch(token.text) is not None
        if scores is not None and not control and SPACE in token.text and tokens.get(index) == token.text:
            # Gemma's runs of spaces. transformers looks for added tokens before it spells spaces as ▁, so it makes
            # these by merging, which llama.cpp does too if it takes them for ordinary pieces.
            continue
        # llama.cpp looks for these in the text as it came, with its spaces.
        tokens[index] = token.text if control or scores is None else token.text.replace(SPACE, " ")
        types[index] = CONTROL if control else USER_DEFINED
        if scores is not None:
            scores[index] = ADDED_SCORE


def _rows(tokens: Mapping[int, str], config: Mapping[str, Any]) -> int:
    used = max(tokens) + 1
    rows = int(config.get("vocab_size", used))
    if used > rows:
        raise ConvertError(
            f"the tokenizer has {used} tokens and the embedding {rows} rows (vocab_size in config.json):"
            " the tokenizer does not belong to this model, or its patch should have grown the embedding"
        )
    return rows


def _no_twins(tokens: list[str]) -> None:
    seen: dict[str, int] = {}
    for index, text in enumerate(tokens):
        if seen.setdefault(text, index) != index:
            raise ConvertError(f"tokens {seen[text]} and {index} are both {text!r}: llama.cpp refuses such a file")


def _special(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    lookup: Mapping[str, int],
    rows: int,
) -> dict[str, int]:
    """Ids by the names of SPECIAL: the tokenizer's word first, then the model's."""
    special: dict[str, int] = {}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        index: Any = lookup.get(text) if isinstance(text, str) else None
        for source in (config, generation):
            if index is None:
                stated = source.get(f"{name}_token_id")
                index = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(index, int) and 0 <= index < rows:
            special[name] = index
    if "eos" not in special:
        raise ConvertError("neither the tokenizer's files nor config.json name an eos token; llama.cpp would make one up")
    return special


def _ends(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], special: dict[str, int], lookup: Mapping[str, int]
) -> dict[str, KV]:
    """What is put before and after every text: the post-processor's word, unless tokenizer_config.json has its own."""
    before, after = _template(tokenizer.get("post_processor"))
    if before and "bos" not in special:
        special["bos"] = lookup[before]
    wanted = {"bos": before, "eos": after}
    ends: dict[str, KV] = {}
    for name, text in wanted.items():
        stated = settings.get(f"add_{name}_token")
        # Without tokenizer.json, LlamaTokenizer and GemmaTokenizer put a bos and no eos.
        add = stated if isinstance(stated, bool) else bool(text) if tokenizer else name == "bos"
        if add and text and lookup.get(text) != special[name]:
            raise UnsupportedArchitecture(
                f"tokenizer.json puts {text!r} where llama.cpp puts the {name} token, which is {special[name]}"
            )
        ends[f"tokenizer.ggml.add_{name}_token"] = kv("BOOL", add and name in special)
    if before and "bos" in special:
        ends["tokenizer.ggml.bos_token_id"] = kv("UINT32", special["bos"])
    return ends


def _template(section: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts before and after a text."""
    kind = section["type"] if section else "ByteLevel"
    if section and kind == "Sequence":
        ends = [_template(node) for node in section["processors"]]
        return next((a for a, _ in ends if a), None), next((b for _, b in ends if b), None)
    if kind == "ByteLevel":
        return None, None
    if section and kind == "TemplateProcessing":
        single = [node["SpecialToken"]["id"] if "SpecialToken" in node else None for node in section["single"]]
        at = single.index(None)
        if len(single) - 1 <= 2 and at <= 1 and len(single) - at <= 2:
            return single[0], single[-1]
    raise UnsupportedArchitecture(f"llama.cpp cannot add the special tokens that tokenizer.json adds: {section}")


def _templates(assets: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, KV]:
    """Chat templates: chat_template.jinja and its neighbours, else what tokenizer_config.json holds."""
    named = dict(_template_files(assets))
    if not named:
        stated = settings.get("chat_template") or _read(assets, "chat_template.json").get("chat_template") or []
        if isinstance(stated, str):
            named = {"default": stated}
        else:
            named = {entry["name"]: entry["template"] for entry in stated}
    metadata: dict[str, KV] = {}
    names = []
    for name, template in named.items():
        if name == "default":
            metadata["tokenizer.chat_template"] = kv("STRING", template)
        else:
            names.append(re.sub("[^A-Za-z0-9]", "_", name))
            metadata[f"tokenizer.chat_template.{names[-1]}"] = kv("STRING", template)
    if names:
        metadata["tokenizer.chat_templates"] = kv("ARRAY", names)
    return metadata


def _template_files(assets: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for file, path in sorted(assets.items()):
        if file == "chat_template.jinja":
            yield "default", path.read_text(encoding="utf-8")
        elif file.startswith("additional_chat_templates/"):
            yield Path(file).stem, path.read_text(encoding="utf-8")
