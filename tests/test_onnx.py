"""ONNX outputs through onnxruntime against transformers: every family, every precision, text in chunks and token by token."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as state
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import edgeport
from bench.bad_input import run
from converters.onnx.installed import unknown
from converters.rotary import frequencies, rotary_settings
from edgeport.blocks import decode_rows
from edgeport.errors import ConvertError, CorruptCheckpoint, EdgeportError, NotACheckpoint, UnknownName
from edgeport.locate import open_model
from edgeport.runtime import Runner
from edgeport.tensor import EMBEDDING, HEAD, Weight
from tests.conftest import saved_once

if TYPE_CHECKING:
    from tests.conftest import TinyLlama

MakeLora = Callable[..., Path]

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, biases": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 32},
    "smollm": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96, "head_dim": 32,
               "tie_word_embeddings": True, "rope_theta": 1e5},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, window, yarn": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
                            "rope_scaling": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip
LENGTH, FIRST, SECOND = 34, 9, 5
"""A text, its two chunks, and twenty tokens one by one."""

Families = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A function from a family's name to a random model of it, and the folder it is saved in."""
    return saved_once(tmp_path_factory.mktemp("families"), build)


@pytest.fixture
def make_lora(tmp_path: Path) -> MakeLora:
    """A function from a tiny Llama to a LoRA on its seven kinds of linear layers, `size` times as large as they are."""

    def make(base: Path, size: float = 0.1) -> Path:
        folder = tmp_path / "lora"
        folder.mkdir()
        tensors = {}
        draw = torch.Generator().manual_seed(3)
        for name, weight in load_file(base / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                prefix = f"base_model.model.{name.removesuffix('.weight')}"
                up, down = (torch.randn(shape, generator=draw) for shape in ((len(weight), 4), (4, weight.shape[1])))
                tensors[f"{prefix}.lora_A.weight"] = down
                tensors[f"{prefix}.lora_B.weight"] = up * size * weight.norm() / (up @ down).norm()
        save_file(tensors, folder / "adapter_model.safetensors")
        facts = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["all-linear"]}
        (folder / "adapter_config.json").write_text(json.dumps(facts))
        return folder

    return make


def build(name: str) -> Any:
    settings = deepcopy(SMALL | FAMILIES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            # norms and biases that are not all alike, and logits that are not all about zero
            parameter.data = parameter.data * 3 if parameter.ndim > 1 else parameter.data + torch.randn_like(parameter) * 0.1
    return model


def tokens(batch: int = 1) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, 320, (batch, LENGTH))


def expected(model: Any, weights: dict[str, torch.Tensor] | None = None, batch: int = 1) -> NDArray[np.float32]:
    """transformers' logits, with other weights in place of the model's own."""
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights or {}, torch.from_numpy(tokens(batch))).logits
    return np.asarray(logits.numpy())


def found(output: Path, batch: int = 1, provider: str = "cpu") -> NDArray[np.float32]:
    """Ours, in two chunks and token by token."""
    runner, text = Runner(output, provider=provider, threads=1), tokens(batch)
    edges = [0, FIRST, *range(FIRST + SECOND, LENGTH + 1)]
    return np.concatenate([runner.step(text[:, start:stop]) for start, stop in pairwise(edges)], axis=1)


def error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def stored_weights(output: Path, model: Any, bits: int) -> dict[str, torch.Tensor]:
    """What the file holds, under transformers' names: by onnx's own reader, and unpacked in plain numpy."""
    stored = onnx.load(output / "model.onnx")
    portable = not any(node.domain for node in stored.graph.node)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}
    weights: dict[str, torch.Tensor] = {}
    for name, values in arrays.items():
        name = name.removesuffix(".rows")
        if name.endswith((".scales", ".zero_points")) or name.startswith("constant") or name in weights:
            continue
        if f"{name}.scales" in arrays:
            values = unpacked(values, arrays[f"{name}.scales"], arrays.get(f"{name}.zero_points"), bits, portable)
        prefix, joined, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        begin = 0
        for module in joined.split("+"):
            full = f"{prefix}.{module}.{kind}".removeprefix(".")
            rows = model.get_parameter(full).shape[0]
            shift = model.config.model_type == "gemma2" and module.endswith("norm")
            weights[full] = torch.from_numpy(values[begin : begin + rows].astype(np.float32)) - float(shift)
            begin += rows
        assert begin == len(values)
    return weights


def unpacked(codes: Any, scales: NDArray[np.float32], zeros: Any, bits: int, signed: bool) -> NDArray[np.float32]:
    """(code - zero) * scale, [rows, columns]."""
    if codes.dtype == np.uint8:
        codes = halves(codes) if bits == 4 else codes.reshape(len(codes), -1)
        codes = codes ^ (1 << (bits - 1)) if signed else codes
        middle = 1 << (bits - 1)
    else:
        middle = 0  # onnx's reader has signed numbers
    columns = codes.shape[1] // scales.shape[1]
    if zeros is not None:
        zeros = halves(zeros) if bits == 4 else zeros
        middle = zeros[:, : scales.shape[1]].astype(np.float32).repeat(columns, axis=1)
    return np.asarray((codes.astype(np.float32) - middle) * scales.repeat(columns, axis=1))


def halves(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, portable: bool, families: Families, tmp_path: Path) -> None:
    folder, model = families(name)
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32", portable=portable)
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


def test_a_scaling_that_was_added_later_takes_the_place_of_all_rotary_settings(families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families("qwen3")[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    told = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN}
    (base / "config.json").write_text(json.dumps(config | told))
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2", "qwen2", "qwen3"])
def test_layer_types_count_where_transformers_reads_them(name: str, families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families(name)[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    told = {"layer_types": kinds, "sliding_window": 4, "use_sliding_window": True}
    (base / "config.json").write_text(json.dumps(config | told))
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32")
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert error(found(tmp_path / "out"), expected(model)) < 2e-6


# options, bits, and how far from the logits of the file's own numbers: float32's rounding, but where fused products
# round activations to 8 bits
PRECISIONS: dict[str, tuple[dict[str, Any], int, float]] = {
    "fp16": ({"quant": "fp16"}, 0, 2e-6),
    "bf16": ({"quant": "bf16"}, 0, 2e-6),
    "int8": ({"quant": "int8"}, 8, 0.05),
    "int4": ({"quant": "int4"}, 4, 0.05),
    "int4, zero points": ({"quant": "int4", "asymmetric": True, "block_size": 16}, 4, 0.05),
    "int4, portable": ({"quant": "int4", "portable": True}, 4, 2e-6),
    "int8, portable": ({"quant": "int8", "portable": True, "block_size": 16}, 8, 2e-6),
}
QUICK = [("smollm", precision) for precision in PRECISIONS] + [(name, "int4, portable") for name in FAMILIES if name != "smollm"]
THOROUGH = [pytest.param(name, precision, marks=pytest.mark.slow)
            for name in FAMILIES for precision in PRECISIONS if (name, precision) not in QUICK]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), [*QUICK, *THOROUGH])
def test_logits_are_those_of_the_stored_numbers(name: str, precision: str, families: Families, tmp_path: Path) -> None:
    (folder, model), (options, bits, most) = families(name), PRECISIONS[precision]
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", **options)
    weights = stored_weights(tmp_path / "out", model, bits)
    assert error(found(tmp_path / "out"), expected(model, weights)) < most


def test_a_batch_that_is_padded_at_its_end(families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    assert error(found(tmp_path / "out", batch=2), expected(model, batch=2)) < 2e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_portable_graph_takes_padding_on_either_side(side: str, families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32", portable=True)
    text, mask = tokens(2)[:, :12], np.ones((2, 12), np.int64)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    with torch.no_grad():
        theirs = model(torch.from_numpy(text), attention_mask=torch.from_numpy(mask)).logits.numpy()
    ours = Runner(tmp_path / "out", threads=1).step(text, mask)
    assert error(ours[mask == 1], theirs[mask == 1]) < 2e-6


def test_a_fused_graph_refuses_padding_on_the_left(families: Families, tmp_path: Path) -> None:
    edgeport.export(model=families("llama")[0], output=tmp_path / "out", to="onnx", quant="fp32")
    mask = np.ones((2, 12), np.int64)
    mask[1, :4] = 0
    with pytest.raises(ConvertError, match=r"padded on the left.*--portable"):
        Runner(tmp_path / "out", threads=1).step(tokens(2)[:, :12], mask)


def test_greedy_text_is_that_of_transformers(families: Families, tmp_path: Path) -> None:
    folder, model = families("gemma2")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    prompt = tokens()[0, :9].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    runner = Runner(tmp_path / "out", threads=1)
    ours = list(runner.generate(prompt, 12))
    assert ours == theirs[0, 9:].tolist()
    assert list(runner.generate(prompt, 12, stop=[ours[3]])) == ours[: ours.index(ours[3]) + 1]


def test_a_tied_embedding_is_stored_once(families: Families, tmp_path: Path) -> None:
    folder, model = families("qwen2")
    table = model.get_input_embeddings().weight.numel()
    rest = sum(parameter.numel() for parameter in model.parameters()) - table
    for quant, each in (("fp32", 4.0), ("int8", 1 + 4 / 32), ("int4", 0.5 + 4 / 32)):
        receipt = edgeport.export(model=folder, output=tmp_path / quant, to="onnx", quant=quant)
        vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
        numbers = (table + rest - vectors) * each + vectors * 4
        # each initializer begins on a page of its own
        pages = 4096 * len(onnx.load(tmp_path / quant / "model.onnx", load_external_data=False).graph.initializer)
        assert numbers <= receipt.files["model.onnx.data"] <= numbers + pages


def test_a_tied_embedding_has_the_type_of_the_head(families: Families, tmp_path: Path) -> None:
    job: dict[str, Any] = {"model": families("qwen2")[0], "to": "onnx", "quant": "int4", "token_embedding_type": "int8"}
    with pytest.raises(ConvertError, match=r"both are to be int4; leave off .* or give --output-tensor-type int8 for both"):
        edgeport.export(output=tmp_path / "out", **job)
    both = edgeport.export(output=tmp_path / "both", output_tensor_type="int8", **job).output
    assert bits_of(open_model(both).weights) == {EMBEDDING: 8}


def test_a_head_that_is_stored_is_its_own_whatever_config_says(families: Families, tmp_path: Path) -> None:
    folder, model = families("qwen2")
    base = shutil.copytree(folder, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    save_file({**stored, HEAD: stored[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    options = {"quant": "int4", "token_embedding_type": "int8", "portable": True}
    out = edgeport.export(model=base, output=tmp_path / "out", to="onnx", **options).output
    weights = open_model(out).weights
    assert bits_of(weights) == {EMBEDDING: 8, HEAD: 4}
    source = open_model(out)
    numbers = {name: decode_rows(source, weight, range(weight.rows)).reshape(weight.shape) for name, weight in weights.items()}
    untied = deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(numbers[HEAD])
    assert error(found(out), expected(untied, {name: values for name, values in numbers.items() if name != HEAD})) < 2e-6


def bits_of(weights: Mapping[str, Weight]) -> dict[str, int]:
    return {name: weights[name].parameters.bits for name in (EMBEDDING, HEAD) if name in weights}  # type: ignore[attr-defined]


def test_an_output_is_whole_and_the_same_every_time(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(dtype="bfloat16")
    for name in ("one", "two"):
        edgeport.export(model=base, output=tmp_path / name, to="onnx", quant="int4")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "generation_config.json",
                     "tokenizer.json", "tokenizer_config.json", "edgeport.json"}  # fmt: skip
    for name in names - {"edgeport.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for tensor in onnx.load(tmp_path / "one" / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert not place or (place["location"] == "model.onnx.data" and int(place["offset"]) % 16 == 0)
    edgeport.verify(tmp_path / "one")
    told = json.loads((tmp_path / "one" / "genai_config.json").read_text())["model"]
    assert (told["type"], told["context_length"], told["eos_token_id"], told["vocab_size"]) == ("llama", 128, 2, 320)
    assert told["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"


def test_an_importance_matrix_weighs_the_errors_of_int4(families: Families, tmp_path: Path) -> None:
    folder, model = families("llama")
    drawn = np.random.default_rng(3)
    entries = {f"blk.{layer}.ffn_down.weight": drawn.uniform(0, 1, 128).astype(np.float32) ** 8 for layer in range(3)}
    matrix = tmp_path / "imatrix.dat"
    stored = [struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, 128) + values.tobytes()
              for name, values in entries.items()]  # fmt: skip
    matrix.write_bytes(struct.pack("<i", len(entries)) + b"".join(stored))
    errors = []
    for place, options in (("plain", {}), ("weighed", {"imatrix": matrix})):
        edgeport.export(model=folder, output=tmp_path / place, to="onnx", quant="int4", portable=True, **options)
        weights = stored_weights(tmp_path / place, model, 4)
        assert error(found(tmp_path / place), expected(model, weights)) < 2e-6
        off = [(weights[f"model.layers.{n}.mlp.down_proj.weight"] - model.model.layers[n].mlp.down_proj.weight).square()
               @ torch.from_numpy(entries[f"blk.{n}.ffn_down.weight"]) for n in range(3)]  # fmt: skip
        errors.append(torch.cat(off).sum().item())
    assert errors[1] < 0.9 * errors[0]
    for quant, path, sentence in (
        ("int8", matrix, "--imatrix weighs the errors of int4, and the output is to be int8"),
        ("int4", folder / "config.json", "no importance matrix"),
    ):
        with pytest.raises(EdgeportError, match=sentence):
            edgeport.export(model=folder, output=tmp_path / "refused", to="onnx", quant=quant, imatrix=path)
        assert not (tmp_path / "refused").exists()


def test_bf16_weights_are_copied_byte_for_byte(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    receipt = edgeport.export(model=tiny_llama(dtype="bfloat16"), output=tmp_path / "out", to="onnx")
    assert {fact.weight for fact in receipt.facts if fact.action == "copy"} >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_portable_graph_passes_onnx_own_checker(families: Families, tmp_path: Path) -> None:
    edgeport.export(model=families("gemma2")[0], output=tmp_path / "out", to="onnx", quant="int4", portable=True)
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)


def data(folder: Path) -> bytes:
    return (folder / "model.onnx.data").read_bytes()


@pytest.mark.parametrize(("to", "quant"), [("gguf", "Q8_0"), ("gguf", "Q4_0"), ("hf", "nf4"), ("hf", "int8")])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_quantized_base_gives_what_its_decoded_numbers_give(
    to: str, quant: str, precision: str, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    stored = tmp_path / ("base.gguf" if to == "gguf" else "quantized")
    edgeport.export(model=tiny_llama(tied=True), output=stored, to=to, quant=quant)
    edgeport.export(model=stored, output=tmp_path / "plain", to="hf", quant="f32")
    for base in (stored, tmp_path / "plain"):
        edgeport.export(model=base, output=tmp_path / f"{base.stem}.onnx", to="onnx", quant=precision)
    assert data(tmp_path / f"{stored.stem}.onnx") == data(tmp_path / "plain.onnx")


def test_a_patch_goes_in_before_rounding(tiny_llama: TinyLlama, make_lora: MakeLora, tmp_path: Path) -> None:
    base = tiny_llama()
    patch = make_lora(base)
    edgeport.port(patch=patch, new_base=base, output=tmp_path / "merged", to="hf")
    edgeport.export(model=tmp_path / "merged", output=tmp_path / "after", to="onnx", quant="int4")
    receipt = edgeport.port(patch=patch, new_base=base, output=tmp_path / "at once", to="onnx", quant="int4")
    assert data(tmp_path / "at once") == data(tmp_path / "after")
    assert receipt.survival is not None and receipt.survival["mean"] > 0.9


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_patch_on_numbers_that_lie_on_the_grid(
    rounding: str, tiny_llama: TinyLlama, make_lora: MakeLora, tmp_path: Path
) -> None:
    edgeport.export(model=tiny_llama(), output=tmp_path / "int4", to="onnx", quant="int4")
    edgeport.export(model=tmp_path / "int4", output=tmp_path / "grid", to="hf", quant="f32")
    receipt = edgeport.port(patch=make_lora(tmp_path / "grid", size=0.01), new_base=tmp_path / "grid",
                            output=tmp_path / "out", to="onnx", quant="int4", rounding=rounding, force=True)  # fmt: skip
    assert receipt.survival is not None
    assert receipt.survival["mean"] < 0.3 if rounding == "nearest" else abs(receipt.survival["mean"] - 1) < 0.3


@pytest.mark.parametrize("portable", [False, True], ids=["fused", "portable"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_output_is_read_back(tied: bool, portable: bool, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied)
    edgeport.export(model=base, output=tmp_path / "onnx", to="onnx", quant="fp32", portable=portable)
    facts = edgeport.inspect(tmp_path / "onnx")
    assert (facts["container"], facts["model_type"], facts["tied_head"]) == ("onnx", "llama", tied)
    edgeport.export(model=tmp_path / "onnx", output=tmp_path / "back", to="hf", quant="f32")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    edgeport.export(model=tmp_path / "onnx", output=tmp_path / "int4", to="onnx", quant="int4", portable=portable)
    assert edgeport.inspect(tmp_path / "int4")["codecs"] == ["nbits", "plain"]


def test_a_folder_that_contradicts_itself_is_not_read(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    output = edgeport.export(model=tiny_llama(), output=tmp_path / "out", to="onnx", quant="int8").output
    config, model = (output / "config.json").read_text(), onnx.load(output / "model.onnx", load_external_data=False)
    (output / "config.json").write_text(json.dumps(json.loads(config) | {"num_hidden_layers": 1}))
    with pytest.raises(CorruptCheckpoint, match=r"computes with model\.layers\.1\..* config\.json has no place for"):
        edgeport.inspect(output)
    (output / "config.json").write_text(config)
    for lie in ("[]", "no JSON"):
        model.metadata_props[0].value = lie
        (output / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(CorruptCheckpoint, match="what it says of itself"):
            edgeport.inspect(output)


def test_verify_compares_what_the_graph_computes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, other = tiny_llama(), tiny_llama("other", seed=1)
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="int8")
    told = edgeport.compare(tmp_path / "out", base, tokens=100)
    assert told.tolerance is not None and 0 < told.mean_kl < told.tolerance
    answer = run(["verify", str(tmp_path / "out"), "--against", str(base), "--tokens", "100", "--json"])
    assert answer.code == 0 and json.loads(answer.output)["against"]["mean_kl"] < told.tolerance
    # random models of this size say nearly the same: a logit of one is a thousandth of the other's
    wrong = run(["verify", str(tmp_path / "out"), "--against", str(other), "--tokens", "100", "--max-kl", "1e-6"])
    assert wrong.code == 1 and "above --max-kl" in wrong.error
    # by default on more tokens than this model has positions for
    long = run(["verify", str(tmp_path / "out"), "--against", str(base), "--json"])
    assert long.code == 0 and json.loads(long.output)["against"]["positions"] == 128
    edgeport.export(model=base, output=tmp_path / "fp32", to="onnx", quant="fp32")
    wrong = run(["verify", str(tmp_path / "fp32"), "--against", str(other), "--tokens", "100"])
    assert wrong.code == 1 and "above the tolerance of its precision" in wrong.error


def test_an_operator_that_onnxruntime_lacks_is_named() -> None:
    schemas = [schema for schema in state.get_all_operator_schema() if schema.name != "GroupQueryAttention"]
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    nodes = [onnx.helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft")]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=opsets)
    assert unknown(model, state.get_all_operator_schema()) == []
    assert unknown(model, schemas) == ["com.microsoft.GroupQueryAttention"]
    model.opset_import[0].version = 999
    assert unknown(model, schemas) == ["opset 999 of ai.onnx", "com.microsoft.GroupQueryAttention"]


def test_rotary_frequencies_are_those_of_transformers() -> None:
    for rope in (LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0},
                 YARN | {"truncate": False, "attention_factor": 1.3, "beta_fast": 16.0}):  # fmt: skip
        config = AutoConfig.for_model("llama", **SMALL, rope_parameters={**rope, "rope_theta": 5e5})
        theirs, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
        ours, factor = frequencies(rotary_settings(config.to_dict()), 16, 256)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=3e-7)
        assert factor == pytest.approx(scale)


BROKEN: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_key_value_heads": {}}, "num_key_value_heads {}"), ({"num_key_value_heads": 3}, "4 of queries and 3 of keys"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"), ({"rms_norm_eps": []}, r"rms_norm_eps \[\]"),
    ({"max_position_embeddings": 0}, "max_position_embeddings 0"),
    ({"max_position_embeddings": 2.5}, "max_position_embeddings 2.5"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta 0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor 0.0"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "not below high_freq_factor"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_settings_of_which_no_graph_can_be_made(
    change: dict[str, Any], says: str, families: Families, tmp_path: Path
) -> None:
    folder = families("llama")[0]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=says):
        edgeport.plan(new_base=tmp_path / "base", output=tmp_path / "out", to="onnx")


@pytest.mark.parametrize(("key", "value"), [
    ("offset", "-4096"), ("offset", "x"), ("length", "12"), ("location", "../model.onnx.data"), ("location", "/etc/passwd"),
])  # fmt: skip
def test_initializers_that_lie_elsewhere(key: str, value: str, families: Families, tmp_path: Path) -> None:
    out = edgeport.export(model=families("llama")[0], output=tmp_path / "out", to="onnx", quant="fp32").output
    model = onnx.load(out / "model.onnx", load_external_data=False)
    stored = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in stored.external_data if entry.key == key).value = value
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CorruptCheckpoint, match=rf"{re.escape(value)}.*; export it anew"):
        open_model(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": 2', "generation_config.json is not valid JSON"),
        ("[1]", "generation_config.json holds list"),
        ('{"eos_token_id": []}', "generation_config.json says eos_token_id [], where the number of a token was expected"),
        ('{"eos_token_id": "x"}', "eos_token_id 'x'"),
        ('{"eos_token_id": [2, null]}', "eos_token_id [2, None]"),
        ('{"bos_token_id": [1]}', "bos_token_id [1]"),
        ('{"pad_token_id": true}', "pad_token_id True"),
    ],
)
def test_a_spoilt_generation_config_is_refused_at_once(text: str, message: str, families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families("llama")[0], tmp_path / "base")
    (base / "generation_config.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=re.escape(message)):
        edgeport.plan(new_base=base, output=tmp_path / "out", to="onnx")


def test_the_tokens_that_end_a_text(families: Families, tmp_path: Path) -> None:
    base = shutil.copytree(families("llama")[0], tmp_path / "base")
    for at, (text, ends) in enumerate({'{"eos_token_id": [7, 2]}': [7, 2], '{"eos_token_id": null}': 2, "{}": 2}.items()):
        (base / "generation_config.json").write_text(text)
        out = edgeport.export(model=base, output=tmp_path / f"out{at}", to="onnx").output
        told = json.loads((out / "genai_config.json").read_text())["model"]
        assert (told["eos_token_id"], told["bos_token_id"], told["pad_token_id"]) == (ends, 1, 7 if at == 0 else 2)


def test_generation_through_onnxruntime_genai(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    base = tiny_llama(tied=True)
    edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant="fp32")
    prompt = tokens()[0, :9].tolist()
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    loaded = genai.Model(str(tmp_path / "out"))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=21, min_length=21)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == theirs[0].tolist()


# options, bits, and what half-precision activations may do to the logits of the file's own numbers
ON_CUDA: dict[str, tuple[dict[str, Any], int, float]] = {
    "fp16": ({"quant": "fp16"}, 0, 1e-2),
    "bf16": ({"quant": "bf16"}, 0, 5e-2),
    "int8": ({"quant": "int8"}, 8, 1e-2),
    "int4": ({"quant": "int4"}, 4, 1e-2),
    # in blocks of 16, since SmolLM's rows would be an odd number of others
    "int4, zero points": ({"quant": "int4", "asymmetric": True, "block_size": 16}, 4, 1e-2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ON_CUDA)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_on_cuda(name: str, precision: str, families: Families, tmp_path: Path) -> None:
    (folder, model), (options, bits, most) = families(name), ON_CUDA[precision]
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", execution_provider="cuda", **options)
    weights = stored_weights(tmp_path / "out", model, bits)
    assert error(found(tmp_path / "out", provider="cuda"), expected(model, weights)) < most


@pytest.mark.gpu
def test_a_batch_and_greedy_text_on_cuda(families: Families, tmp_path: Path) -> None:
    folder, model = families("mistral, window")
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp16", execution_provider="cuda")
    assert error(found(tmp_path / "out", batch=2, provider="cuda"), expected(model, batch=2)) < 1e-2
    runner = Runner(tmp_path / "out", provider="cuda")
    prompt = tokens()[0, :9].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(runner.generate(prompt, 6)) == theirs[0, 9:].tolist()


def test_the_runner_names_mistakes(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="a folder written with --to onnx was expected"):
        Runner(tiny_llama())
    edgeport.export(model=tmp_path / "base", output=tmp_path / "out", to="onnx", quant="fp32")
    with pytest.raises(UnknownName, match="no execution provider is called 'tpu'"):
        Runner(tmp_path / "out", provider="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ConvertError, match=r"no CUDAExecutionProvider.*onnx-gpu"):
            Runner(tmp_path / "out", provider="cuda")
    with pytest.raises(ConvertError, match="130 tokens are more than the 128"):
        Runner(tmp_path / "out").step([[5] * 130])
    (tmp_path / "out" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ConvertError, match=r"onnxruntime cannot load model\.onnx"):
        Runner(tmp_path / "out")
