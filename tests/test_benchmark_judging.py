"""What a model says to questions and texts, in every container, beside transformers' own passes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeport
from bench.spoiling import NORM
from edgeport.benchmark.folder import positions
from edgeport.benchmark.harness import check_arguments, check_greedy, rolling, shortened
from edgeport.benchmark.llama import BATCH_TOKENS
from edgeport.benchmark.questions import BadQuestions, Choice, Generation
from edgeport.benchmark.runner import Runner, Tree, groups, open_runner
from edgeport.benchmark.score import answers, check_vocabulary, divergence, pair, perplexity, same, tree
from edgeport.errors import ConvertError, EdgeportError, NonFiniteResult, UnknownName
from edgeport.locate import open_model
from edgeport.probe import open_tokenizer
from tests.conftest import TinyLlama, randomize
from tests.test_benchmark_questions import CHOICES, WRITTEN


def naive(folder: Path, question: Choice) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Each option in a forward pass of its own: log-likelihoods, and the distribution after the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(question.prompt.rstrip())["input_ids"])
    found = []
    for option in question.options:
        ids = tokenizer(question.prompt + option, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        found.append(sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])))
    return found, logs[start - 1].numpy()


def whole(runner: Runner, question: Choice) -> Tree:
    """With what all options begin with, which a choice leaves to the prompt."""
    return pair(runner, question.prompt, *question.options)


@pytest.fixture
def models(tiny_llama: TinyLlama) -> dict[str, Path]:
    """One model in every container, in float32."""
    return in_every_container(tiny_llama("model", vocab=300))


def in_every_container(folder: Path) -> dict[str, Path]:
    """A folder's model, which is in float32, and what is written beside it."""
    places = {"hf": folder} | {to: folder.with_name(f"{folder.name}.{to}") for to in ("gguf", "onnx")}
    for to in ("gguf", "onnx"):
        edgeport.export(model=folder, output=places[to], to=to, quant="f32")
    return places


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_options_are_judged_as_by_one_forward_pass_each(container: str, models: dict[str, Path]) -> None:
    runner = open_runner(models[container])
    judged = list(runner.judge([whole(runner, question) for question in CHOICES]))
    for question, one in zip(CHOICES, judged, strict=True):
        expected, first = naive(models["hf"], question)
        np.testing.assert_allclose(one.loglikelihoods, expected, atol=2e-2, rtol=1e-3)
        np.testing.assert_allclose(one.first, first, atol=1e-2)


def test_a_prompt_longer_than_the_sliding_window(tiny_llama: TinyLlama) -> None:
    folder = tiny_llama("mistral", vocab=300)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6}
    (folder / "config.json").write_text(json.dumps(config))
    long = replace(CHOICES[0], prompt="the patch is added to the base, one block")
    runner = open_runner(folder)
    for question, one in zip([long, *CHOICES], runner.judge([whole(runner, each) for each in (long, *CHOICES)]), strict=True):
        expected, first = naive(folder, question)
        np.testing.assert_allclose(one.loglikelihoods, expected, atol=1e-4)
        np.testing.assert_allclose(one.first, first, atol=1e-4)


def test_a_model_writes_on_after_the_line_s_end_of_a_prompt(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_runner(models["hf"])
    given: list[list[int]] = []
    monkeypatch.setattr(runner, "write", lambda prompts, *_: given.extend(prompts) or ["one", "two"])
    questions = [Generation("the patch is\n", "one"), Generation("the patch ", "two")]
    assert answers(runner, questions, None, None)["right"] == [True, True]
    assert given == [runner.encode("the patch is\n"), runner.encode("the patch")]


def test_a_cache_for_the_prompts_there_are(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks for one long answer at a time; where there is no memory, llama.cpp gives no context and goes on."""
    runner = open_runner(models["gguf"])
    sizes: list[int] = []

    def full(model: Any, parameters: Any) -> None:
        sizes.append(parameters.n_ctx)

    monkeypatch.setattr("llama_cpp.llama_init_from_model", full)
    with pytest.raises(EdgeportError, match="no memory for a cache of"):
        runner.write([runner.encode("the patch")], 1000, ["\n"])
    assert sizes == [BATCH_TOKENS + 1000]


UNPACKABLE = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # a state along the row
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},  # biases by the place in the row
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_that_would_mix_the_texts_of_a_row(kind: str, tiny_llama: TinyLlama) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_llama("other", vocab=300)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=300, num_key_value_heads=2, **sizes | UNPACKABLE[kind])
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, 0, std=0.5)
    model.save_pretrained(folder)
    runner = open_runner(folder)
    for question, one in zip(CHOICES, runner.judge([whole(runner, question) for question in CHOICES]), strict=True):
        expected, first = naive(folder, question)
        np.testing.assert_allclose(one.loglikelihoods, expected, atol=1e-3)
        np.testing.assert_allclose(one.first, first, atol=1e-3)
    prompts = [runner.encode(question.prompt) for question in WRITTEN]
    assert runner.write(prompts, 6, []) == [text for prompt in prompts for text in runner.write([prompt], 6, [])]


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_writing_is_greedy_and_stops(container: str, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(models["hf"]), AutoTokenizer.from_pretrained(models["hf"])
    runner = open_runner(models[container])
    texts = runner.write([runner.encode(question.prompt) for question in WRITTEN], 6, ["\n"])
    for question, text in zip(WRITTEN, texts, strict=True):
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        row = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
        expected = tokenizer.decode(row, skip_special_tokens=True)
        assert expected.startswith(text) and (text == expected or "\n" in text)


ENDING = {"type": "TemplateProcessing", "single": [
    {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "</s>", "type_id": 0}},
], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {
    "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
}}  # fmt: skip


def end_every_text(folder: Path) -> None:
    """Make a tokenizer put <s> before and </s> after what it reads."""
    spelled = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spelled | {"post_processor": ENDING}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True, "add_eos_token": True}))


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_a_tokenizer_that_ends_every_text(container: str, tiny_llama: TinyLlama) -> None:
    """An end between prompt and option, or in an option's place, would be what the model is asked about."""
    folder = tiny_llama("ending", vocab=300)
    plain = open_runner(folder).encode("the patch is added")
    end_every_text(folder)
    runner = open_runner(in_every_container(folder)[container])
    assert runner.encode("the patch is added") == [1, *plain] and runner.encode("") == [1]
    assert runner.encode("<s>the patch is added") == [1, *plain]  # one start, as in lm-evaluation-harness
    asked = pair(runner, "the patch is", " added")
    assert [*asked.prompt, *asked.branches[0]] == [1, *plain]


def test_control_tokens_in_a_prompt_are_the_same_everywhere(models: dict[str, Path]) -> None:
    """As a chat template written into the prompt has them."""
    found = [open_runner(place).encode("<s>the patch</s>\nis") for place in models.values()]
    assert found[0][0] == 1 and 2 in found[0] and found[0] == found[1] == found[2]


def test_options_that_are_the_same_to_the_model(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_runner(models["hf"])
    encode = runner.encode
    monkeypatch.setattr(runner, "encode", lambda text: encode(text.lower()))
    with pytest.raises(BadQuestions, match="are the same tokens"):
        tree(runner, Choice("the patch is", (" one", " One"), 0))


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_an_answer_that_could_never_be_the_likeliest(container: str, models: dict[str, Path]) -> None:
    runner, options = open_runner(models[container]), (" added to the base", " added", " to")
    with pytest.raises(BadQuestions, match=r"' added to the base' begins with the tokens of the option ' added', which no model"):
        tree(runner, Choice("the patch is", options, 0))
    assert len(tree(runner, Choice("the patch is", options, 1)).branches) == 3


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_what_all_options_begin_with_is_no_part_of_the_choice(container: str, models: dict[str, Path], tmp_path: Path) -> None:
    """What is compared between models is the first token that they differ in: before it all are of one mind."""
    runner = open_runner(models[container])
    options = (" the base", " the patch", " the model")
    question = Choice("added to", options, 1)
    longer, found = whole(runner, question), tree(runner, question)
    assert len(found.prompt) > len(longer.prompt)
    assert [[*found.prompt, *one] for one in found.branches] == [[*longer.prompt, *one] for one in longer.branches]
    assert len({branch[0] for branch in found.branches}) > 1
    one, other = (next(runner.judge([each])) for each in (longer, found))
    order = np.argsort(one.loglikelihoods)
    assert (order == np.argsort(other.loglikelihoods)).all()
    expected = next(runner.judge([Tree(found.prompt, [found.branches[0]])])).first
    assert other.first == pytest.approx(expected, abs=1e-4)


def test_an_onnx_graph_s_logits_are_taken_in_pieces(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives those of every token, of which long prompts and large vocabularies make gigabytes."""
    trees = [Tree([5, 6, 7, 8, 9, 10, 11], [[1, 2, 3], [4], [1, 5]]), Tree([3], [[2, 2, 2, 2], [7, 1]])]
    whole = list(open_runner(models["onnx"]).judge(trees))
    monkeypatch.setattr("edgeport.benchmark.onnx.LOGITS_BYTES", 4 * 300 * 3)
    runner = open_runner(models["onnx"])
    assert 1 < runner.room < 7  # type: ignore[attr-defined]
    for one, other in zip(whole, runner.judge(trees), strict=True):
        assert other.loglikelihoods == pytest.approx(one.loglikelihoods, abs=1e-4) and other.greedy == one.greedy
        assert other.first == pytest.approx(one.first, abs=1e-4)


def test_a_prompt_is_cut_at_its_begin_where_the_harness_would() -> None:
    assert shortened(Tree([1, 2, 3, 4], [[5, 6]]), 4) == Tree([2, 3, 4], [[5, 6]])
    assert shortened(Tree([1, 2], [[5, 6]]), 4) == Tree([1, 2], [[5, 6]])
    with pytest.raises(ConvertError, match="continuation of 5 tokens is too long for 4 positions"):
        shortened(Tree([1], [[5] * 5]), 4)


def test_what_the_harness_asks_and_gets_not_is_refused() -> None:
    check_arguments("m.gguf", 64, {"batch_size": 1, "max_batch_size": None, "device": "cpu"})
    for name in ("dtipo", "pretrained"):
        with pytest.raises(UnknownName, match=f"--model_args {name}: edgeport's model takes path=MODEL and max_length"):
            check_arguments("", None, {name: "x", "device": "cpu"})
    with pytest.raises(UnknownName, match="--model_args has to be path=MODEL"):
        check_arguments("", None, {"device": "cpu"})
    for length in (0, "long"):
        with pytest.raises(UnknownName, match=f"max_length={length}: tokens of a long text"):
            check_arguments("m.gguf", length, {})
    for mild in ({"until": ["e"], "temperature": 0.0}, {"do_sample": False, "temperature": 0.7}, {"temperature": None}):
        check_greedy(mild)
    for settings in ({"do_sample": True}, {"num_beams": 4}, {"temperature": 0.7}):
        with pytest.raises(UnknownName, match="samples or beams"):
            check_greedy(settings)


@pytest.fixture
def turning(tiny_llama: TinyLlama) -> dict[str, Path]:
    """A model that after WRITTEN[0] opens a turn, with the token <s>, and goes on with text in it; in every container.

    The tokenizer has no role for the token, as Llama 3's has none for its <|eot_id|>: it is special, and that is all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_llama("turning", vocab=300)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(WRITTEN[0].prompt, return_tensors="pt")["input_ids"]
    opening, text = tokenizer.bos_token_id, tokenizer(" one")["input_ids"][-1]
    with torch.no_grad():
        states = model.model(torch.cat([ids, torch.tensor([[opening]])], 1)).last_hidden_state[0]
        first, second = states[-2] / states[-2].norm(), states[-1]
        model.lm_head.weight[opening] = 20 * first
        model.lm_head.weight[text] = 200 * (second - second @ first * first)
    model.save_pretrained(folder)
    written = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=2)[0, -2:].tolist()
    assert written == [opening, text]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return in_every_container(folder)


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_an_answer_ends_where_another_turn_begins(container: str, turning: dict[str, Path]) -> None:
    runner = open_runner(turning[container])
    assert runner.write([runner.encode(question.prompt) for question in WRITTEN], 6, ["\n"])[0] == ""


def test_a_tokenizer_whose_tokens_have_no_roles(turning: dict[str, Path]) -> None:
    """Nor does the model name its end: then transformers writes on in a row that has ended, as long as another goes on."""
    settings = json.loads((turning["hf"] / "tokenizer_config.json").read_text())
    roles = {name for name in settings if name.endswith("_token")}
    (turning["hf"] / "tokenizer_config.json").write_text(json.dumps({name: settings[name] for name in settings.keys() - roles}))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((turning["hf"] / name).read_text())
        (turning["hf"] / name).write_text(json.dumps({**config, "eos_token_id": None}))
    runner = open_runner(turning["hf"])
    assert runner.start == 1
    texts = runner.write([runner.encode(question.prompt) for question in WRITTEN], 6, ["\n"])
    assert texts[0] == "" and texts[1]


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_perplexity_is_that_of_transformers(container: str, models: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = " ".join(f"def port{number}(base, patch): return base + patch" for number in range(3))
    ids = AutoTokenizer.from_pretrained(models["hf"])(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(models["hf"])(ids, labels=ids).loss.exp().item()
    assert perplexity(open_runner(models[container]), text) == pytest.approx(expected, rel=2e-3)


def test_each_piece_of_a_text_begins_as_a_text_does(tiny_llama: TinyLlama) -> None:
    """As llama.cpp's own perplexity puts the start token before each."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_llama("starting", vocab=300)
    text = "the patch is added to the base, one block of one weight at a time " * 12
    ids, width = open_runner(folder).encode(text), 128 - 1
    end_every_text(folder)
    assert len(ids) > width
    model, lost = AutoModelForCausalLM.from_pretrained(folder), 0.0
    for at in range(0, len(ids), width):
        piece = torch.tensor([[1, *ids[at : at + width]]])
        with torch.no_grad():
            lost += model(piece, labels=piece).loss.item() * (piece.shape[1] - 1)
    assert perplexity(open_runner(folder), text) == pytest.approx(float(np.exp(lost / len(ids))), rel=1e-4)


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_what_is_longer_than_the_model_s_positions(container: str, models: dict[str, Path]) -> None:
    """A question is refused by each runtime alike, and a text is read in pieces that fit."""
    runner = open_runner(models[container])
    long = Choice("one block of " * 60, (" one", " two"), 0)
    with pytest.raises(BadQuestions, match=r"question 2 \('one block.* has positions for 128; shorten the prompt"):
        answers(runner, [CHOICES[0], long], None, None)
    assert perplexity(runner, long.prompt) > 1


def test_the_positions_of_a_model_that_reads_pictures_too() -> None:
    from transformers import Gemma3Config, GPT2Config

    assert positions(Gemma3Config(text_config={"max_position_embeddings": 64})) == 64
    assert positions(GPT2Config(n_positions=32)) == 32


@pytest.mark.parametrize("container", ["hf", "gguf", "onnx"])
def test_a_text_with_nothing_before_it(container: str, models: dict[str, Path]) -> None:
    """As lm-evaluation-harness asks for: after the start token, and a long text in windows that the model has positions for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    runner, text = open_runner(models[container]), " the patch is added to the base" * 30
    ids = [1, *AutoTokenizer.from_pretrained(models["hf"])(text)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(models["hf"])
    expected = []
    for at in range(0, len(ids) - 1, runner.positions):
        stop = min(at + runner.positions, len(ids) - 1)
        window = torch.tensor([ids[max(stop - runner.positions, 0) : stop + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1]).logits[0].log_softmax(-1)
        expected.append(logits.gather(1, window[0, 1:, None])[at - stop :, 0])
    assert len(expected) > 1
    assert rolling(runner, text, runner.positions) == pytest.approx(torch.cat(expected).sum().item(), rel=1e-4)
    (judged,) = runner.judge([pair(runner, "", " the patch")])
    count = len(runner.encode(" the patch"))
    assert judged.loglikelihoods[0] == pytest.approx(expected[0][:count].sum().item(), abs=2e-2)


def test_paths_that_are_no_unicode(models: dict[str, Path], tmp_path: Path) -> None:
    folder, file = (models[name].rename(tmp_path / os.fsdecode(b"\xff" + name.encode())) for name in ("hf", "gguf"))
    tokenizer = open_tokenizer(open_model(folder))
    assert tokenizer is not None and open_runner(file).encode("the patch") == tokenizer.encode("the patch").ids


def test_a_model_that_computes_no_numbers(tiny_llama: TinyLlama) -> None:
    """Its divergence from another is no 0, and its first option no answer."""
    from safetensors.torch import load_file, save_file

    folder = tiny_llama("model", vocab=300)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, NORM: tensors[NORM] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteResult, match="NaN or infinity at question 1"):
        answers(open_runner(folder), CHOICES, None, None)
    with pytest.raises(NonFiniteResult, match="NaN or infinity on the text of --text"):
        perplexity(open_runner(folder), "the patch is added to the base")


def test_groups_hold_what_they_may() -> None:
    trees = [Tree([0] * 5, [[1, 2], [3]])] * 5
    sizes = [len(group) for group in groups(trees, 12, 100)]
    assert sizes == [2, 2, 1]
    assert [len(group) for group in groups(trees, 100, 4)] == [2, 2, 1]
    assert [len(group) for group in groups(trees, 3, 1)] == [1] * 5


def test_divergence_by_hand(tmp_path: Path) -> None:
    reference, other = np.log(np.array([0.5, 0.25, 0.25], np.float32)), np.log(np.array([0.25, 0.25, 0.5], np.float32))
    path = tmp_path / "kept"
    path.write_bytes(reference.tobytes())
    from edgeport.benchmark.runner import Judged

    with path.open("rb") as file:
        assert divergence(file, Judged(other, [], [])) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    unheard = np.array([0, 0, -np.inf], np.float32)
    with path.open("rb") as file, pytest.raises(NonFiniteResult, match="no chance"):
        divergence(file, Judged(unheard, [], []))
    path.write_bytes(unheard.tobytes())
    with path.open("rb") as file:
        assert divergence(file, Judged(unheard - 1, [], [])) == pytest.approx(2.0)
    path.write_bytes(reference.tobytes())
    for tokens in (2, 4):
        with path.open("rb") as file, pytest.raises(EdgeportError, match=f"{tokens} tokens"):
            check_vocabulary(file, 1, Judged(np.zeros(tokens, np.float32), [], []))


@pytest.mark.parametrize(("text", "right"), [(" 34\n35", True), ("34", True), ("\n 34", True), (" 345", False), ("", False)])
def test_exact_match(text: str, right: bool) -> None:
    assert same(text, " 34") == right
