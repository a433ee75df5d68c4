"""The command line's contract: what is on stdout, which files appear, what is imported, and that runs repeat to the byte."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import edgeport
from bench.bad_input import listing
from bench.shapes import Shape, write_model, write_patch
from bench.spoiling import HIDDEN, NORM, Q_WEIGHT, export, factors, model, patch, port, run, tokenizer, weights
from edgeport.errors import EdgeportError
from edgeport.report import bar
from tests.commands import ROOT, child, content, ran, said, with_tokenizer

HEAVY = {"torch", "transformers", "peft", "tokenizers", "sentencepiece", "gguf", "llama_cpp", "onnxruntime", "huggingface_hub"}

PORT_KEYS = {
    "output", "files", "bytes_in", "bytes_out", "weights", "patched", "copied", "seconds", "peak_ram_bytes",
    "peak_above_import_bytes", "peak_vram_bytes", "survival", "coverage", "gate",
}  # fmt: skip
PLAN_KEYS = {"peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "steps", "seconds"}
SHARED = ("output", "files", "bytes_in", "bytes_out", "weights", "patched", "copied", "coverage")


def test_port_says_what_it_did(tmp_path: Path) -> None:
    facts = said(port(tmp_path))
    out = tmp_path / "out"
    assert facts.keys() >= PORT_KEYS
    assert facts["output"] == str(out)
    assert facts["files"] == {"model.safetensors": (out / "model.safetensors").stat().st_size}
    assert facts["patched"] == 1 and facts["copied"] == facts["weights"] - 1
    assert facts["coverage"] == {"tensors": 2, "consumed": 2}
    assert facts["survival"].keys() == {"mean", "min", "worst"} and facts["gate"].keys() == {"verdict", "reason"}
    # a small port may fit what earlier tests have left resident in this process
    assert facts["peak_vram_bytes"] == 0 <= facts["peak_above_import_bytes"] < facts["peak_ram_bytes"]
    manifest = json.loads((out / "edgeport.json").read_text())
    assert manifest["files"].keys() == {"config.json", "model.safetensors"}
    assert manifest["inputs"].keys() >= {"new_base", "patches"}


def test_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    argv = port(tmp_path)
    before = listing(tmp_path)
    plan = said([*argv, "--dry-run"])
    told = run([*argv, "--dry-run"]).output
    assert "peak RAM" in told and "about 1 s on one core" in told and 0 <= plan["seconds"] < 1
    assert listing(tmp_path) == before
    assert plan.keys() >= PLAN_KEYS
    assert [step["action"] for step in plan["steps"]].count("patch") == 1
    facts = said(argv)
    assert [plan[key] for key in SHARED] == [facts[key] for key in SHARED]
    assert plan["disk_bytes"] >= sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_quiet_and_plain_output(tmp_path: Path) -> None:
    argv = port(tmp_path)
    quiet = run([*argv, "--quiet", "--verbose"])
    assert (quiet.code, quiet.output, quiet.error) == (0, "", "")
    plain = run([*argv, "--overwrite"])
    assert "patch tensors" in plain.output and plain.error == ""


def test_what_is_printed_and_recorded_is_json_for_all_readers(tmp_path: Path) -> None:
    """Of a base of zeros no change is a share."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    argv = port(tmp_path, model(tmp_path, "base", weights() | {Q_WEIGHT: np.zeros((HIDDEN, HIDDEN), np.float32)}))
    printed = [run([*argv, "--json"]).output, run(["inspect", str(tmp_path / "out"), "--json"]).output]
    _, inspected, manifest = (
        json.loads(text, parse_constant=refuse) for text in (*printed, (tmp_path / "out" / "edgeport.json").read_text())
    )
    assert [(fact["change"], fact["retention"]) for fact in manifest["per_weight"]] == [(None, 1.0)]
    assert inspected["survival"]["mean_change"] is None and inspected["survival"]["mean"] == 1.0
    assert run([*argv, "--overwrite", "-v"]).code == 0


def test_a_patch_at_no_strength_is_the_base(tmp_path: Path) -> None:
    old, given = model(tmp_path, "old"), f"{patch(tmp_path)}:0"
    assert run(port(tmp_path, old, given, "--old-base", str(old))).code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (old, tmp_path / "out"))
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert run(["diagnose", "--patch", given, "--new-base", str(old), "--old-base", str(old)]).code == 0


def test_a_terminal_that_lacks_the_signs_of_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "Gewölbe 漢"
    folder.mkdir()
    done = ran(child(port(folder), PYTHONIOENCODING="ascii"))
    assert r"Gew\xf6lbe \u6f22/out" in done.stdout


def test_closed_streams(tmp_path: Path) -> None:
    """Nothing that is printed goes into a file that has got a stream's number."""
    argv = [sys.executable, "-m", "edgeport", *port(tmp_path), "-v"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *argv], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert run(["verify", str(tmp_path / "out")]).code == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 100])
def test_progress_takes_one_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with bar(4 << 30, True) as progress:
        progress("model.layers.22.mlp.gate_proj.weight", 1 << 30)
    plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.getvalue())
    frames = [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]
    assert {len(frame) for frame in frames} == {columns}
    assert "1.0/4.0 GiB" in frames[-1] and "model.lay" in frames[-1]


def test_a_reader_that_has_seen_enough() -> None:
    """`edgeport ... | head -0`: no sentence about a pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    assert printed_into(writing) == (1, "")


def test_a_full_disk_under_what_is_printed() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert printed_into(full) == (1, "edgeport: No space left on device: the standard output\n")


def printed_into(handle: int) -> tuple[int, str]:
    """Exit code and stderr of a command whose output, held in a buffer as it usually is, goes there. Closes it."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "edgeport", "--version"], cwd=ROOT, env=buffered, stdout=handle, stderr=subprocess.PIPE, text=True
    )
    os.close(handle)
    return done.returncode, done.stderr


def test_a_patch_that_records_its_base_ports_from_it_alone(tmp_path: Path) -> None:
    old, given = model(tmp_path, "old"), patch(tmp_path)
    record = {"base_fingerprint": said(["inspect", str(old)])["fingerprint"]}
    (given / "edgeport.json").write_text(json.dumps(record))
    assert said(["inspect", str(given)])["base_fingerprint"] == record["base_fingerprint"]
    other = model(tmp_path, "other", {name: values + 1 for name, values in weights().items()})
    assert run(port(tmp_path, old, given, "--old-base", str(old), to="one")).code == 0
    assert run(port(tmp_path, old, given, "--old-base", str(other), to="two")).code == 1
    assert run(port(tmp_path, old, given, "--old-base", str(other), "--force", to="two")).code == 0


def test_formats() -> None:
    known = said(["formats"])
    assert known["codecs"]["plain"]["BF16"] == "rw"
    assert known["containers"]["hf"] == known["containers"]["gguf"] == "read+write"
    assert "lora" in known["patches"]
    assert "container gguf" in run(["formats"]).output


USAGE = {
    "no verb": [],
    "unknown verb": ["merge"],
    "missing options": ["port"],
    "missing argument": ["verify"],
    "unknown option": ["formats", "--yaml"],
    "a word for a number": ["verify", "out", "--tokens", "many"],
}


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str) -> None:
    assert run(USAGE[name]).code == 2


def test_version() -> None:
    from edgeport import __version__

    assert run(["--version"]).output == f"edgeport {__version__}\n"


LIGHT: dict[str, Callable[[Path], list[str]]] = {
    "help": lambda folder: ["--help"],
    "formats": lambda folder: ["formats"],
    "inspect a folder": lambda folder: ["inspect", str(model(folder))],
    "inspect a patch": lambda folder: ["inspect", str(patch(folder))],
    "inspect a GGUF": lambda folder: ["inspect", str(exported(folder))],
    "verify": lambda folder: ["verify", str(exported(folder))],
    "dry run": lambda folder: port(folder, None, None, "--dry-run"),
    "dry run to GGUF": lambda folder: [*export(with_tokenizer(folder), folder / "dry.gguf", "--quant", "Q4_K_M"), "--dry-run"],
}


def exported(folder: Path) -> Path:
    assert run(export(with_tokenizer(folder), folder / "out.gguf", "--quant", "Q8_0")).code == 0
    return folder / "out.gguf"


@pytest.mark.parametrize("name", LIGHT)
def test_what_needs_no_computing_imports_nothing_heavy(name: str, tmp_path: Path) -> None:
    show = "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = ran(child(LIGHT[name](tmp_path), after=show))
    # a GGUF's tensor names are gguf-py's, which brings sentencepiece and nothing larger
    allowed = {"gguf", "sentencepiece"} if "GGUF" in name else set()
    assert not (HEAVY - allowed) & set(done.stderr.split())


SMALL = Shape(hidden=512, layers=1, feed_forward=1024, vocabulary=1024, heads=8, kv_heads=4)


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    base, given = write_model(SMALL, tmp_path / "base", None), write_patch(SMALL, tmp_path / "patch")
    tokenizer(base, SMALL.vocabulary)
    more = ["--to", "gguf", "--quant", "Q4_K_M", "--no-probe"]
    both = f"sys.argv = [word.replace('/out', '/out.gguf') for word in sys.argv] + {more}\ncall()"
    worlds: dict[str, tuple[str, dict[str, str]]] = {
        "one thread": ("", {"OMP_NUM_THREADS": "1"}),
        "two threads": ("", {"OMP_NUM_THREADS": "2"}),
        "one core": ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", {}),
    }
    found = {}
    for name, (before, environment) in worlds.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        ran(child(port(folder, base, given), before=before, after=both, **environment))
        found[name] = content(folder)
    assert {"out.gguf", "out/model.safetensors"} < found["one core"].keys()
    assert found["one thread"] == found["two threads"] == found["one core"]


LARGE = Shape(hidden=1024, layers=1, feed_forward=2816, vocabulary=49152, heads=16, kv_heads=4)
MAX_RAM = 400_000_000


def test_max_ram_bounds_the_process(tmp_path: Path) -> None:
    # the embedding alone takes 100 MB, of which 32 MB are free under this bound
    base, given = write_model(LARGE, tmp_path / "base", None), write_patch(LARGE, tmp_path / "patch")
    show = "from edgeport.memory import peak_bytes\nprint(peak_bytes(), file=sys.stderr)"
    done = ran(child(port(tmp_path, base, given, "--quant", "f16", "--max-ram", str(MAX_RAM)), after=show))
    assert int(done.stderr.split()[-1]) <= MAX_RAM


def test_shards_reload_with_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = model(tmp_path)
    assert run(port(tmp_path, base, None, to="whole")).code == 0
    files = said(port(tmp_path, base, tmp_path / "patch", "--max-shard-size", "50kB"))["files"]
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert shards == [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == said(["inspect", str(base)])["tensors"].keys()
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert whole.keys() == cut.keys() and all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert run(["verify", str(tmp_path / "out")]).code == 0


def test_keep_format_is_the_default_said_aloud(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path)
    assert run(export(base, tmp_path / "base.gguf", "--quant", "Q8_0")).code == 0
    argv = port(tmp_path, tmp_path / "base.gguf", None, "--to", "gguf", "--no-probe", to="out.gguf")
    assert run(argv).code == 0
    first = content(tmp_path)["out.gguf"]
    assert run([*argv, "--keep-format", "--overwrite"]).code == 0 and content(tmp_path)["out.gguf"] == first
    both = run([*argv, "--keep-format", "--quant", "Q4_0", "--overwrite"])
    assert both.code == 2 and "contradict each other" in both.error
    folder = run(port(tmp_path, tmp_path / "base.gguf", tmp_path / "patch", "--keep-format"))
    assert folder.code == 1 and "is Q8_0 in the base and would be BF16" in folder.error


def test_semantics(tmp_path: Path) -> None:
    """A whole value in the patch: its difference to the old base, or itself."""
    old, new = model(tmp_path, "old"), model(tmp_path, "new", weights() | {NORM: weights()[NORM] + 1})
    given = patch(tmp_path, factors() | {f"base_model.model.{NORM}": np.full(HIDDEN, 3, np.float32)})
    found = {}
    for name, more in {
        "with": ["--old-base", str(old)],
        "delta": ["--old-base", str(old), "--semantics", "delta"],
        "without": [],
        "operator": ["--old-base", str(old), "--semantics", "operator"],
    }.items():
        assert run(port(tmp_path, new, given, *more, to=name)).code == 0
        found[name] = load_file(tmp_path / name / "model.safetensors")[NORM]
        manifest = json.loads((tmp_path / name / "edgeport.json").read_text())
        told = next(fact["semantics"] for fact in manifest["per_weight"] if fact["weight"] == NORM)
        assert told == ("delta" if name in ("with", "delta") else "operator")
        # the gate looked at the old base whatever the semantics
        assert manifest["inputs"].keys() == {"new_base", "patches"} | ({"old_base"} if more else set())
    assert np.allclose(found["operator"], 3) and np.array_equal(found["operator"], found["without"])
    assert np.allclose(found["delta"], 4) and np.array_equal(found["delta"], found["with"])
    refused = run(port(tmp_path, new, given, "--semantics", "delta", to="refused"))
    assert refused.code == 1 and "give it as --old-base" in refused.error and not (tmp_path / "refused").exists()
    assert run(port(tmp_path, new, given, "--semantics", "sum", to="refused")).code == 2


def test_verbose_names_every_patched_weight(tmp_path: Path) -> None:
    answer = run([*port(tmp_path), "-v"])
    line = next(line for line in answer.error.splitlines() if "q_proj" in line)
    assert line.split()[1:5] == ["patch", "F32", "F32", "nearest"] and float(line.split()[6]) == pytest.approx(1, abs=1e-3)
    assert len(answer.error.splitlines()) == 3


FLAGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "port": (
        ["--patch", "a:0.5", "--patch", "b", "--new-base", "new", "--old-base", "old", "-o", "out", "--rounding", "stochastic",
         "--seed", "3", "--semantics", "operator", "--promote", "--max-size", "5GB", "--sidecar", "--residual", "4", "--probe",
         "--calibration", "text", "--keep-format", "--force"],
        {"patch": ["a:0.5", "b"], "new_base": "new", "old_base": "old", "rounding": "stochastic", "seed": 3,
         "semantics": "operator", "promote": True, "max_size": "5GB", "sidecar": True, "residual": 4, "probe": True,
         "calibration": Path("text"), "keep_format": True, "force": True},
    ),
    "export": (["new", "--output", "out", "--calibration", "text"], {"new_base": "new", "calibration": Path("text")}),
}  # fmt: skip
BOTH = (
    ["--to", "onnx", "--max-shard-size", "1GB", "--imatrix", "i", "--tensor-type", "ffn=q8_0", "--output-tensor-type", "f16",
     "--token-embedding-type", "q6_k", "--block-size", "64", "--asymmetric", "--portable", "--execution-provider", "cuda",
     "--max-ram", "2GB", "--max-vram", "3GB", "--device", "cuda", "--overwrite", "--offline"],
    {"output": Path("out"), "to": "onnx", "max_shard_size": "1GB", "imatrix": Path("i"), "tensor_type": [("ffn", "q8_0")],
     "output_tensor_type": "f16", "token_embedding_type": "q6_k", "block_size": 64, "asymmetric": True, "portable": True,
     "execution_provider": "cuda", "max_ram": "2GB", "max_vram": "3GB", "device": "cuda", "overwrite": True, "offline": True},
)  # fmt: skip


@pytest.mark.parametrize("verb", FLAGS)
@pytest.mark.parametrize("quant", ["--quant", "--precision", "-p"])
def test_every_flag_reaches_the_plan(verb: str, quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def plan(**given: Any) -> None:
        told.update(given)
        raise EdgeportError("seen")

    monkeypatch.setattr("edgeport.cli.api.plan", plan)
    (own, expected), (shared, more) = FLAGS[verb], BOTH
    assert run([verb, *own, *shared, quant, "int4"]).error == "edgeport: seen\n"
    assert told == expected | more | {"quant": "int4"}


def test_the_flags_of_the_other_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[Any, Any]] = []

    def noted(*places: Any, **given: Any) -> None:
        told.append(dict(enumerate(map(str, places))) | given)
        raise EdgeportError("seen")

    for name in ("plan_extraction", "diagnose", "compare", "verify", "inspect"):
        monkeypatch.setattr(f"edgeport.cli.api.{name}", noted)
    for argv in (
        ["extract", "--old-base", "old", "--tuned", "new", "-o", "out", "--energy", "0.9", "--max-ram", "1GB", "--offline"],
        ["extract", "--old-base", "old", "--tuned", "new", "-o", "out", "--full", "--overwrite"],
        ["diagnose", "--patch", "a", "--patch", "b", "--new-base", "new", "--old-base", "old", "--force", "--offline"],
        ["inspect", "model", "--offline"],
    ):
        assert run(argv).error == "edgeport: seen\n", argv
    common: dict[str, Any] = {"old_base": "old", "tuned": "new", "output": Path("out"), "rank": None}
    assert told == [
        {**common, "energy": 0.9, "full": False, "max_ram": "1GB", "overwrite": False, "offline": True},
        {**common, "energy": None, "full": True, "max_ram": None, "overwrite": True, "offline": False},
        {"patch": ["a", "b"], "new_base": "new", "old_base": "old", "force": True, "offline": True},
        {0: "model", "offline": True},
    ]


def test_a_manifest_says_what_went_in_and_how(tmp_path: Path) -> None:
    argv = port(tmp_path, None, None, "--old-base", str(model(tmp_path, "old")), "--no-progress")
    ran(child(argv))
    told = json.loads((tmp_path / "out" / "edgeport.json").read_text())
    assert told["command"] == ["edgeport", *argv] and told["versions"]["edgeport"] == edgeport.__version__
    assert told["predicted_peak_bytes"] >= told["peak_above_import_bytes"]
    for role, folder, names in (
        ("new_base", "base", ["model.safetensors"]), ("old_base", "old", ["model.safetensors"]),
        ("patches", "patch", ["adapter_config.json", "adapter_model.safetensors"]),
    ):  # fmt: skip
        found = told["inputs"][role][0] if role == "patches" else told["inputs"][role]
        assert found["sha256"] == {name: sha256((tmp_path / folder / name).read_bytes()).hexdigest() for name in names}


@pytest.mark.parametrize(("flags", "extra"), [(["--to", "gguf"], "gguf"), (["--to", "onnx"], "onnx"), ([], None)])
def test_what_the_plain_installation_does(flags: list[str], extra: str | None, tmp_path: Path) -> None:
    """Folders to folders; for the others the extra that they want is named."""
    absent = ("gguf", "llama_cpp", "transformers", "tokenizers", "onnx", "onnxruntime", "peft")
    base, output = with_tokenizer(tmp_path), tmp_path / ("out.gguf" if extra == "gguf" else "out")
    argv = ["port", "--patch", str(patch(tmp_path)), "--new-base", str(base), "-o", str(output), "--no-progress", *flags]
    done = child(argv, before=f"import sys\nfor name in {absent}: sys.modules[name] = None\n")
    if extra is None:
        assert (done.returncode, output.is_dir()) == (0, True), done.stderr
        return
    assert (done.returncode, output.exists()) == (1, False)
    assert done.stderr.count("\n") == 1 and f"pip install 'edgeport[{extra}]'" in done.stderr


def test_plain_lines_for_logs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("edgeport.report.LINE_SECONDS", -1)
    with bar(200, True) as progress:
        progress("w", 50)
        progress("w", 100)
    assert capsys.readouterr().err == " 25% of 200 B: w\n 75% of 200 B: w\n"
