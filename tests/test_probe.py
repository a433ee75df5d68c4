"""The streamed forward and the comparison, against transformers' own forward on tiny models of each family."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from converters.hf import Folder, converter
from edgeport import forward, probe
from edgeport.errors import (
    CorruptCheckpoint,
    MissingTensor,
    NonFiniteResult,
    NotACheckpoint,
    UnsupportedArchitecture,
    VerificationFailed,
)
from edgeport.forward import bind
from edgeport.tensor import Part, Weight

SIZE = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "tie_word_embeddings": False},
    # as config.json spelled it before transformers 5
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "num_hidden_layers": 3,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]},
    "granite": {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {"model_type": "phi"},
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
}  # fmt: skip


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the family, saved in `folder`; weights large enough that soft caps and biases show."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{**SIZE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder)
    return model


def perturbed(folder: Path, model: Any, scale: float = 0.02) -> Folder:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=scale)
    model.save_pretrained(folder)
    return converter.open(folder)


def words(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(3))


def all_logits(source: Folder, tokens: torch.Tensor, vocabulary: int = 320) -> torch.Tensor:
    model = forward.stream(source)
    return model.logits(tokens, model.hidden(tokens), range(vocabulary))


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Folder, Any]:
    model = make(tmp_path / "llama", "llama2")
    return converter.open(tmp_path / "llama"), model


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = make(tmp_path, family)
    source = converter.open(tmp_path)
    if family == "llama3":
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("rope_parameters")
        source = replace(source, config={**config, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    with torch.no_grad():
        states, logits = model.base_model(words())[0], model(words()).logits
    assert (probe.hidden_states(source, words()) - states).abs().max() < 1e-4
    assert (all_logits(source, words()) - logits).abs().max() < 1e-4


def test_a_bfloat16_model_computes_in_float32(tmp_path: Path) -> None:
    model = make(tmp_path, "gemma2", torch.bfloat16).float()
    with torch.no_grad():
        expected = model(words()).logits
    assert (all_logits(converter.open(tmp_path), words()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2", "phi"])
def test_blocks_do_not_change_the_result(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = perturbed(tmp_path / "b", make(tmp_path / "a", family))
    source = converter.open(tmp_path / "a")
    whole = probe.compare(source, changed, words())
    monkeypatch.setattr(forward, "BLOCK_ELEMENTS", 64 * 7)
    monkeypatch.setattr(probe, "BLOCK_ELEMENTS", 48 * 11)
    pieces = probe.compare(source, changed, words())
    assert pieces.kl == pytest.approx(whole.kl, abs=1e-5)
    assert pieces.agree == whole.agree
    assert pieces.candidate_perplexity == pytest.approx(whole.candidate_perplexity, rel=1e-5)


def test_granules_are_read_whole(llama: tuple[Folder, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that must be decoded 32 together give the same model, also where a block or a token cuts through them."""
    source, model = llama
    coarse = replace(source, weights={name: grained(weight, 32) for name, weight in source.weights.items()})
    monkeypatch.setattr(forward, "BLOCK_ELEMENTS", 64 * 40)
    with torch.no_grad():
        expected = model(words()).logits
    assert (all_logits(coarse, words()) - expected).abs().max() < 1e-4
    assert probe.compare(source, coarse, words()).max_kl < 1e-5


def grained(weight: Weight, granule: int) -> Weight:
    if len(weight.shape) < 2:
        return weight
    data = weight.parts["data"]
    return replace(weight, granule=granule, parts={"data": Part(data.spec, data.stride * granule)})


def test_a_model_agrees_with_itself(llama: tuple[Folder, Any]) -> None:
    result = probe.compare(llama[0], llama[0], words())
    assert set(result.kl) == {0.0} and all(result.agree) and len(result.kl) == 48
    assert (result.mean_kl, result.max_kl, result.top1) == (0.0, 0.0, 1.0)
    assert result.reference_perplexity == result.candidate_perplexity


@pytest.mark.parametrize("family", ["llama2", "llama3", "gemma2"])
def test_divergence_is_the_plain_formula(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path / "a", family)
    with torch.no_grad():
        first = model(words()).logits.double()
        candidate = perturbed(tmp_path / "b", model)
        second = model(words()).logits.double()
    monkeypatch.setattr(forward, "BLOCK_ELEMENTS", 64 * 50)
    result = probe.compare(converter.open(tmp_path / "a"), candidate, words())
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    assert kl.max() > 1e-3
    assert result.kl == pytest.approx(kl.tolist(), abs=1e-6, rel=1e-4)
    assert result.agree == tuple((first.argmax(-1) == second.argmax(-1)).flatten().tolist())
    for logs, perplexity in ((p, result.reference_perplexity), (q, result.candidate_perplexity)):
        surprise = torch.nn.functional.nll_loss(logs[:, :-1].flatten(0, 1), words()[:, 1:].flatten())
        assert perplexity == pytest.approx(math.exp(surprise), rel=1e-5)
    summary = result.to_json()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-4) and summary["positions"] == 48


def test_large_logits_and_equal_ones(tmp_path: Path) -> None:
    """exp does not overflow, and of equal logits the first is the most probable."""
    logits = torch.tensor([[[300.0, -200.0, 300.0, 0.0], [5.0, 5.0, 5.0, 5.0]]])
    tally = probe.Tally.start(torch.tensor([[0, 2]]))
    tally.add(logits[..., :3], range(3))
    tally.add(logits[..., 3:], range(3, 4))
    assert tally.log_mass().tolist() == [[pytest.approx(300 + math.log(2)), pytest.approx(5 + math.log(4))]]
    assert tally.best.tolist() == [[0, 0]]
    assert tally.perplexity() == pytest.approx(2.0)


def test_a_stored_head_is_used_and_a_missing_one_needs_a_tie(tmp_path: Path) -> None:
    make(tmp_path, "llama2")
    source = converter.open(tmp_path)
    headless = {name: weight for name, weight in source.weights.items() if name != "lm_head.weight"}
    with pytest.raises(MissingTensor, match=r"lacks lm_head\.weight$"):
        probe.hidden_states(replace(source, weights=headless), words())
    tied = replace(source, weights=headless, config={**source.config, "tie_word_embeddings": True})
    assert forward.stream(tied).head.name == "model.embed_tokens.weight"
    # edgeport unties a head that a patch has changed; it counts even where the config was left behind
    untied = replace(source, config={**source.config, "tie_word_embeddings": True})
    assert torch.equal(all_logits(untied, words()), all_logits(source, words()))


def test_every_weight_has_a_place_and_every_place_a_weight(llama: tuple[Folder, Any]) -> None:
    source, _ = llama
    weights = dict(source.weights)
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(MissingTensor, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight$"):
        forward.stream(replace(source, weights=weights))
    with pytest.raises(MissingTensor, match=r"no place for model\.extra\.weight$"):
        forward.stream(replace(source, weights={**source.weights, "model.extra.weight": gone}))
    # stored by old versions of transformers, computed by today's
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    forward.stream(replace(source, weights={**source.weights, old: gone}))


def test_a_shape_that_contradicts_the_config(llama: tuple[Folder, Any]) -> None:
    source, _ = llama
    with pytest.raises(CorruptCheckpoint, match=r"has shape \[96, 64\] where config\.json says \[128, 64\]"):
        forward.stream(replace(source, config={**source.config, "intermediate_size": 128}))


@pytest.mark.parametrize("model_type", ["no-such-thing", "vit", "mamba", None])
def test_other_architectures_are_refused(model_type: str | None, llama: tuple[Folder, Any]) -> None:
    config = {"model_type": model_type} if model_type else {}
    with pytest.raises((UnsupportedArchitecture, MissingTensor)):
        probe.hidden_states(replace(llama[0], config=config), words())


def test_weights_used_behind_their_module(tmp_path: Path) -> None:
    """Mamba takes its convolution's weight without calling the convolution, so it would stay unread."""
    config = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 320, "state_size": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="cannot be run in blocks"):
        probe.hidden_states(converter.open(tmp_path), words())


def test_damaged_weights_and_short_texts(llama: tuple[Folder, Any], tmp_path: Path) -> None:
    source, model = llama
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(NonFiniteResult, match="damaged computes NaN"):
        probe.compare(source, converter.open(tmp_path / "damaged"), words())
    with torch.no_grad():
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[319] = float("nan")  # of a token that no text has
    model.save_pretrained(tmp_path / "headless")
    with pytest.raises(NonFiniteResult, match="headless computes NaN"):
        probe.compare(source, converter.open(tmp_path / "headless"), words())
    with pytest.raises(VerificationFailed, match="two tokens"):
        probe.compare(source, source, words(length=1))
    with pytest.raises(MissingTensor, match="no row for token 320"):
        probe.hidden_states(source, torch.tensor([[1, 320]]))


def save_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer of one token a word, with `tokens` entries, that begins every text with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "the": 2, **{f"word{n}": n for n in range(3, tokens)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9000)
    tokenizer.save(str(folder / "tokenizer.json"))


def padded(folder: Path, model: Any, rows: int) -> Folder:
    """The model with a vocabulary of more rows."""
    state = {**model.state_dict()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.ones(rows - 320, 64)])
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return converter.open(folder)


def test_padding_of_a_vocabulary_is_left_out(llama: tuple[Folder, Any], tmp_path: Path) -> None:
    source, model = llama
    wide = padded(tmp_path / "wide", model, 384)
    with pytest.raises(VerificationFailed, match="vocabulary of 320, wide one of 384, and 384 tokens may be in use"):
        probe.compare(source, wide, words())
    save_tokenizer(source.path, 300)
    save_tokenizer(wide.path, 300)
    for pair in ((source, wide), (wide, source)):
        result = probe.compare(*pair, words())
        assert result.vocabulary == 320 and result.max_kl < 1e-6 and result.top1 == 1
    save_tokenizer(wide.path, 330)
    with pytest.raises(VerificationFailed, match="330 tokens may be in use"):
        probe.compare(source, wide, words())


def test_probe_text_in_the_model_s_tokens(llama: tuple[Folder, Any]) -> None:
    source, _ = llama
    with pytest.raises(NotACheckpoint, match=r"llama has no tokenizer\.json"):
        probe.probe_tokens(source)
    save_tokenizer(source.path, 300)
    tokens = probe.probe_tokens(source)
    assert tokens.shape == (1, 256) and tokens.dtype == torch.int64
    assert tokens[0, 0] == 1 and tokens.max() == 2  # neither cut nor padded as tokenizer.json would have it
    assert 3000 < probe.probe_tokens(source, 10_000).shape[1] < 6000
    (source.path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json of llama"):
        probe.probe_tokens(source)


@dataclass(frozen=True)
class Counted(Folder):
    """A folder that notes how many bytes each read takes."""

    reads: list[int] = field(default_factory=list)

    def read(self, spec: Any, start: int, stop: int) -> bytearray:
        self.reads.append(stop - start)
        return Folder.read(self, spec, start, stop)


def test_no_read_is_larger_than_a_block(llama: tuple[Folder, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = llama
    counted = Counted(source.path, source.config, source.stored, source.weights, source.files)
    monkeypatch.setattr(forward, "BLOCK_ELEMENTS", 64 * 10)
    probe.compare(counted, counted, words())
    assert max(counted.reads) <= 64 * 10 * 4
    # the embedding gives the text's own rows and no others: one read a row, for each of the two models
    table = counted.stored["model.embed_tokens.weight"]
    assert table.nbytes == 320 * 64 * 4 and counted.reads.count(64 * 4) >= 2 * len(words().unique())


def test_globals_are_left_alone(llama: tuple[Folder, Any]) -> None:
    seed = torch.get_rng_state()
    config = json.dumps(llama[0].config)
    probe.compare(llama[0], llama[0], words())
    assert torch.equal(torch.get_rng_state(), seed)
    assert json.dumps(llama[0].config) == config
    assert not torch.nn.Linear(2, 2).weight.is_meta and torch.get_default_dtype() == torch.float32


CHILD = """
import sys, torch, transformers
from pathlib import Path
from converters.hf import converter
from edgeport import probe
from edgeport.memory import peak_bytes, reset_peak, resident_bytes
torch.set_num_threads(1)
tokens = torch.arange(128).reshape(1, 128)
small, large = (converter.open(Path(argument)) for argument in sys.argv[1:])
imported = resident_bytes()
probe.compare(small, small, tokens)  # brings in the family's modules, which transformers imports late
reset_peak()
before = resident_bytes()
probe.compare(large, large, tokens)
print(peak_bytes() - imported, peak_bytes() - before)
"""


def peaks(small: Path, large: Path) -> tuple[int, int]:
    """Peak bytes of comparing `large`: above the import of transformers, and above having compared `small`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(probe.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, str(small), str(large)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    above_import, own = map(int, ran.stdout.split())
    return above_import, own


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs VmHWM")
def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    make(tmp_path / "warm", "llama2")
    size = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8000, "num_attention_heads": 8}
    above_import, own, stored = {}, {}, {}
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        make(folder, "llama2", torch.bfloat16, num_hidden_layers=layers, **size)
        above_import[layers], own[layers] = peaks(tmp_path / "warm", folder)
        stored[layers] = (folder / "model.safetensors").stat().st_size
        shutil.rmtree(folder)
    assert above_import[16] == pytest.approx(above_import[4], rel=0.15)
    # the modules themselves, without weights, take some KiB a layer; 12 layers of weights are 87 MiB in bfloat16
    assert own[16] - own[4] < (stored[16] - stored[4]) / 12
    assert own[16] < stored[16] / 4


def test_texts_that_are_in_a_module_at_once(llama: tuple[Folder, Any]) -> None:
    """As texts that take turns within a layer are: the first to leave it takes no buffer from the others."""
    source, model = llama

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(64))

        def forward(self, values: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
            if others is not None:
                assert torch.equal(self(others), others * model.model.norm.weight)
            return values * self.scale

    module = Scaled()
    bind(module, source, {"scale": source.weights["model.norm.weight"]}, table=False)
    for _ in range(2):
        assert torch.equal(module(torch.ones(64), 3 * torch.ones(64)), model.model.norm.weight)
        assert torch.equal(module.scale, torch.ones(64))
