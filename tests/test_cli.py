"""The command line's contract: what is on stdout, which files appear, what is imported, and that runs repeat to the byte."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench.bad_input import listing
from bench.shapes import Shape, write_model, write_patch
from bench.spoiling import HIDDEN, NORM, Q_WEIGHT, export, factors, model, patch, port, run, tokenizer, weights
from edgeport.hub import called
from edgeport.locate import MODEL_FILES, NOT_READ
from edgeport.places import manifest_path
from edgeport.report import bar

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "tokenizers", "sentencepiece", "gguf", "llama_cpp", "onnxruntime", "huggingface_hub"}

PORT_KEYS = {
    "output", "files", "bytes_in", "bytes_out", "weights", "patched", "copied", "seconds", "peak_ram_bytes",
    "peak_above_import_bytes", "peak_vram_bytes", "survival", "coverage", "gate",
}  # fmt: skip
PLAN_KEYS = {"peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "steps", "seconds"}
SHARED = ("output", "files", "bytes_in", "bytes_out", "weights", "patched", "copied", "coverage")


def said(argv: list[str]) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    answer = run([*argv, "--json"])
    assert answer.code == 0, answer.error
    return dict(json.loads(answer.output))


CALL = """
import sys
from edgeport.cli import main
def call():
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
call()
"""


def child(argv: list[str], before: str = "", after: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, with something to do before edgeport is imported and after it has run."""
    script = f"{before}{CALL}{after}"
    return subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, timeout=300
    )


def ran(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr
    return done


def content(output: Path) -> dict[str, str]:
    """Hash by file, but for the manifest, which holds seconds and peaks."""
    return {name: found for name, found in listing(output).items() if not name.endswith("edgeport.json")}


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


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_overwrite_replaces_an_output_of_edgeport(to: str, tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    output = tmp_path / ("out" if to == "hf" else "out.gguf")
    argv = port(tmp_path, base, None, "--to", to, to=output.name)
    assert run(argv).code == 0
    first = content(tmp_path)
    assert run(argv).code == 1
    assert content(tmp_path) == first
    assert run([*argv, "--overwrite", "--quant", "f16"]).code == 0
    assert content(tmp_path).keys() == first.keys() and content(tmp_path) != first
    assert run([*argv, "--overwrite"]).code == 0
    assert content(tmp_path) == first


def test_overwrite_keeps_what_others_have_put_into_the_folder(tmp_path: Path) -> None:
    argv = [*port(tmp_path), "--overwrite"]
    assert run(argv).code == 0
    (tmp_path / "out" / "eval").mkdir()
    (tmp_path / "out" / "eval" / "scores.txt").write_text("90.8\n")
    before = content(tmp_path)
    refused = run(argv)
    assert refused.code == 1 and content(tmp_path) == before
    assert "eval is nothing that edgeport wrote; move it away, or give another -o" in refused.error


def test_no_output_takes_the_place_of_a_mount_point(tmp_path: Path) -> None:
    """It could not be renamed there, after all the work."""
    refused = run([*port(tmp_path, to="/proc"), "--overwrite"])
    assert refused.code == 1 and ("mount point" if os.access("/", os.W_OK) else "not writable") in refused.error


@pytest.mark.parametrize("there", [True, False])
def test_an_output_through_a_link(there: bool, tmp_path: Path) -> None:
    """A link to a larger disk stays one, and the output goes where it leads."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/large")
    if there:
        (tmp_path / "disk" / "large").mkdir()
    assert run([*port(tmp_path), "--overwrite"]).code == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "large" / "edgeport.json").is_file()
    assert run(["verify", str(tmp_path / "out")]).code == 0


def test_an_output_into_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = port(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run([*argv[:-3], "-o", ".", "--overwrite", "--no-progress"]).code == 0
    assert run(["verify", str(tmp_path / "here")]).code == 0


def test_a_model_in_the_folder_at_hand_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = port(tmp_path)
    monkeypatch.chdir(tmp_path / "base")
    assert run([*argv[:3], "--new-base", ".", *argv[5:]]).code == 0
    assert json.loads((tmp_path / "out" / "edgeport.json").read_text())["inputs"]["new_base"]["name"] == "base"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run([*port(tmp_path), "--overwrite"]).code == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_verify(to: str, tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    output = tmp_path / ("out" if to == "hf" else "out.gguf")
    assert run(export(base, output, "--to", to)).code == 0
    found = said(["verify", str(output)])
    assert found["verified"] is True and found["output"] == str(output)
    assert found["files"] == (content(output) if to == "hf" else {output.name: listing(tmp_path)[output.name]})
    data = bytearray((file := output if to == "gguf" else output / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    answer = run(["verify", str(output), "--json"])
    assert (answer.code, answer.output) == (1, "") and f"{file.name} has changed" in answer.error


def test_nothing_to_compare_with_is_no_comparison(tmp_path: Path) -> None:
    """As where a script's variable is not set."""
    assert run(port(tmp_path)).code == 0
    answer = run(["verify", str(tmp_path / "out"), "--against", ""])
    assert answer.code == 1 and "is not a model that edgeport reads" in answer.error and not answer.output


def test_verify_is_of_the_file_that_is_named(tmp_path: Path) -> None:
    """Copied with its manifest, and spoilt: what the manifest is of lies beside it as it was."""
    first, copy = tmp_path / "first.gguf", tmp_path / "copy.gguf"
    first.write_bytes(b"whole")
    entry = {"bytes": 5, "sha256": listing(tmp_path)["first.gguf"]}
    for path in (first, copy):
        manifest_path(path, False).write_text(json.dumps({"edgeport": 1, "files": {"first.gguf": entry}}))
    copy.write_bytes(b"spoilt")
    assert said(["verify", str(first)])["files"] == {"first.gguf": entry["sha256"]}
    answer = run(["verify", str(copy)])
    assert answer.code == 1 and "manifest beside copy.gguf is of first.gguf" in answer.error


@pytest.mark.parametrize("files", [{}, None, 5, "out-1.gguf"])
def test_a_manifest_of_no_files(files: Any, tmp_path: Path) -> None:
    (tmp_path / "out-1.gguf").write_bytes(b"spoilt")
    for name in ("out", "out-1.gguf"):
        manifest_path(tmp_path / name, False).write_text(json.dumps({"edgeport": 1, "files": files}))
        answer = run(["verify", str(tmp_path / "out-1.gguf")])
        assert answer.code == 1 and ("has no manifest" if name == "out" else "is not a manifest of edgeport") in answer.error


@pytest.mark.parametrize("facts", [5, [5], [{"retention": "all"}], [{"retention": 1.0}]])
def test_a_manifest_that_tells_nonsense_of_its_weights(facts: Any, tmp_path: Path) -> None:
    base, manifest = model(tmp_path), {"edgeport": 1, "files": {"config.json": {"bytes": 0, "sha256": ""}}}
    (base / "edgeport.json").write_text(json.dumps(manifest | {"survival": {"mean": 1.0}, "per_weight": facts}))
    answer = run(["inspect", str(base)])
    assert answer.code == 1 and "tells of its weights" in answer.error


def test_inspect_model(tmp_path: Path) -> None:
    base = model(tmp_path)
    facts = said(["inspect", str(base)])
    assert (facts["kind"], facts["container"], facts["model_type"], facts["tied_head"]) == ("model", "hf", "llama", False)
    assert facts["formats"] == {"F32": facts["weights"]} and facts["codecs"] == ["plain"]
    assert facts["tensors"][NORM] == {"shape": [32], "format": "F32"}
    assert facts["fingerprint"] == said(["inspect", str(model(tmp_path, "copy"))])["fingerprint"]
    assert run(port(tmp_path, base)).code == 0
    assert said(["inspect", str(tmp_path / "out")])["fingerprint"] != facts["fingerprint"]
    assert "model_type" in run(["inspect", str(base)]).output


def test_inspect_patch(tmp_path: Path) -> None:
    given = patch(tmp_path)
    facts = said(["inspect", str(given)])
    assert (facts["kind"], facts["patch_kind"]) == ("patch", "lora")
    assert (facts["rank"], facts["alpha"], facts["scaling"], facts["rslora"]) == ([4], 8, [2.0], False)
    assert facts["target_modules"] == ["q_proj"] and len(facts["tensors"]) == 2
    assert facts["base_fingerprint"] is None


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


def test_a_failed_comparison_is_not_said_to_be_verified(tmp_path: Path) -> None:
    base = with_tokenizer(tmp_path)
    assert run(port(tmp_path, base)).code == 0
    answer = run(["verify", str(tmp_path / "out"), "--against", str(base), "--max-kl", "0", "--json"])
    assert answer.code == 1 and json.loads(answer.output)["verified"] is False
    assert said(["verify", str(tmp_path / "out"), "--against", str(base), "--max-kl", "1"])["verified"] is True


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


def test_inspect_gguf(tmp_path: Path) -> None:
    base = model(tmp_path)
    tokenizer(base, 320)
    assert run(export(base, tmp_path / "out.gguf", "--quant", "Q8_0")).code == 0
    facts = said(["inspect", str(tmp_path / "out.gguf")])
    assert (facts["kind"], facts["container"], facts["model_type"]) == ("model", "gguf", "llama")
    assert facts["tensors"]["lm_head.weight"] == {"shape": [320, 32], "format": "Q8_0"}
    assert facts["tensors"].keys() == said(["inspect", str(base)])["tensors"].keys()


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


def with_tokenizer(folder: Path) -> Path:
    base = model(folder)
    tokenizer(base, 320)
    return base


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


NO_NETWORK = """
import socket
def refuse(*arguments, **options):
    raise AssertionError("the network was used")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_local_folders_port_without_a_network(tmp_path: Path) -> None:
    ran(child(port(tmp_path), before=NO_NETWORK, HF_HUB_OFFLINE="0"))
    assert run(["verify", str(tmp_path / "out")]).code == 0


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, folder: Path, name: str, branch: str) -> None:
    """Move a folder into the hub's cache, as a download would have left it there."""
    folder.mkdir(exist_ok=True)
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / branch).write_text(COMMIT)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / COMMIT)


def test_hub_names_are_found_in_the_local_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(port(tmp_path, to="local")).code == 0
    cached(cache, tmp_path / "base", "org/tiny-base", "main")
    cached(cache, tmp_path / "patch", "org/tiny-patch", "v1.0")
    argv = port(tmp_path, "org/tiny-base", "org/tiny-patch@v1.0:1.0", "--offline")
    ran(child(argv, before=NO_NETWORK, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="0"))
    assert content(tmp_path / "out") == content(tmp_path / "local")
    inputs = json.loads((tmp_path / "out" / "edgeport.json").read_text())["inputs"]
    assert {"name": "org/tiny-base", "revision": COMMIT}.items() <= inputs["new_base"].items()
    assert {"name": "org/tiny-patch@v1.0", "revision": COMMIT}.items() <= inputs["patches"][0].items()
    argv = ["diagnose", "--patch", "org/tiny-patch@v1.0", "--new-base", "org/tiny-base", "--offline", "--json"]
    told = json.loads(ran(child(argv, HF_HUB_CACHE=str(cache))).stdout)
    assert (told["new_base"], told["patches"]) == ("org/tiny-base", ["org/tiny-patch@v1.0"])
    (tmp_path / "other").mkdir()
    other = str(patch(tmp_path / "other", tensors=factors(module="self_attn.none_such")))
    answer = child([*port(tmp_path, "org/tiny-base", other), "--overwrite", "--offline"], HF_HUB_CACHE=str(cache))
    assert "which org/tiny-base does not have" in answer.stderr


def test_a_folder_of_the_hub_s_cache_is_called_as_on_the_hub(tmp_path: Path) -> None:
    cached(tmp_path, tmp_path / "base", "gpt2", "main")
    folder = tmp_path / "models--gpt2" / "snapshots" / COMMIT
    assert (called(folder), called(folder / "model.gguf"), called(tmp_path)) == ("gpt2", "model.gguf", tmp_path.name)
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("another commit")
    assert called(folder) == f"gpt2@{COMMIT}"


def test_nothing_is_downloaded_that_is_not_read() -> None:
    """By huggingface_hub's own rule, of what repositories have beside a model."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "own.py"]
    beside = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "README.md"]
    assert list(filter_repo_objects([*wanted, *beside], allow_patterns=MODEL_FILES, ignore_patterns=NOT_READ)) == wanted


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
