"""Models, patches and outputs small enough to be made anew for every case, and the ways to spoil them.

A `Make` writes its files into a folder and returns what the user types.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typer.testing import CliRunner

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Make = Callable[[Path], list[str]]

HIDDEN, VOCABULARY, RANK = 32, 320, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_WEIGHT = f"{Q_PROJ}.weight"
LORA_A, LORA_B = f"base_model.model.{Q_PROJ}.lora_A.weight", f"base_model.model.{Q_PROJ}.lora_B.weight"
SHAPES = {
    EMBEDDING: (VOCABULARY, HIDDEN), HEAD: (VOCABULARY, HIDDEN),
    **{f"model.layers.0.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": (64, HIDDEN) for name in ("gate", "up")},
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, 64),
    "model.layers.0.input_layernorm.weight": (HIDDEN,), "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    NORM: (HIDDEN,),
}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32"}


# Good inputs, small enough to be made anew for every case.


def noise(shape: tuple[int, ...], seed: int) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(np.float32)


def spelled(header: Any, data: bytes) -> bytes:
    """A safetensors file of that header, whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parted(file: bytes) -> tuple[dict[str, Any], bytes]:
    stop = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:stop]), file[stop:]


def save(path: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": DTYPES[str(values.dtype)], "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    path.write_bytes(spelled(header, b"".join(values.tobytes() for values in tensors.values())))


def weights() -> dict[str, Array]:
    return {name: noise(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def model(folder: Path, name: str = "base", tensors: Tensors | None = None, **config: Any) -> Path:
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save(path / "model.safetensors", weights() if tensors is None else tensors)
    return path


def patch(folder: Path, tensors: Tensors | None = None, rank: int = RANK, **config: Any) -> Path:
    path = folder / "patch"
    path.mkdir()
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base"}
    (path / "adapter_config.json").write_text(json.dumps(facts | config))
    save(path / "adapter_model.safetensors", factors() if tensors is None else tensors)
    return path


def factors(inner: int = HIDDEN, outer: int = HIDDEN, rank: int = RANK, module: str = "self_attn.q_proj") -> dict[str, Array]:
    names = (name.replace("self_attn.q_proj", module) for name in (LORA_A, LORA_B))
    return dict(zip(names, (noise((rank, inner), 1), noise((outer, rank), 2)), strict=True))


def tokenizer(folder: Path, tokens: int) -> None:
    """A byte-level BPE without merges."""
    vocabulary = {"a": 0, "<s>": 1, "</s>": 2, "b": 3, "ab": 4} | {f"token{index}": index for index in range(5, tokens)}
    special = [{"id": vocabulary[text], "content": text, "special": True, "normalized": False, "single_word": False,
                "lstrip": False, "rstrip": False} for text in ("<s>", "</s>")]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {"version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": level, "post_processor": None,
               "decoder": level, "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))


def gguf(path: Path, arch: str = "llama", more: Mapping[str, tuple[str, Any]] = MappingProxyType({})) -> Path:
    from converters.gguf.header import serialize
    from converters.gguf.values import ValueType

    keys = {"general.architecture": ("STRING", arch), **more}
    settings = {key: (ValueType[kind], value) for key, (kind, value) in keys.items()}
    head, _, total = serialize(settings, [(name, (8, 32), "F32", 1024) for name in ("token_embd.weight", "output.weight")])
    path.write_bytes(head + bytes(total - len(head)))
    return path


# What the user types.


Place = Path | str | None


def port(folder: Path, base: Place = None, given: Place = None, *flags: str, to: str = "out") -> list[str]:
    base, given = base or model(folder), given or patch(folder)
    return ["port", "--patch", str(given), "--new-base", str(base), "-o", str(folder / to), "--no-progress", *flags]


def export(base: Path, output: Path, *flags: str) -> list[str]:
    return ["export", str(base), "-o", str(output), "--no-progress", *flags]


EXPERTS = {"model.layers.0.mlp.experts.down_proj": noise((2, HIDDEN, HIDDEN), 8)}


def extract(
    *flags: str, tuned: Callable[[], Tensors] = weights, old: Callable[[], Tensors] = weights, **config: Any
) -> Make:
    """An extraction of what a tuned model with other tensors has changed."""

    def make(folder: Path) -> list[str]:
        base, new = model(folder, tensors=old(), **config), model(folder, "tuned", tuned(), **config)
        return ["extract", "--old-base", str(base), "--tuned", str(new), "-o", str(folder / "out"), "--no-progress", *flags]

    return make


def tuned() -> dict[str, Array]:
    return {name: values + 0.1 * noise(values.shape, 9) for name, values in weights().items()}


def other() -> dict[str, Array]:
    """Tensors that have nothing in common with the base's."""
    return {name: noise(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items(), 100)}


def diagnose(folder: Path, old: Tensors | None = None) -> list[str]:
    before = model(folder, "old", old)
    return ["diagnose", "--patch", str(patch(folder)), "--new-base", str(model(folder)), "--old-base", str(before)]


def dense(folder: Path, tensors: Tensors, record: str | None = None) -> Path:
    """What `extract --full` writes."""
    path = empty(folder / "patch")
    save(path / "difference.safetensors", tensors)
    return path if record is None else with_text(path, "edgeport.json", record)


def stale(folder: Path, journal: str) -> list[str]:
    """A port to where another was interrupted."""
    (empty(folder / ".out.partial") / "model.safetensors").write_bytes(b"begun")
    (folder / ".out.journal").write_text(journal)
    return port(folder, None, None, "--resume")


def looped(folder: Path) -> list[str]:
    """A port to a link that leads to itself."""
    (folder / "out").symlink_to("out")
    return port(folder)


def dangling(folder: Path) -> list[str]:
    """An export to a link that leads to where nothing is, as on a disk that is not mounted."""
    base = model(folder)
    tokenizer(base, VOCABULARY)
    (folder / "out.gguf").symlink_to("elsewhere/out.gguf")
    return export(base, folder / "out.gguf", "--overwrite")


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    output: str
    error: str


def run(argv: Sequence[str]) -> Answer:
    """What the command line answers, in this process. An exception that is a bug of edgeport's passes through."""
    from edgeport.cli import app

    done = CliRunner().invoke(app, list(argv))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Answer(done.exit_code, done.stdout, done.stderr)


def written(folder: Path) -> Path:
    """A finished output, and only it."""
    done = run(port(folder))
    assert done.code == 0, done.error
    shutil.rmtree(folder / "base")
    shutil.rmtree(folder / "patch")
    return folder / "out"


# Cases that share a shape.


def with_model_file(content: Callable[[dict[str, Any], bytes], bytes]) -> Make:
    """A port onto a base whose safetensors file is what `content` makes of its header and data."""

    def make(folder: Path) -> list[str]:
        file = model(folder) / "model.safetensors"
        file.write_bytes(content(*parted(file.read_bytes())))
        return port(folder, file.parent)

    return make


def entry(header: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The header with other fields for the last tensor."""
    return header | {NORM: header[NORM] | fields}


def moved(header: dict[str, Any], by: int) -> dict[str, Any]:
    return entry(header, data_offsets=[place + by for place in header[NORM]["data_offsets"]])


def with_index(change: Callable[[dict[str, str]], Any]) -> Make:
    """A base of two shards with another weight_map, or another text for the whole index."""

    def make(folder: Path) -> list[str]:
        base = model(folder)
        (base / "model.safetensors").unlink()
        (folder / "evil.safetensors").write_bytes(b"")
        names = list(SHAPES)
        shards = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
        for shard, held in shards.items():
            save(base / shard, {name: values for name, values in weights().items() if name in held})
        found = change({name: shard for shard, held in shards.items() for name in held})
        text = found if isinstance(found, str) else json.dumps({"weight_map": found})
        (base / "model.safetensors.index.json").write_text(text)
        return port(folder, base)

    return make


def with_tokenizer(folder: Path, tokens: int = VOCABULARY, tensors: Tensors | None = None) -> Path:
    base = model(folder, tensors=tensors)
    tokenizer(base, tokens)
    return base


def with_config(text: str | None = None, **config: Any) -> Make:
    def make(folder: Path) -> list[str]:
        base = model(folder, **config)
        if text is not None:
            (base / "config.json").write_text(text)
        return port(folder, base)

    return make


def with_turned(method: str, tensors: Tensors = MappingProxyType({}), **lie: Any) -> Make:
    """A base whose q_proj is in GPTQ or AWQ, with some of its tensors, or of what config.json says of it, replaced."""

    def make(folder: Path) -> list[str]:
        ints = {"qweight": (HIDDEN // 8, HIDDEN) if method == "gptq" else (HIDDEN, HIDDEN // 8), "qzeros": (1, HIDDEN // 8)}
        layer: dict[str, Array] = {name: np.zeros(shape, np.int32) for name, shape in ints.items()}
        layer |= {"scales": np.ones((1, HIDDEN), np.float16), "g_idx": np.zeros(HIDDEN, np.int32)}
        if method == "awq":
            del layer["g_idx"]
        plain = {name: values for name, values in weights().items() if name != Q_WEIGHT}
        stored = {f"{Q_PROJ}.{name}": values for name, values in (layer | dict(tensors)).items()}
        told = {"quant_method": method, "bits": 4, "group_size": 32} | lie
        return port(folder, model(folder, tensors=plain | stored, quantization_config=told))

    return make


class Payload:
    """What a hostile pickle would do: write a file."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder / "executed")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.place, "w")


def with_bin(content: Callable[[Path], Any], zipped: bool) -> Make:
    """A base whose weights are a pickle."""

    def make(folder: Path) -> list[str]:
        import torch

        base = model(folder)
        (base / "model.safetensors").unlink()
        file = base / "pytorch_model.bin"
        if zipped:
            torch.save(content(folder), file)
        else:
            file.write_bytes(pickle.dumps(content(folder)))
        return port(folder, base)

    return make


def with_gguf(change: Callable[[bytes], bytes] = bytes, arch: str = "llama") -> Make:
    def make(folder: Path) -> list[str]:
        file = gguf(folder / "base.gguf", arch)
        file.write_bytes(change(file.read_bytes()))
        return export(file, folder / "out", "--to", "hf")

    return make


def put(data: bytes, at: int, value: int, size: int) -> bytes:
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def info(data: bytes) -> int:
    """Where the type and offset of the second tensor stand: after its name and two dimensions."""
    return data.index(b"output.weight") + len(b"output.weight") + 4 + 16


def with_patch(tensors: Callable[[], Tensors] = lambda: factors(), rank: int = RANK, **config: Any) -> Make:
    return lambda folder: port(folder, None, patch(folder, tensors(), rank, **config))


def with_base(tensors: Callable[[], Tensors], **config: Any) -> Make:
    return lambda folder: port(folder, model(folder, tensors=tensors(), **config))


def with_flags(*flags: str, to: str = "out") -> Make:
    return lambda folder: port(folder, None, None, *flags, to=to)


def to_gguf(*flags: str) -> Make:
    return with_flags("--to", "gguf", *flags, to="out.gguf")


def spoiled(name: str, value: float, at: Tensors) -> dict[str, Array]:
    """The tensors with one value replaced."""
    table = {key: values.copy() for key, values in at.items()}
    table[name].reshape(-1)[5] = value
    return table


def beside(name: str, content: str | None) -> Make:
    """A port to an output where a file, or a folder with a file in it, stands already."""

    def make(folder: Path) -> list[str]:
        if content is None:
            (folder / name).mkdir()
        place = folder / name / "thesis.txt" if content is None else folder / name
        place.write_text("mine")
        return port(folder, None, None, *(["--overwrite"] if content != "keep" else []))

    return make


def tampered(change: Callable[[Path], Any]) -> Make:
    def make(folder: Path) -> list[str]:
        change(written(folder))
        return ["verify", str(folder / "out")]

    return make


def changed_byte(output: Path) -> None:
    data = bytearray((output / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (output / "model.safetensors").write_bytes(data)


def with_old_base(name: str, shape: tuple[int, ...]) -> Make:
    """A patch with factors and a whole norm, and an old base of which one weight has another shape."""

    def make(folder: Path) -> list[str]:
        given = patch(folder, factors() | {f"base_model.model.{NORM}": noise((HIDDEN,), 3)}, modules_to_save=["norm"])
        old = model(folder, "old", weights() | {name: noise(shape, 4)})
        return port(folder, None, given, "--old-base", str(old))

    return make


def wrong_base(folder: Path) -> list[str]:
    given = patch(folder)
    (given / "edgeport.json").write_text(json.dumps({"base_fingerprint": "0" * 32}))
    return port(folder, None, given, "--old-base", str(model(folder, "old")))


def missing_split(folder: Path) -> list[str]:
    split = {"split.no": ("UINT16", 0), "split.count": ("UINT16", 2), "split.tensors.count": ("INT32", 4)}
    return export(gguf(folder / "base-00001-of-00002.gguf", more=split), folder / "out", "--to", "hf")


def of_gguf(*flags: str) -> Make:
    """An export of a GGUF of edgeport's to another."""

    def make(folder: Path) -> list[str]:
        done = run(export(with_tokenizer(folder), folder / "given.gguf"))
        assert done.code == 0, done.error
        return export(folder / "given.gguf", folder / "out.gguf", *flags)

    return make


def too_many_tokens(folder: Path) -> list[str]:
    return port(folder, with_tokenizer(folder, VOCABULARY + 1), None, "--to", "gguf", to="out.gguf")


def uneven_head(folder: Path) -> list[str]:
    base = with_tokenizer(folder, tensors=weights() | {HEAD: noise((VOCABULARY - 20, HIDDEN), 5)})
    return port(folder, base, None, "--to", "gguf", to="out.gguf")


def other_architecture(folder: Path) -> list[str]:
    base = model(folder, architectures=["MambaForCausalLM"], model_type="mamba")
    return port(folder, base, None, "--to", "gguf", to="out.gguf")


def to_onnx(*flags: str, tensors: Callable[[], Tensors] = weights, **config: Any) -> Make:
    """An export to ONNX of the model with other settings or tensors; its heads have 16 numbers."""
    facts = {"num_attention_heads": 2, "num_key_value_heads": 2} | config
    return lambda folder: export(model(folder, tensors=tensors(), **facts), folder / "out", "--to", "onnx", *flags)


def of_onnx(change: Callable[[Path], object]) -> Make:
    """An export of an ONNX folder of edgeport's to which something was done."""

    def make(folder: Path) -> list[str]:
        done = run(to_onnx()(folder))
        assert done.code == 0, done.error
        (folder / "out").rename(folder / "given")
        change(folder / "given")
        return export(folder / "given", folder / "out", "--to", "hf")

    return make


def another_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    with_text(folder, "config.json", json.dumps(config | settings))


def foreign_onnx(folder: Path) -> None:
    from onnx import helper, save

    save(helper.make_model(helper.make_graph([], "empty", [], [])), folder / "model.onnx")


def gguf_over_a_folder(folder: Path) -> list[str]:
    return port(folder, with_tokenizer(folder), None, "--overwrite", "--to", "gguf", to=empty(folder / "out.gguf").name)


def f16_overflow(folder: Path) -> list[str]:
    return port(folder, None, patch(folder, {name: values * 3e4 for name, values in factors().items()}), "--quant", "f16")


def not_finite(folder: Path) -> list[str]:
    return export(model(folder, tensors=spoiled(HEAD, np.nan, weights())), folder / "out", "--to", "hf", "--quant", "bf16")


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def with_text(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


def retyped(folder: Path, dtype: str) -> Path:
    file = folder / "adapter_model.safetensors"
    header, data = parted(file.read_bytes())
    file.write_bytes(spelled({name: fields | {"dtype": dtype} for name, fields in header.items()}, data))
    return folder


def renamed(output: Path, name: str) -> None:
    manifest = json.loads((output / "edgeport.json").read_text())
    manifest["files"][name] = manifest["files"].pop("config.json")
    (output / "edgeport.json").write_text(json.dumps(manifest))
