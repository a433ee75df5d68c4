"""What an ONNX output holds and says of itself, what it may be made of, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edgeport
from bench.bad_input import run
from converters.onnx.installed import unknown
from converters.onnx.precisions import PRECISIONS
from edgeport.blocks import decode_rows
from edgeport.errors import ConvertError, CorruptCheckpoint, EdgeportError
from edgeport.locate import open_model
from edgeport.runtime import Runner, check_version
from edgeport.tensor import EMBEDDING, HEAD, Weight
from tests.onnx_oracle import LLAMA3, Families, error, expected, found, stored_weights, tokens

if TYPE_CHECKING:
    from tests.conftest import TinyLlama

MakeLora = Callable[..., Path]


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


@pytest.mark.parametrize("quant", PRECISIONS)
def test_each_precision_explains_so_much_and_no_more(quant: str, tiny_llama: TinyLlama, tmp_path: Path) -> None:
    base, other = tiny_llama(), tiny_llama("other", seed=1)
    for folder in (base, other):  # so that they say something else of the next token
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] * 100}, folder / "model.safetensors", {"format": "pt"})
    output = edgeport.export(model=base, output=tmp_path / "out", to="onnx", quant=quant).output
    right, wrong = (run(["verify", str(output), "--against", str(one), "--tokens", "100", "--json"]) for one in (base, other))
    assert right.code == 0 and json.loads(right.output)["against"]["tolerance"] == PRECISIONS[quant].tolerance
    assert wrong.code == 1 and "above the tolerance of its precision" in wrong.error


def test_an_onnxruntime_that_computes_wrong_is_refused(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, refusal = tiny_llama(), r"onnxruntime 1\.26\.0.* computes some .* install 1\.27 or newer.* --portable"
    for version in ("1.27.0", "1.31.1", "1.27.0.dev20260101", "2.0.0"):
        check_version(version)
    fused = edgeport.export(model=base, output=tmp_path / "fused", to="onnx").output
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    with pytest.raises(ConvertError, match=refusal):
        edgeport.plan(new_base=base, output=tmp_path / "out", to="onnx")
    with pytest.raises(ConvertError, match=refusal):
        Runner(fused)
    Runner(edgeport.export(model=base, output=tmp_path / "out", to="onnx", portable=True).output)


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
