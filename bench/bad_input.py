"""Every bad input that edgeport knows to refuse, and what it answers: `python -m bench.bad_input` prints the table.

Each case makes its files in a folder (see `spoiling`) and returns what the user types; `tests/test_bad_input.py` runs the
same table.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import tempfile
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from bench.spoiling import (
    EXPERTS,
    HIDDEN,
    LORA_A,
    LORA_B,
    NORM,
    Q_PROJ,
    Q_WEIGHT,
    Make,
    Payload,
    another_config,
    beside,
    changed_byte,
    dangling,
    dense,
    diagnose,
    empty,
    entry,
    extract,
    f16_overflow,
    factors,
    foreign_onnx,
    gguf_over_a_folder,
    info,
    looped,
    missing_split,
    model,
    moved,
    noise,
    not_finite,
    of_gguf,
    of_onnx,
    other,
    other_architecture,
    patch,
    port,
    put,
    renamed,
    retyped,
    run,
    spelled,
    spoiled,
    stale,
    tampered,
    to_gguf,
    to_onnx,
    too_many_tokens,
    tuned,
    uneven_head,
    weights,
    with_base,
    with_bin,
    with_config,
    with_flags,
    with_gguf,
    with_index,
    with_model_file,
    with_old_base,
    with_patch,
    with_text,
    with_tokenizer,
    with_turned,
    without,
    wrong_base,
)

HERE = AbstractContextManager[Any]
Usage = namedtuple("Usage", "total used free")


def small_disk() -> HERE:
    return mock.patch("shutil.disk_usage", return_value=Usage(1 << 20, 0, 1 << 20))


def full_disk() -> HERE:
    return mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def small_files() -> HERE:
    return mock.patch("os.truncate", side_effect=OSError(errno.EFBIG, os.strerror(errno.EFBIG)))


def no_memory() -> HERE:
    def too_much(*_: object) -> None:
        import torch

        torch.empty(1 << 60, dtype=torch.uint8)

    return mock.patch("edgeport.run.edit", side_effect=too_much)


def no_thread() -> HERE:
    return mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread"))


def read_only() -> HERE:
    # root may write anywhere, so a folder's mode bits would prove nothing
    return mock.patch("os.mkdir", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS), "/read-only/.out.partial"))


@dataclass(frozen=True, slots=True)
class Case:
    """What to type, part of the sentence that answers, the exit code, and the world in which it happens."""

    make: Make
    says: str
    code: int = 1
    world: Callable[[], HERE] = nullcontext


CASES: dict[str, Case] = {
    # safetensors
    "safetensors, empty file": Case(with_model_file(lambda h, d: b""), "0 bytes, too few"),
    "safetensors, truncated in the header": Case(with_model_file(lambda h, d: spelled(h, d)[:60]), "declares a header of"),
    "safetensors, truncated in the data": Case(with_model_file(lambda h, d: spelled(h, d)[:-7]), "the file is truncated"),
    "safetensors, header length too short": Case(with_model_file(lambda h, d: put(spelled(h, d), 0, 30, 8)), "not valid JSON"),
    "safetensors, header length past the end": Case(
        with_model_file(lambda h, d: put(spelled(h, d), 0, 1 << 30, 8)), "declares a header of"),
    "safetensors, huge header length": Case(
        with_model_file(lambda h, d: b"\xff" * 8 + d), "declares a header of 18446744073709551615"),
    "safetensors, header is not JSON": Case(with_model_file(lambda h, d: spelled(b"{nonsense", d)), "not valid JSON"),
    "safetensors, header is not UTF-8": Case(with_model_file(lambda h, d: spelled(b'{"\xff\xfe": 1}', d)), "not valid JSON"),
    "safetensors, header nests too deep": Case(with_model_file(lambda h, d: spelled(b"[" * 200_000, d)), "not valid JSON"),
    "safetensors, header is a list": Case(with_model_file(lambda h, d: spelled([1], d)), "not a JSON object"),
    "safetensors, a key twice": Case(with_model_file(lambda h, d: spelled(b'{"a": 1, "a": 2}', d)), "a key stands twice"),
    "safetensors, half a character in a name": Case(
        with_model_file(lambda h, d: spelled(json.dumps({"\ud800" + name: one for name, one in h.items()}).encode(), d)),
        "names a tensor '\\ud800"),
    "safetensors, an entry without shape": Case(
        with_model_file(lambda h, d: spelled(h | {NORM: {"dtype": "F32"}}, d)), "lacks dtype, data_offsets"),
    "safetensors, overlapping offsets": Case(with_model_file(lambda h, d: spelled(moved(h, -64), d)), "overlap or leave a hole"),
    "safetensors, a hole": Case(with_model_file(lambda h, d: spelled(moved(h, 64), d + bytes(64))), "overlap or leave a hole"),
    "safetensors, bytes left over": Case(with_model_file(lambda h, d: spelled(h, d + bytes(64))), "its header accounts for"),
    "safetensors, offsets outside of the file": Case(
        with_model_file(lambda h, d: spelled(moved(h, 1 << 40), d)), "the file is truncated or"),
    "safetensors, offsets backwards": Case(
        with_model_file(lambda h, d: spelled(entry(h, data_offsets=[64, 0]), d)), "its header is wrong"),
    "safetensors, absurd shape": Case(
        with_model_file(lambda h, d: spelled(entry(h, shape=[1 << 62, 1 << 62]), d)), "impossible shape"),
    "safetensors, a shape that overflows": Case(
        with_model_file(lambda h, d: spelled(entry(h, shape=[1 << 32, 1 << 32]), d)), "takes 73786976294838206464"),
    "safetensors, negative shape": Case(with_model_file(lambda h, d: spelled(entry(h, shape=[-32]), d)), "impossible shape"),
    "safetensors, unknown dtype": Case(with_model_file(lambda h, d: spelled(entry(h, dtype="F4"), d)), "unknown dtype 'F4'"),
    "safetensors, shape and bytes differ": Case(
        with_model_file(lambda h, d: spelled(entry(h, shape=[31]), d)), "F32 [31] takes 124"),
    # the folder
    "index, a shard outside of the folder": Case(
        with_index(lambda m: m | {NORM: "../evil.safetensors"}), "not a file of the same folder"),
    "index, an absolute path": Case(with_index(lambda m: m | {NORM: "/etc/passwd"}), "not a file of the same folder"),
    "index, a shard that is missing": Case(with_index(lambda m: m | {NORM: "model-3.safetensors"}), "which is missing"),
    "index, a tensor in no shard": Case(
        with_index(lambda m: m | {"model.extra": "model-1.safetensors"}), "in no shard (model.extra)"),
    "index, one shard that lacks a tensor": Case(with_index(lambda m: dict.fromkeys(m, "model-1.safetensors")), "in no shard"),
    "index, not JSON": Case(with_index(lambda m: "{"), "not valid JSON"),
    "index, no weight_map": Case(with_index(lambda m: "{}"), "has no weight_map"),
    "config.json missing": Case(lambda f: port(f, without(model(f), "config.json")), "is not a model that edgeport reads"),
    "config.json, not JSON": Case(with_config("{'a': 1}"), "config.json is not valid JSON"),
    "config.json, a list": Case(with_config("[]"), "where a JSON object was expected"),
    "config.json, a size that is a word": Case(
        with_config(hidden_size="wide"), "has the hidden_size 'wide' where a number was expected"),
    "config.json, a list as the model_type": Case(
        with_config(model_type=["llama"]), "the model_type ['llama'] where a word was expected"),
    "config.json, a number among the architectures": Case(
        with_config(architectures=[3]), "the architectures [3] where a list of words was expected"),
    "config.json, a list of words as a size": Case(
        with_config(num_attention_heads=["one"], model_type="segformer"), "the num_attention_heads ['one'] where a number"),
    "config.json, quantized by the short word, and no tensor is": Case(
        with_config(quantization_config={"load_in_4bit": True}), "is quantized (bitsandbytes), and no weight of it is"),
    "config.json, quantized": Case(with_config(quantization_config={"quant_method": "aqlm"}), "is quantized (aqlm)"),
    "config.json, quantized, and no tensor is": Case(
        with_config(quantization_config={"quant_method": "gptq", "bits": 4}), "and no weight of it is"),
    **{f"{name}, bits that are not read": Case(with_turned(name, bits=5), f"says 5 bits, {word}")
       for name, word in (("gptq", "format 'gptq'"), ("awq", "version 'gemm'"))},
    **{f"{name}, group size 0": Case(with_turned(name, group_size=0), "says group_size 0") for name in ("gptq", "awq")},
    **{f"{name}, another group size than the tensors": Case(
        with_turned(name, group_size=16), "q_proj.qzeros is I32 [1, 4], where [32, 32] in") for name in ("gptq", "awq")},
    **{f"{name}, scales of another shape": Case(
        with_turned(name, {"scales": np.ones((1, 31), np.float16)}), "scales is F16 [1, 31]") for name in ("gptq", "awq")},
    **{f"{name}, scales of another type": Case(
        with_turned(name, {"scales": np.ones((1, 32), np.int32)}), "scales in one of F16, BF16") for name in ("gptq", "awq")},
    "gptq, another layout": Case(with_turned("gptq", checkpoint_format="gptq_p"), "format 'gptq_p'"),
    "gptq, a list as the layout": Case(with_turned("gptq", checkpoint_format=["gptq"]), "format ['gptq']"),
    "gptq, an absurd group size": Case(with_turned("gptq", group_size=10**29), f"says group_size {10**29}"),
    "gptq, g_idx out of range": Case(
        with_turned("gptq", {"g_idx": np.full(HIDDEN, 7, np.int32)}), "g_idx names group 7, and there are 1"),
    "compressed-tensors, no config_groups": Case(
        with_config(quantization_config={"quant_method": "compressed-tensors"}), "has no config_groups"),
    "compressed-tensors, a list as the type": Case(
        with_config(quantization_config={
            "quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"type": ["int"], "num_bits": 4}}}}),
        "is ['int'] of 4 bits"),
    "compressed-tensors, another scheme": Case(
        with_config(quantization_config={
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 4, "group_size": 16}}}}),
        "is float of 4 bits by group, nvfp4-pack-quantized"),
    "awq, another layout": Case(with_turned("awq", version="gemv_fast"), "version 'gemv_fast'"),
    "config.json, quantization_config without a method": Case(with_config(quantization_config=[1]), "quantization_config"),
    "the file of the weights in place of the folder": Case(
        lambda f: port(f, model(f) / "model.safetensors"), "(gguf, hf, onnx); give the folder"),
    "weights missing": Case(lambda f: port(f, without(model(f), "model.safetensors")), "holds none of model.safetensors"),
    ".bin, a pickle that runs code, zipped": Case(with_bin(lambda f: {"a": Payload(f)}, zipped=True), "holds more than tensors"),
    ".bin, a pickle that runs code, bare": Case(with_bin(lambda f: {"a": Payload(f)}, zipped=False), "is not a zip file"),
    ".bin, a list instead of a table": Case(
        with_bin(lambda f: [1, 2], zipped=True), "list where a table of tensors was expected"),
    ".bin, a number among the tensors": Case(with_bin(lambda f: {"a": 3}, zipped=True), "'a' is a int where a tensor"),
    ".bin, a number as a name": Case(with_bin(lambda f: {3: "a"}, zipped=True), "3 is a str where a tensor by name"),
    # GGUF
    "GGUF, truncated": Case(with_gguf(lambda d: d[:-400]), "it is cut short"),
    "GGUF, truncated in the header": Case(with_gguf(lambda d: d[:90]), "the file ends"),
    "GGUF, bad magic": Case(with_gguf(lambda d: b"GGUX" + d[4:]), "starts with b'GGUF'"),
    "GGUF, empty file": Case(with_gguf(lambda d: b""), "at least 24 bytes"),
    "GGUF, absurd count of tensors": Case(with_gguf(lambda d: put(d, 8, 1 << 62, 8)), "tensors are promised"),
    "GGUF, absurd count of keys": Case(with_gguf(lambda d: put(d, 16, 1 << 62, 8)), "keys and"),
    "GGUF, unknown version": Case(with_gguf(lambda d: put(d, 4, 9, 4)), "version 9 came"),
    "GGUF, big-endian": Case(with_gguf(lambda d: put(d, 4, 3 << 24, 4)), "big-endian GGUF is not supported"),
    "GGUF, overlapping tensors": Case(with_gguf(lambda d: put(d, info(d) + 4, 0, 8)), "overlap at byte"),
    "GGUF, a tensor outside of the file": Case(with_gguf(lambda d: put(d, info(d) + 4, 1 << 40, 8)), "it is cut short"),
    "GGUF, unknown ggml type": Case(with_gguf(lambda d: put(d, info(d), 999, 4)), "ggml type 999"),
    "GGUF, absurd shape": Case(with_gguf(lambda d: put(d, info(d) - 16, 1 << 62, 8)), "impossible shape"),
    "GGUF, unknown architecture": Case(with_gguf(arch="mamba9"), "architecture 'mamba9'"),
    "GGUF, no settings": Case(with_gguf(), "metadata does not give"),
    "GGUF, one of two files missing": Case(missing_split, "base-00002-of-00002.gguf is missing"),
    # the patch
    "patch, not a folder of a patch": Case(lambda f: port(f, None, empty(f / "empty")), "is not a patch that edgeport reads"),
    "patch, config without tensors": Case(
        lambda f: port(f, None, without(patch(f), "adapter_model.safetensors")), "none of adapter_model"),
    "patch, config not JSON": Case(lambda f: port(f, None, with_text(patch(f), "adapter_config.json", "{")), "not valid JSON"),
    "patch, a whole model": Case(lambda f: port(f, model(f), model(f, "tuned")), "is a whole model, not a patch"),
    "patch given as the base": Case(lambda f: port(f, patch(f), f / "patch"), "it is a patch, which a port takes as --patch"),
    "patch for another architecture": Case(
        with_patch(lambda: factors(module="attn.c_attn")), "attn.c_attn.weight, which base does not have; is org/base of"),
    "patch of another shape": Case(with_patch(lambda: factors(inner=48, outer=48)), "of shape [48, 48]"),
    "patch, ranks of A and B differ": Case(with_patch(lambda: factors() | {LORA_B: noise((HIDDEN, 3), 1)}), "rank 4 and 3"),
    "patch, rank of the config differs": Case(with_patch(rank_pattern={"q_proj": 9}), "the rank 9, and its tensors have 4"),
    "patch, rank 0": Case(with_patch(lambda: factors(rank=0), rank=0), "rank 0"),
    "patch, alpha is a word": Case(with_patch(lora_alpha="much"), "lora_alpha"),
    "patch, alpha is not finite": Case(with_patch(lora_alpha=float("nan")), "lora_alpha"),
    "patch, alpha_pattern is a list": Case(with_patch(alpha_pattern=["q_proj"]), "alpha_pattern"),
    "patch, alpha_pattern is no regular expression": Case(with_patch(alpha_pattern={"q_proj(": 3}), "alpha_pattern"),
    "patch, only lora_A": Case(with_patch(lambda: {LORA_A: factors()[LORA_A]}), "only one of its two LoRA factors"),
    "patch, a tensor of unknown kind": Case(
        with_patch(lambda: factors() | {"base_model.model.router": noise((4,), 1)}), "1 of the 3 tensors in patch would"),
    "patch, factors in whole numbers": Case(lambda f: port(f, None, retyped(patch(f), "I32")), "I32"),
    "patch, NaN in a factor": Case(with_patch(lambda: spoiled(LORA_B, np.nan, factors())), "holds NaN or infinity"),
    "patch, infinity in the weight it changes": Case(
        with_base(lambda: spoiled(Q_WEIGHT, np.inf, weights())), "the base holds NaN or infinity"),
    "patch, the sum overflows f16": Case(f16_overflow, "does not fit F16"),
    "patch, of another kind": Case(with_patch(peft_type="LOHA"), "of kind LOHA"),
    "patch, use_dora": Case(with_patch(use_dora=True), "use_dora"),
    "patch, lora_bias": Case(with_patch(lora_bias=True), "lora_bias"),
    "patch, target_parameters": Case(with_patch(target_parameters=["experts.down"]), "target_parameters"),
    **{f"patch, initialised by {init}": Case(with_patch(init_lora_weights=init), f"initialised by {init}")
       for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda")},
    "patch, scale is not finite": Case(lambda f: port(f, None, f"{patch(f)}:nan"), "the scale nan", 2),
    "patch made on another base": Case(wrong_base, "was made on a base with fingerprint 0000"),
    "patch, its record of the base is not JSON": Case(
        lambda f: port(f, None, with_text(patch(f), "edgeport.json", "{")), "edgeport.json is not valid JSON"),
    "old base of another shape": Case(with_old_base(NORM, (48,)), "[48]"),
    "old base of another width": Case(with_old_base(Q_WEIGHT, (48, 48)), "[48, 48]"),
    "new base of another shape": Case(with_base(lambda: weights() | {Q_WEIGHT: noise((48, 32), 1)}), "the base has [48, 32]"),
    "differences, of another shape": Case(
        lambda f: port(f, None, dense(f, {Q_WEIGHT: noise((48, 32), 1)})), "of shape [48, 32], and the base has [32, 32]"),
    "differences, of a weight that is not there": Case(
        lambda f: port(f, None, dense(f, {"model.extra": noise((4,), 1)})), "changes model.extra, which base does not have"),
    "differences, in whole numbers": Case(
        lambda f: port(f, None, dense(f, {NORM: np.zeros(HIDDEN, np.int32)})), "is of type I32, and not of floating point"),
    "differences, none": Case(lambda f: port(f, None, dense(f, {})), "holds no tensors"),
    "differences, a record of another kind": Case(
        lambda f: port(f, None, dense(f, {NORM: noise((HIDDEN,), 1)}, '{"grown": [1]}')), "holds no numbers of rows"),
    "new base that does not come from the old one": Case(
        lambda f: port(f, None, None, "--old-base", str(model(f, "old", other()))), "does not come from the old base", 3),
    "diagnose, a model in place of the patch": Case(
        lambda f: ["diagnose", "--patch", str(model(f, "tuned")), "--new-base", str(model(f))], "is a whole model, not a patch"),
    "diagnose, NaN in the old base": Case(lambda f: diagnose(f, old=spoiled(Q_WEIGHT, np.nan, weights())), "old holds NaN"),
    # extract
    "extract, --rank 0": Case(extract("--rank", "0"), "--rank 0 is no rank", 2),
    "extract, --energy above 1": Case(extract("--energy", "99"), "--energy 99.0 is no share", 2),
    "extract, --rank and --full": Case(extract("--rank", "4", "--full"), "give one of them", 2),
    "extract, nothing has changed": Case(extract(), "has the same weights as base; there is nothing to extract"),
    "extract, a weight too many": Case(
        extract(tuned=lambda: weights() | {"model.extra": noise((4,), 1)}), "tuned has model.extra, which base does not"),
    "extract, a weight missing": Case(
        extract(tuned=lambda: {name: held for name, held in weights().items() if name != NORM}), f"base has {NORM}, which tuned"),
    "extract, another shape": Case(
        extract(tuned=lambda: weights() | {Q_WEIGHT: noise((48, 32), 1)}), "has shape [32, 32] in one model and [48, 32] in the"),
    "extract, NaN in the fine-tune": Case(
        extract(tuned=lambda: spoiled(Q_WEIGHT, np.nan, weights())), "self_attn.q_proj.weight: tuned holds NaN or infinity"),
    "extract, no place in an adapter": Case(
        extract(old=lambda: weights() | EXPERTS, tuned=lambda: weights() | {name: 2 * held for name, held in EXPERTS.items()}),
        "experts.down_proj: a PEFT adapter has no place for the change of it; use --full"),
    "extract, linear layers stored turned": Case(extract(tuned=tuned, model_type="gpt2"), "are stored turned; give --full"),
    "extract, --max-ram too small": Case(extract("--max-ram", "100MB"), "--max-ram 95.4 MiB is too small", 4),
    "extract, disk too small": Case(extract(), "free", 4, small_disk),
    "extract, output exists": Case(
        lambda f: extract(tuned=tuned)(empty(f / "out").parent), "exists already; give another -o or --overwrite"),
    # what the output asks
    "output exists": Case(
        lambda f: port(f, None, None, to=empty(f / "out").name), "exists already; give another -o or --overwrite"),
    "output is a link to itself": Case(looped, "exists already"),
    "output GGUF is a link to nothing, --overwrite": Case(dangling, "is a file that edgeport did not write"),
    "output exists as a file": Case(beside("out", "keep"), "exists already"),
    "output is a folder of others, --overwrite": Case(beside("out", None), "that edgeport did not write"),
    "output is a file of others, --overwrite": Case(beside("out", "mine"), "that edgeport did not write"),
    "output GGUF is a folder, --overwrite": Case(gguf_over_a_folder, "is a folder that edgeport did not write"),
    "output in a folder that is missing": Case(with_flags(to="no/such/out"), "does not exist; make it first"),
    "output in a read-only folder": Case(with_flags(), "Read-only file system", world=read_only),
    "output GGUF without .gguf": Case(with_flags("--to", "gguf"), "should end in .gguf"),
    "output of --to hf named like a GGUF": Case(with_flags(to="out.gguf"), "and --to hf writes a folder; give --to gguf"),
    "disk too small": Case(with_flags(), "free", 4, small_disk),
    "disk full on the way": Case(with_flags(), "became full on the way; free some of it", 4, full_disk),
    "disk that takes no large file": Case(
        with_flags(), "takes no file of the output's size; cut it (--max-shard-size", 4, small_files),
    "extract, disk full on the way": Case(extract(tuned=tuned), "became full on the way; free some of it", 4, full_disk),
    "memory that the system does not give": Case(with_flags(), "gives this process no more memory", 4, no_memory),
    "a thread that the system does not give": Case(with_flags(), "gives this process no more memory", 4, no_thread),
    "--max-ram too small": Case(with_flags("--max-ram", "100MB"), "--max-ram 95.4 MiB is too small", 4),
    "--max-ram nonsense": Case(with_flags("--max-ram", "lots"), "'lots' is not a size", 2),
    "--max-ram negative": Case(with_flags("--max-ram", "-1"), "'-1' is not a size", 2),
    "--max-ram beyond all numbers": Case(with_flags("--max-ram", "9" * 400), "is not a size", 2),
    "--max-shard-size 0": Case(with_flags("--max-shard-size", "0"), "'0' is not a size", 2),
    "--max-shard-size nonsense": Case(with_flags("--max-shard-size", "5 bananas"), "is not a size", 2),
    "--to unknown": Case(with_flags("--to", "ggfu"), "did you mean 'gguf'?", 2),
    "--quant unknown, hf": Case(with_flags("--quant", "f17"), "did you mean 'f16'?", 2),
    "--keep-format beside --quant": Case(with_flags("--keep-format", "--quant", "bf16"), "contradict each other", 2),
    "--rounding unknown": Case(with_flags("--rounding", "patchaware"), "(known: auto, nearest, patch-aware, stochastic)", 2),
    "--semantics unknown": Case(with_flags("--semantics", "delt"), "did you mean 'delta'?", 2),
    "--residual of rank 0": Case(with_flags("--residual", "0", "--quant", "nf4"), "--residual 0 is no rank", 2),
    "--residual of nothing": Case(with_flags("--residual", "8"), "so rounding leaves no residual"),
    "--residual and --sidecar": Case(with_flags("--residual", "8", "--sidecar"), "give one of them", 2),
    "--promote without --max-size": Case(with_flags("--promote", "--quant", "nf4"), "--promote needs a --max-size", 2),
    "--max-size without --promote": Case(with_flags("--max-size", "1GB"), "give both, or neither", 2),
    "--max-size too small": Case(with_flags("--promote", "--max-size", "1kB", "--quant", "nf4"), "without any promotion", 4),
    "--promote with nothing finer": Case(with_flags("--promote", "--max-size", "1GB"), "has a finer one for"),
    "--calibration of no file": Case(with_flags("--calibration", "absent.txt"), "is no file; give a text"),
    "--probe without a tokenizer": Case(with_flags("--probe", "--quant", "nf4"), "has no tokenizer.json to read a text"),
    "--quant unknown, gguf": Case(to_gguf("--quant", "Q4_KM"), "did you mean 'Q4_K_M'?", 2),
    "--tensor-type malformed": Case(with_flags("--tensor-type", "attn"), "is not of the form REGEX=TYPE", 2),
    "--tensor-type no regular expression": Case(
        to_gguf("--quant", "Q8_0", "--tensor-type", "attn(=Q8_0"), "no regular expression", 2),
    "--tensor-type matches nothing": Case(to_gguf("--quant", "Q8_0", "--tensor-type", "attn_z=Q8_0"), "is found in no name", 2),
    "--tensor-type of an unknown type": Case(
        to_gguf("--quant", "Q8_0", "--tensor-type", "attn=Q9_0"), "no ggml type is called 'Q9_0'", 2),
    **{f"{option} for a GGUF that keeps its types": Case(of_gguf(option, value), "so give --quant too")
       for option, value in (("--tensor-type", "attn=F16"), ("--output-tensor-type", "F16"), ("--token-embedding-type", "F16"))},
    "--tensor-type for hf": Case(with_flags("--tensor-type", "attn=Q8_0"), "are not for --to hf"),
    "--resume of a run of other inputs": Case(
        lambda f: stale(f, '{"inputs": {"/elsewhere": [1, 2]}}'), "had other inputs; leave off --resume"),
    "--device unknown": Case(with_flags("--device", "tpu"), "not one of auto, cpu, cuda", 2),
    "option unknown": Case(with_flags("--quantum"), "No such option", 2),
    "verb unknown": Case(lambda f: ["prot"], "No such command", 2),
    "path that does not exist": Case(lambda f: port(f, "./no-such-folder"), "does not exist; give a folder"),
    "hub name, --offline": Case(
        lambda f: port(f, "nobody-at-all/nothing", None, "--offline"), "the network is not used (offline)"),
    # what the model says
    "a value that is not finite": Case(not_finite, "lm_head.weight: the base holds NaN or infinity"),
    "more tokens than the embedding has rows": Case(too_many_tokens, "has 321 tokens and the embedding 320 rows"),
    "embedding and head of different sizes": Case(uneven_head, "would have 300 and 320 rows"),
    "vocab_size is a list": Case(with_config(vocab_size=[1]), "config.json says vocab_size [1]"),
    "vocab_size is not the embedding's": Case(
        with_config(vocab_size=300), "the embedding has 320 rows, and config.json says vocab_size 300"),
    "half of a character in a chat template, gguf": Case(
        lambda f: port(f, with_text(with_tokenizer(f), "tokenizer_config.json", '{"chat_template": "\\ud83d"}'), None,
                       "--to", "gguf", to="out.gguf"),
        "is not text that UTF-8 can hold"),
    "no tokenizer for a GGUF": Case(to_gguf(), "no tokenizer.json"),
    "architecture without a GGUF table": Case(other_architecture, "no GGUF table for MambaForCausalLM"),
    # ONNX
    "ONNX, architecture without a graph": Case(
        to_onnx(architectures=["MambaForCausalLM"]), "no ONNX graph for MambaForCausalLM; supported: LlamaForCausalLM"),
    "ONNX, an activation of its own": Case(to_onnx(hidden_act="relu"), "does not compute: hidden_act 'relu'"),
    "ONNX, a rotary type that depends on the length": Case(
        to_onnx(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic' of config.json is not supported"),
    "ONNX, a setting of the wrong kind": Case(to_onnx(num_attention_heads="four"), "a value of another kind"),
    "ONNX, a thousand million layers": Case(
        to_onnx(num_hidden_layers=10**9), "no tensor model.layers.999999999.input_layernorm.weight"),
    "ONNX, a setting missing": Case(to_onnx(hidden_size=None), "config.json says nothing of hidden_size"),
    "ONNX, heads that the fused operator cannot turn": Case(
        to_onnx(num_attention_heads=4, num_key_value_heads=4), "heads of 8 numbers, which onnxruntime's fused attention"),
    "ONNX, a tensor too many": Case(
        to_onnx(tensors=lambda: weights() | {f"{Q_PROJ}.bias": noise((HIDDEN,), 1)}), "has no place for the tensor"),
    "ONNX, a tensor missing": Case(
        to_onnx(tensors=lambda: {name: held for name, held in weights().items() if name != Q_WEIGHT}), f"no tensor {Q_WEIGHT}"),
    "ONNX, a tensor of another shape": Case(
        to_onnx(tensors=lambda: weights() | {NORM: noise((16,), 1)}), "shape [16] where config.json says [32]"),
    "ONNX, NaN in a weight": Case(
        to_onnx("--quant", "int4", tensors=lambda: spoiled(Q_WEIGHT, np.nan, weights())), "holds NaN or infinity"),
    "ONNX, --quant unknown": Case(to_onnx("--quant", "fp17"), "did you mean 'fp16'?", 2),
    "ONNX, --quant of GGUF": Case(to_onnx("--quant", "Q4_K_M"), "--quant of an ONNX output is called 'Q4_K_M'", 2),
    "ONNX, --block-size unknown": Case(to_onnx("--quant", "int4", "--block-size", "48"), "not one of 16, 32, 64, 128", 2),
    "ONNX, --block-size that does not divide": Case(
        to_onnx("--quant", "int4", "--block-size", "64"), "do not divide into blocks of 64; give --block-size 16 or 32"),
    "ONNX, --block-size without blocks": Case(to_onnx("--quant", "fp16", "--block-size", "32"), "are for int4 and int8"),
    "ONNX, --asymmetric --portable": Case(to_onnx("--quant", "int4", "--asymmetric", "--portable"), "leave out --asymmetric"),
    "ONNX, --execution-provider unknown": Case(
        to_onnx("--execution-provider", "tpu"), "no execution provider is called 'tpu'", 2),
    "ONNX, fp32 on CUDA": Case(to_onnx("--quant", "fp32", "--execution-provider", "cuda"), "give --quant fp16"),
    "ONNX, --max-shard-size": Case(to_onnx("--max-shard-size", "1GB"), "are not for --to onnx"),
    "ONNX, disk too small": Case(to_onnx(), "free", 4, small_disk),
    "--portable for hf": Case(with_flags("--portable"), "are for --to onnx, not for --to hf"),
    "--block-size for gguf": Case(to_gguf("--block-size", "0"), "are for --to onnx, not for --to gguf"),
    "ONNX input, another program's": Case(of_onnx(foreign_onnx), "was not written by edgeport"),
    "ONNX input, the graph cut short": Case(of_onnx(lambda o: os.truncate(o / "model.onnx", 99)), "is not an ONNX model"),
    "ONNX input, the weights cut short": Case(of_onnx(lambda o: os.truncate(o / "model.onnx.data", 99)), "model.onnx.data"),
    "ONNX input, no config.json": Case(of_onnx(lambda o: (o / "config.json").unlink()), "and no config.json"),
    "ONNX input, another config.json": Case(of_onnx(lambda o: another_config(o, attention_bias=True)), "export it anew"),
    "ONNX input, a config.json of more layers": Case(
        of_onnx(lambda o: another_config(o, num_hidden_layers=2)),
        "no tensor model.layers.1.input_layernorm.weight, which config.json calls for"),
    # verify
    "verify, a byte has changed": Case(tampered(changed_byte), "model.safetensors has changed since"),
    "verify, a file is shorter": Case(
        tampered(lambda o: os.truncate(o / "model.safetensors", 99)), "has 99 bytes; its manifest says"),
    "verify, a file is missing": Case(
        tampered(lambda o: (o / "config.json").unlink()), "config.json is in the manifest and not in"),
    "verify, a file too many": Case(tampered(lambda o: (o / "extra.txt").write_text("")), "extra.txt in"),
    "verify, the manifest is cut short": Case(
        tampered(lambda o: os.truncate(o / "edgeport.json", 99)), "edgeport.json is not valid JSON"),
    "verify, no manifest": Case(tampered(lambda o: (o / "edgeport.json").unlink()), "has no manifest"),
    "verify, nothing there": Case(lambda f: ["verify", str(f / "out")], "out does not exist; give what the output was called"),
    "verify, --max-kl without --against": Case(lambda f: ["verify", str(f), "--max-kl", "0"], "compare with as --against", 2),
    "verify, --tokens without --against": Case(lambda f: ["verify", str(f), "--tokens", "9"], "compare with as --against", 2),
    "verify, --tokens negative": Case(lambda f: ["verify", str(f), "--tokens", "-5"], "greater than or equal to 2", 2),
    "verify, another manifest": Case(
        tampered(lambda o: (o / "edgeport.json").write_text('{"edgeport": 1, "files": {"a": 3}}')), "not a manifest of edgeport"),
    "verify, a manifest that names a file elsewhere": Case(
        tampered(lambda o: renamed(o, "../base")), "'../base', which is not a file beside it"),
}  # fmt: skip


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too, and what is in it."""
    paths = sorted(folder.rglob("*"))
    held = {path: sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder" for path in paths}
    return {str(path.relative_to(folder)): what for path, what in held.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| case | exit code | message |\n|---|---|---|")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            argv = case.make(folder)
            before = listing(folder)
            try:
                with case.world():
                    answer = run(argv)
                said, code = " ".join(answer.error.split()).replace(scratch, "").replace("|", "\\|"), str(answer.code)
            except Exception as error:
                said, code = f"BUG: {error!r}", "traceback"
            litter = sorted(listing(folder).items() ^ before.items())
        print(f"| {name} | {code} | {said}{f' LITTER: {litter}' if litter else ''} |")


if __name__ == "__main__":
    main()
