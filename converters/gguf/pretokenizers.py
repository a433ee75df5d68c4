"""How text is cut into words before BPE: tokenizer.json's section against llama.cpp's name for it.

Names and patterns are those of `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp. A name also fixes whether a
word that is itself a token skips the merges, so one pattern can have two names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.errors import UnsupportedArchitecture

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"

LLAMA3 = rf"{_CONTRACTION}{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*{_TAIL}"
QWEN2 = rf"{_CONTRACTION}{_WORDS}|\p{{N}}|{_MARKS}[\r\n]*{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_TAIL}"
)
TEKKEN = _CASED.replace("{0}", "") + rf"|\p{{N}}|{_MARKS}[\r\n/]*{_TAIL}"
GPT4O = _CASED.replace("{0}", f"{_CONTRACTION}?") + rf"|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*{_TAIL}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`steps`: what happens before the letters become bytes. `ignore_merges`: a word that is a token stays whole."""

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: str | None = None

    def section(self) -> dict[str, Any]:
        """The `pre_tokenizer` of a tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": "gpt2" in self.steps,
        }
        before = [_node(step) for step in self.steps if step != "gpt2"]
        return {"type": "Sequence", "pretokenizers": [*before, byte_level]} if before else byte_level


# The first entry with a given key is what a tokenizer.json is written as; the later ones are other names for the
# same cutting, which a GGUF may carry.
TABLE = (
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("smaug-bpe", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,), normalizer="NFC"),
    PreTokenizer("qwen35", (QWEN35,), normalizer="NFC"),
    PreTokenizer("smollm", ("digits", "gpt2")),
    PreTokenizer("gpt-2", ("gpt2",)),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True),
    PreTokenizer("gpt-4o", (GPT4O,)),
    PreTokenizer("llama3", (LLAMA3,), ignore_merges=True),
    PreTokenizer("llama-v3", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("deepseek-r1-qwen", (QWEN2,), normalizer="NFC"),
    PreTokenizer("starcoder", ("digits", "gpt2")),
    PreTokenizer("refact", ("digits", "gpt2")),
    PreTokenizer("command-r", ("digits", "gpt2")),
    PreTokenizer("olmo", ("gpt2",)),
    PreTokenizer("mpt", ("gpt2",)),
)


def recognise(section: Mapping[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for a tokenizer.json's `pre_tokenizer`. Raises UnsupportedArchitecture for one not in TABLE."""
    steps = _steps(section)
    for entry in TABLE:
        if entry.steps == steps and entry.ignore_merges == ignore_merges:
            return entry.name
    known = ", ".join(entry.name for entry in TABLE[:8])
    raise UnsupportedArchitecture(
        f"tokenizer.json cuts text in a way that llama.cpp has no name for: {' then '.join(steps) or section}"
        f" with ignore_merges {str(ignore_merges).lower()}; known: {known}"
    )


def named(name: str) -> PreTokenizer:
    """The entry of a GGUF's `tokenizer.ggml.pre`. Raises UnsupportedArchitecture."""
    for entry in TABLE:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in TABLE)
    raise UnsupportedArchitecture(f"the pre-tokenizer {name!r} has no table here; known: {known}")


def _steps(section: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A `pre_tokenizer` in TABLE's terms; a step that no entry has comes out as its JSON."""
    if section is None:
        return ()
    if section["type"] == "Sequence":
        return tuple(step for node in section["pretokenizers"] for step in _steps(node))
    if section["type"] == "ByteLevel" and not section.get("add_prefix_space", True):
        return ("gpt2",) if section.get("use_regex", True) else ()
    if section["type"] == "Digits" and section.get("individual_digits"):
        return ("digits",)
    # Keeping what matches apart, or dropping what does not, is one thing where the pattern matches all text.
    kept = (section.get("behavior"), section.get("invert", False)) in (("Isolated", False), ("Removed", True))
    if section["type"] == "Split" and kept and "Regex" in section["pattern"]:
        return (section["pattern"]["Regex"],)
    return (str(dict(section)),)


def _node(step: str) -> dict[str, Any]:
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
