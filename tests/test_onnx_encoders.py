"""Encoders: hf to hf and to ONNX, patched and not, against transformers and PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401 - once it is loaded, graphs are traced in this process, which is the quicker way for many
import pytest
import torch
import transformers
from onnx import numpy_helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import edgeport
from bench.bad_input import run
from edgeport.encoders import ENCODERS, encoder
from edgeport.errors import (
    BlockMismatch,
    ConvertError,
    CorruptCheckpoint,
    MissingTensor,
    UnmappedTensor,
    UnsupportedArchitecture,
    VerificationFailed,
)
from tests.conftest import saved_once
from tests.onnx_oracle import unpacked

TEXT = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "max_position_embeddings": 66, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IMAGE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8}  # fmt: skip
WHISPER = {"vocab_size": 320, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
           "max_source_positions": 50, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1, "classifier_proj_size": 32}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("bert", TEXT), "BertForSequenceClassification": ("bert", TEXT), "BertForMaskedLM": ("bert", TEXT),
    "ViTModel": ("vit", IMAGE), "ViTForImageClassification": ("vit", IMAGE),
    "WhisperForConditionalGeneration": ("whisper", WHISPER), "WhisperForAudioClassification": ("whisper", WHISPER),
    "AlbertModel": ("albert", TEXT | {"embedding_size": 32}), "CamembertModel": ("camembert", TEXT),
    "DebertaV2Model": ("deberta-v2", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}),
    "DistilBertModel": ("distilbert", {"vocab_size": 320, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}),
    "ElectraModel": ("electra", TEXT | {"embedding_size": 32}),
    "ModernBertModel": ("modernbert", TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    "MPNetModel": ("mpnet", TEXT), "RobertaForTokenClassification": ("roberta", TEXT), "XLMRobertaModel": ("xlm-roberta", TEXT),
    "BeitModel": ("beit", IMAGE | {"use_relative_position_bias": True}),
    "DeiTModel": ("deit", IMAGE), "Dinov2Model": ("dinov2", IMAGE | {"mlp_ratio": 2}),
}  # fmt: skip
# BEiT's code keeps an index in a cache, where a trace must not leave one without numbers
QUICK = ("BeitModel", "BertForMaskedLM", "ViTForImageClassification", "WhisperForConditionalGeneration")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]

Encoders = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    """A function from a class's name to a random model of it, and the folder it is saved in."""
    return saved_once(tmp_path_factory.mktemp("encoders"), build)


def build(name: str) -> Any:
    kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings)).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data + torch.randn_like(parameter) * 0.1
    return model


def expected(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' outputs; of a model with a decoder, the encoder's."""
    with torch.no_grad():
        made = (model.get_encoder() if hasattr(model, "proj_out") else model)(**given)
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def found(output: Path, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(output / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in given.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest, as a share of the output's largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def example(folder: Path, batch: int = 3, length: int = 13) -> dict[str, torch.Tensor]:
    known = encoder(json.loads((folder / "config.json").read_text()))
    assert known
    return known.example({"batch": batch, "length": length})


def test_every_family_of_the_table_is_tested() -> None:
    assert {kind for kind, _ in MODELS.values()} == set(ENCODERS)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name: str, encoders: Encoders, tmp_path: Path) -> None:
    folder, model = encoders(name)
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant="fp32")
    given = example(folder)
    assert error(found(tmp_path / "out", given), expected(model, given)) < 2e-6
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)


# float32's rounding, but where products round activations to 8 bits
ROUNDED = [("int4", 0.02), *(pytest.param(quant, most, marks=pytest.mark.slow)
                             for quant, most in (("fp16", 2e-6), ("bf16", 2e-6), ("int8", 0.02)))]  # fmt: skip


@pytest.mark.parametrize(("quant", "most"), ROUNDED)
def test_outputs_are_those_of_the_stored_numbers(quant: str, most: float, encoders: Encoders, tmp_path: Path) -> None:
    folder, model = encoders("BertForMaskedLM")
    receipt = edgeport.export(model=folder, output=tmp_path / "out", to="onnx", quant=quant)
    formats = {fact.weight: fact.stored for fact in receipt.facts}
    matrix = {"fp16": "F16", "bf16": "BF16", "int8": "NBITS8", "int4": "NBITS4"}[quant]
    query = "bert.encoder.layer.0.attention.self.query"
    assert formats[f"{query}.weight"] == formats["bert.embeddings.word_embeddings.weight"] == matrix
    assert formats[f"{query}.bias"] == "F32"
    rounded = decoded(tmp_path / "out", bits=int(quant.removeprefix("int")) if "int" in quant else 0)
    assert rounded.keys() == load_file(folder / "model.safetensors").keys()
    given = example(folder)
    twin = deepcopy(model)
    twin.load_state_dict(rounded, strict=False)  # the tied head has no numbers of its own
    assert error(found(tmp_path / "out", given), expected(twin, given)) < most
    assert error(found(tmp_path / "out", given), expected(model, given)) > 1e-4


APART = """
import sys, edgeport
edgeport.export(model=sys.argv[1], output=sys.argv[2], to="onnx", quant="int8")
# what the exporter takes stays out of the process that streams
assert not {"transformers", "onnxscript"} & sys.modules.keys()
"""


def decoded(output: Path, bits: int) -> dict[str, torch.Tensor]:
    """What the file holds, by onnx's own reader, and unpacked in plain numpy."""
    arrays = {}
    for tensor in onnx.load(output / "model.onnx").graph.initializer:
        arrays[tensor.name] = numpy_helper.to_array(tensor)
    weights = {}
    for name, values in arrays.items():
        bare = name.removesuffix(".rows")
        if f"{bare}.scales" in arrays:
            values = unpacked(values, arrays[f"{bare}.scales"], None, bits, signed=False)
        if not bare.endswith((".scales", "position_ids")):
            weights[bare] = torch.from_numpy(np.array(values, np.float32))
    return weights


TARGETS = {
    "BertForSequenceClassification": (["query", "value", "dense"], ["classifier"]),
    "ViTForImageClassification": (["q_proj", "v_proj", "o_proj", "fc1", "fc2"], ["classifier"]),
    "WhisperForConditionalGeneration": (r".*\.encoder\..*\.(q_proj|v_proj|out_proj|fc1|fc2)", None),
}


def lora(name: str, folder: Path) -> Any:
    """A patch on a random model, saved in `folder`; PEFT's own merge of it."""
    targets, saved = TARGETS[name]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=saved, bias="all" if saved else "lora_only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tuned = get_peft_model(build(name), config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(folder)
    return tuned.merge_and_unload().eval()


@pytest.mark.parametrize("name", TARGETS)
def test_a_ported_patch_is_what_peft_merges(name: str, encoders: Encoders, tmp_path: Path) -> None:
    folder, model = encoders(name)
    merged = lora(name, tmp_path / "patch")
    edgeport.port(patch=tmp_path / "patch", new_base=folder, output=tmp_path / "hf")
    merged.save_pretrained(tmp_path / "merged")
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("hf", "merged"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-6
    receipt = edgeport.port(patch=tmp_path / "patch", new_base=folder, output=tmp_path / "onnx", to="onnx")
    left = "weights that the graph does not compute with are left out (model.decoder."
    assert any(left in note for note in receipt.notes) == ("Whisper" in name)
    given = example(folder)
    assert error(found(tmp_path / "onnx", given), expected(merged, given)) < 2e-6
    assert error(found(tmp_path / "onnx", given), expected(model, given)) > 1e-2
    # the reference runs in blocks, by transformers' code
    assert edgeport.liken(tmp_path / "onnx", tmp_path / "merged").distance < 2e-6
    assert edgeport.liken(tmp_path / "onnx", folder).distance > 1e-2


def test_a_patch_on_what_the_graph_leaves_out_is_refused(encoders: Encoders, tmp_path: Path) -> None:
    tuned = get_peft_model(build("WhisperForConditionalGeneration"), LoraConfig(target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "patch")
    base = encoders("WhisperForConditionalGeneration")[0]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UnmappedTensor, match=r"the patch changes model\.decoder\.layers\.0\..*does not compute with"):
        edgeport.port(patch=tmp_path / "patch", new_base=base, output=tmp_path / "out", to="onnx")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_reads_back_and_is_the_same_every_time(encoders: Encoders, tmp_path: Path) -> None:
    """Traced in a process of its own, and in this one."""
    folder = encoders("BertForMaskedLM")[0]
    edgeport.export(model=folder, output=tmp_path / "one", to="onnx", quant="int8")
    subprocess.run([sys.executable, "-c", APART, folder, tmp_path / "two"], check=True, capture_output=True)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert str(Path(transformers.__file__).parent).encode() not in (tmp_path / "one" / "model.onnx").read_bytes()
    assert not (tmp_path / "one" / "genai_config.json").exists()
    edgeport.verify(tmp_path / "two")
    edgeport.export(model=tmp_path / "two", output=tmp_path / "back", to="hf", quant="f32")
    back, rounded = load_file(tmp_path / "back" / "model.safetensors"), decoded(tmp_path / "one", 8)
    assert back.keys() == rounded.keys()
    assert all(torch.equal(back[name], rounded[name]) for name in back)
    told = run(["verify", str(tmp_path / "two"), "--against", str(folder)])
    assert told.code == 0 and "logits 0.0" in told.output
    told = run(["verify", str(tmp_path / "two"), "--against", str(folder), "--max-kl", "0.1"])
    assert told.code == 2 and "leave off --max-kl" in told.error


def test_verify_fails_where_the_outputs_are_others(encoders: Encoders, tmp_path: Path) -> None:
    folder = encoders("ViTForImageClassification")[0]
    edgeport.export(model=folder, output=tmp_path / "out", to="onnx")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    weights["vit.encoder.layer.0.attention.output.dense.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    told = run(["verify", str(tmp_path / "out"), "--against", str(other)])
    assert told.code == 1 and "the largest error" in told.error and "above the tolerance of its precision" in told.error


def test_other_inputs_are_not_compared(encoders: Encoders, tmp_path: Path) -> None:
    text, picture = (encoders(name)[0] for name in ("BertModel", "ViTForImageClassification"))
    wider = changed(picture, tmp_path / "wider", image_size=64)
    smaller = changed(text, tmp_path / "smaller", vocab_size=200)
    for one, other in ((text, picture), (picture, wider), (text, smaller)):
        with pytest.raises(VerificationFailed, match="only the same inputs are compared"):
            edgeport.liken(one, other)


def test_a_config_that_transformers_refuses(encoders: Encoders, tmp_path: Path) -> None:
    base = encoders("BertModel")[0]
    spoilt = (("a", {"hidden_size": "64"}, "Strict.*hidden_size"), ("b", {"hidden_act": "poem"}, "KeyError: 'poem'"))
    for place, setting, says in spoilt:
        with pytest.raises(UnsupportedArchitecture, match=says):
            edgeport.liken(base, changed(base, tmp_path / place, **setting))


def test_pictures_of_another_size_than_the_processor_makes(encoders: Encoders, tmp_path: Path) -> None:
    base = changed(encoders("Dinov2Model")[0], tmp_path / "base")
    for told, says in (
        ({"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}}, True),
        ({"do_center_crop": True, "crop_size": 32, "size": {"shortest_edge": 36}}, False),
        ({"do_center_crop": False, "size": {"height": 24, "width": 32}}, True), ({"size": {"shortest_edge": 36}}, False),
        ({"size": 32}, False), ([], False),
    ):  # fmt: skip
        (base / "preprocessor_config.json").write_text(json.dumps(told))
        notes = edgeport.plan(new_base=base, output=tmp_path / "out", to="onnx").notes
        assert any("the graph takes pictures of 32 x 32, config.json's image_size" in note for note in notes) == says


def changed(folder: Path, place: Path, **settings: Any) -> Path:
    """The same model under another config.json."""
    place.mkdir()
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | settings))
    return place


def test_bad_input_is_refused_before_a_byte_is_written(encoders: Encoders, tmp_path: Path) -> None:
    base = encoders("BertForMaskedLM")[0]
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (changed(base, tmp_path / "a", architectures=["T5Model"], model_type="t5"), {}, UnsupportedArchitecture,
         r"no ONNX graph for T5Model; supported: LlamaForCausalLM.*encoders of type albert, bert, .*whisper"),
        (changed(base, tmp_path / "b", is_decoder=True), {}, UnsupportedArchitecture, "is_decoder is set"),
        (changed(base, tmp_path / "c", architectures=["BertForPoetry"]), {}, UnsupportedArchitecture,
         "no model class BertForPoetry"),
        (changed(base, tmp_path / "f", architectures=["BertForMultipleChoice"]), {}, UnsupportedArchitecture,
         "torch cannot trace BertForMultipleChoice: shape"),
        (changed(base, tmp_path / "d", num_hidden_layers=2), {}, MissingTensor,
         r"lacks bert\.encoder\.layer\.1\..* and \d+ more"),
        (changed(base, tmp_path / "e", intermediate_size=96), {}, CorruptCheckpoint,
         r"shape \[128, 64\] where config.json says \[96, 64\]"),
        (base, {"quant": "int4", "block_size": 128}, BlockMismatch, "give --block-size 16 or 32 or 64"),
        (base, {"execution_provider": "cuda", "quant": "fp16"}, ConvertError, "leave off --execution-provider"),
        (base, {"quant": "int4", "imatrix": tmp_path / "a" / "config.json"}, ConvertError, "leave off --imatrix"),
        (base, {"quant": "int4", "portable": True}, ConvertError, "give --quant fp16 with --portable"),
        (base, {"quant": "int4", "token_embedding_type": "int8"}, ConvertError, "give --output-tensor-type int8 for both"),
        (encoders("BertModel")[0], {"output_tensor_type": "int4"}, ConvertError, "leave off --output-tensor-type"),
        (encoders("ViTForImageClassification")[0], {"token_embedding_type": "int8"}, ConvertError,
         "leave off --token-embedding-type"),
    ]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for folder, options, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            edgeport.export(model=folder, output=tmp_path / "out", to="onnx", **options)
        assert sorted(tmp_path.iterdir()) == before
