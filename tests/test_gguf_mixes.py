"""The choice of types, and the bytes, against llama-quantize itself on small random models."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from converters.gguf.header import TYPES, read_header
from converters.gguf.mixes import ALIASES, FILE_TYPES, KEPT, KEPT_WHOLE, MIXES, Facts, choose, file_type
from edgeport.errors import BlockMismatch, ConvertError, DecodeOnly, EdgeportError, UnknownName
from edgeport.registry import codec_of

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-quantize is the oracle")


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Keeps llama.cpp from the terminal."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())


@dataclass(frozen=True)
class Model:
    """A model as llama-quantize sees it: only rows' lengths matter to it, so matrices have few rows."""

    layers: int = 4
    columns: int = 256
    inner: int = 512
    heads: int = 8
    groups: int = 8
    tied: bool = False
    arch: str = "llama"
    experts: int = 0
    fused: bool = False
    rows: int = 2
    more: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        return Facts(self.arch, self.layers, self.heads, self.groups, self.experts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.rows, self.columns
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (rows, columns), "output_norm.weight": (columns,)}
        if not self.tied:
            shapes["output.weight"] = (rows, columns)
        attention = ("qkv", "output") if self.fused else ("q", "k", "v", "output")
        stack = (self.experts,) if self.experts else ()
        suffix = "_exps" if self.experts else ""
        for layer in range(self.layers):
            blk = f"blk.{layer}."
            shapes |= {f"{blk}attn_{part}.weight": (rows, columns) for part in attention}
            shapes |= {f"{blk}attn_norm.weight": (columns,), f"{blk}attn_q.bias": (columns,)}
            shapes |= {f"{blk}ffn_{part}{suffix}.weight": (*stack, rows, columns) for part in ("gate", "up")}
            shapes[f"{blk}ffn_down{suffix}.weight"] = (*stack, rows, self.inner)
            if self.experts:
                shapes[f"{blk}ffn_gate_inp.weight"] = (self.experts, columns)
                shapes[f"{blk}ffn_down_shexp.weight"] = (rows, self.inner)
        return shapes | dict.fromkeys(self.more, (rows, columns))

    def write(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        writer = gguf.GGUFWriter(path, self.arch)
        writer.add_block_count(self.layers)
        writer.add_context_length(64)
        writer.add_embedding_length(self.columns)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.groups)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        if self.experts:
            writer.add_expert_count(self.experts)
            writer.add_expert_used_count(2)
        chance = np.random.default_rng(1)
        tensors = {
            name: (chance.standard_normal(shape, dtype=np.float32) * 0.02) for name, shape in self.shapes().items()
        }
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tensors


@contextmanager
def parameters(
    ftype: str,
    importance: Mapping[str, np.ndarray[Any, Any]] | None = None,
    tensor_types: tuple[tuple[str, str], ...] = (),
    output: str | None = None,
    embedding: str | None = None,
) -> Iterator[Any]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[ftype], 1
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    if tensor_types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))()
        for override, (pattern, kind) in zip(overrides, tensor_types, strict=False):
            override.pattern, override.type = pattern.encode(), TYPES[kind].id
        overrides[len(tensor_types)].type = 43
        params.tt_overrides = overrides
    if output:
        params.output_tensor_type = TYPES[output].id
    if embedding:
        params.token_embedding_type = TYPES[embedding].id
    yield params


def quantize(source: Path, ftype: str, **options: Any) -> dict[str, str] | None:
    """llama-quantize's types by tensor; None where it refuses. The output lies beside the source."""
    with parameters(ftype, **options) as params:
        target = source.with_suffix(".out.gguf")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
            return None
    return {name: tensor.dtype for name, tensor in read_header(target).tensors.items()}


def ours(model: Model, ftype: str, **options: Any) -> dict[str, str] | None:
    tensors = list(model.shapes().items())
    random.Random(0).shuffle(tensors)
    try:
        return choose(ftype, tensors, model.facts, **options)
    except ConvertError:
        return None


# every part of a name that keeps a matrix as it is, and names that only look like one
ODD_NAMES = (
    *(f"blk.1.x{part}" if part.endswith("weight") else f"blk.1.x{part}.weight" for part in KEPT),
    *KEPT_WHOLE,
    *("per_layer_token_embd.weight", "blk.0.attn_kv_b.weight", "blk.2.attn_qkv.weight", "blk.3.attn_k_b.weight"),
    *("blk.1.ffn_gate_inp_shexp.weight", "blk.1.token_types.weight", "weight", "blk.1.bias", "cls.output.weight"),
    *("blk.1.ssm_in.weight", "blk.1.attn_q_norm.weight", "rope_freqs.weight", "v.patch_embd.weight", "a.weights"),
)
MODELS = {
    **{f"{layers} layers": Model(layers=layers) for layers in (1, 2, 3, 7, 8, 16, 17, 26, 32, 33)},
    "tied": Model(tied=True),
    "grouped by 4": Model(layers=9, groups=2),
    "grouped by 3": Model(layers=9, heads=9, groups=3, tied=True),
    "one group": Model(layers=9, heads=8, groups=1),
    "columns of 64": Model(layers=9, columns=64, inner=96),
    "columns of 64, tied": Model(columns=64, inner=256, tied=True),
    "columns of 96": Model(layers=9, columns=96, inner=288, groups=2),
    "columns of 576": Model(layers=30, columns=576, inner=1536, heads=9, groups=3, tied=True),
    "columns of 72": Model(columns=72, inner=144),
    "columns of 72, tied": Model(columns=72, inner=256, tied=True),
    "inner 320": Model(layers=8, inner=320),
    "70B": Model(layers=80, inner=256, heads=64, groups=8),
    "65B": Model(layers=80, inner=256, heads=64, groups=64),
    "qwen2": Model(arch="qwen2", layers=9, heads=14, groups=2, tied=True),
    "qwen2 72B": Model(arch="qwen2", layers=80, inner=256, heads=8, groups=8),
    "gemma2": Model(arch="gemma2", layers=10, groups=4, tied=True),
    "falcon": Model(arch="falcon", layers=32, heads=8, groups=1, fused=True),
    "phi3": Model(arch="phi3", layers=16, fused=True),
    "8 experts": Model(experts=8, layers=16, groups=2, inner=256),
    "8 experts, 80 layers": Model(experts=8, layers=80, inner=256, groups=2, rows=1),
    "4 experts": Model(experts=4, layers=17, groups=2),
    "names of other families": Model(more=ODD_NAMES),
    "names of other families, tied": Model(more=ODD_NAMES, tied=True),
    "16 experts": Model(experts=16, layers=9, groups=2),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "imatrix"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if model.layers > 26 else []) for case, model in MODELS.items()]
)
def test_types_equal_llama_quantize(case: str, weighted: bool, tmp_path: Path) -> None:
    model = MODELS[case]
    tensors = model.write(tmp_path / "model.gguf")
    importance = None
    if weighted:
        importance = {
            name: np.ones(tensor.shape[-1] * (len(tensor) if tensor.ndim == 3 else 1), np.float32)
            for name, tensor in tensors.items()
            if tensor.ndim > 1
        }
    different = {}
    for ftype in MIXES:
        expected = quantize(tmp_path / "model.gguf", ftype, importance=importance)
        mine = ours(model, ftype, has_imatrix=weighted)
        if expected is None or mine is None:
            assert expected == mine == None, ftype  # noqa: E711
        elif expected != mine:
            different[ftype] = {name: (mine[name], expected[name]) for name in mine if mine[name] != expected[name]}
    assert not different


@pytest.mark.parametrize(
    "options",
    [
        {"output": "Q8_0"},
        {"embedding": "Q8_0"},
        {"output": "Q5_K", "embedding": "Q3_K"},
        {"output": "F16", "embedding": "BF16"},
        {"tensor_types": (("attn_v", "Q8_0"),)},
        {"tensor_types": ((r"blk\.[0-3]\.ffn_down", "Q8_0"), ("ffn_", "Q5_0"), (r"blk\.8\.ffn_down", "F16"))},
        {"tensor_types": ((r"blk\.(1|2|5)\.attn_v", "Q3_K"), ("token_embd", "Q2_K"), ("output", "Q4_0"))},
        {"tensor_types": (("token_embd", "Q2_K"),), "embedding": "Q5_1"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model",
    [Model(layers=10), Model(layers=10, tied=True), Model(layers=10, columns=64, inner=256), Model(layers=9, experts=4)],
    ids=["", "tied", "fallback", "experts"],
)
def test_overrides_equal_llama_quantize(options: dict[str, Any], model: Model, tmp_path: Path) -> None:
    model.write(tmp_path / "model.gguf")
    mine = {"tensor_types": "tensor_types", "output": "output_tensor_type", "embedding": "token_embedding_type"}
    if model.columns == 64 and options.get("embedding") == "Q3_K":
        # llama.cpp does not look at the columns then, and aborts; here the layout says what is wrong
        types = ours(model, "Q8_0", output_tensor_type="Q5_K", token_embedding_type="Q3_K") or {}
        with pytest.raises(BlockMismatch):
            codec_of("Q3_K").layout("w", (2, 64), types["token_embd.weight"])
        return
    for ftype in ("Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "Q8_0", "IQ4_XS", "Q5_K_M"):
        expected = quantize(tmp_path / "model.gguf", ftype, **options)
        assert expected is not None
        assert ours(model, ftype, **{mine[key]: value for key, value in options.items()}) == expected, ftype
    for ftype in ("F16", "F32"):
        if "tensor_types" not in options:
            expected = quantize(tmp_path / "model.gguf", ftype, **options)
            assert ours(model, ftype, **{mine[key]: value for key, value in options.items()}) == expected, ftype


@pytest.mark.parametrize("weighted", [False, True], ids=["", "imatrix"])
@pytest.mark.parametrize("ftype", [ftype for ftype in MIXES if ftype != "Q2_K_S"])
def test_bytes_equal_llama_quantize(ftype: str, weighted: bool, tmp_path: Path) -> None:
    model = Model(layers=9, rows=24, groups=2, columns=256, inner=352 if ftype == "Q4_K_M" else 768)
    path = tmp_path / "model.gguf"
    tensors = model.write(path)
    importance = None
    if weighted:
        chance = np.random.default_rng(2)
        importance = {
            name: chance.random(tensor.shape[-1], dtype=np.float32) ** 4
            for name, tensor in tensors.items()
            if tensor.ndim > 1 and name != "token_embd.weight"
        }
    types = quantize(path, ftype, importance=importance)
    assert types == ours(model, ftype, has_imatrix=weighted)
    header = read_header(path.with_suffix(".out.gguf"))
    content = path.with_suffix(".out.gguf").read_bytes()
    for name, tensor in tensors.items():
        codec = codec_of(types[name])
        given = importance.get(name) if importance else None
        weight = codec.layout(name, tensor.shape, types[name])
        weights = None if given is None else torch.from_numpy(given)
        stored = codec.encode(weight, torch.from_numpy(tensor.reshape(-1, tensor.shape[-1])), weights)["data"]
        where = header.tensors[name]
        assert stored.numpy().tobytes() == content[where.offset : where.offset + where.nbytes], name


def test_file_types_are_llama_cpps() -> None:
    assert set(FILE_TYPES) == set(MIXES)
    for name, number in FILE_TYPES.items():
        prefix = "LLAMA_FTYPE_ALL_" if name == "F32" else "LLAMA_FTYPE_MOSTLY_"
        assert getattr(llama_cpp, prefix + name) == number


def test_words() -> None:
    assert [file_type(word) for word in ("q4_k_m", "Q4_K", "q5_k", "Q3_K", "bf16")] == [
        "Q4_K_M", "Q4_K_M", "Q5_K_M", "Q3_K_M", "BF16",
    ]  # fmt: skip
    assert set(ALIASES.values()) <= set(MIXES)
    with pytest.raises(UnknownName, match=r"Q4_KM.*did you mean 'Q4_K_M'"):
        file_type("Q4_KM")


def test_facts_from_metadata(tmp_path: Path) -> None:
    model = MODELS["8 experts"]
    model.write(tmp_path / "model.gguf")
    assert Facts.of(read_header(tmp_path / "model.gguf").value) == model.facts
    values = {"general.architecture": "deci", "deci.block_count": 80, "deci.attention.head_count": [64, 0]}
    assert Facts.of(values.get) == Facts("deci", 80, 64, 64, 0)
    assert Facts.of(values.get).is_70b
    assert Facts("mamba", 2, 0, 0).gqa == 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tensor_types": [("attn_z", "Q8_0")]}, UnknownName, "'attn_z' is found in no name"),
        ({"tensor_types": [("attn_norm", "Q8_0")]}, UnknownName, "in no name of a tensor to be quantized"),
        ({"tensor_types": [("attn(", "Q8_0")]}, UnknownName, "no regular expression"),
        ({"tensor_types": [("attn", "Q9_0")]}, UnknownName, "no ggml type is called 'Q9_0'; did you mean"),
        ({"output_tensor_type": "iq2_xs"}, DecodeOnly, "IQ2_XS can be read and not written"),
        ({"token_embedding_type": "I32"}, DecodeOnly, "I32"),
    ],
)
def test_what_the_user_cannot_mean(options: dict[str, Any], kind: type[EdgeportError], message: str) -> None:
    model = Model()
    with pytest.raises(kind, match=message):
        choose("Q4_K_M", list(model.shapes().items()), model.facts, **options)


def test_the_case_of_words_does_not_matter() -> None:
    model = Model()
    types = choose("q8_0", list(model.shapes().items()), model.facts, tensor_types=[("ATTN_V", "f16")])
    assert types["blk.0.attn_v.weight"] == "F16" and types["blk.0.attn_k.weight"] == "Q8_0"


def test_an_override_counts_without_a_quantized_default() -> None:
    model = Model()
    types = choose("F16", list(model.shapes().items()), model.facts, tensor_types=[("ffn_down", "q8_0")])
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "F16"


def test_q2_k_s_needs_an_imatrix() -> None:
    model = Model()
    with pytest.raises(ConvertError, match=r"Q2_K_S needs an importance matrix \(--imatrix\)"):
        choose("Q2_K_S", list(model.shapes().items()), model.facts)
