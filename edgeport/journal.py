"""The journal of a run: which weights are written, so that `--resume` goes on where an interruption has left it.

Beside the files that are being filled, one JSON object a line: first what the bytes depend on, then each finished weight,
with what the receipt tells of it and the hashes of what is stored. Nothing is synced for its sake: a weight whose bytes are
not what the journal says is made anew. What stands in a line that was cut off has not happened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.calibration import may_see
from edgeport.errors import BrokenOff, BudgetTooSmall, CorruptCheckpoint, EdgeportError, NotResumable, OutputExists, PatchLost
from edgeport.manifest import WeightFact, fingerprint, versions
from edgeport.places import journal_path, staging_path
from edgeport.staging import Written
from edgeport.steps import Step
from edgeport.tensor import TensorSpec

if TYPE_CHECKING:
    from edgeport.planning import Plan

Read = Callable[[TensorSpec, int, int], bytes | bytearray]
PIECE_BYTES = 1 << 20
ANEW = "leave off --resume to start anew"
MENDED = (OutputExists, BrokenOff, BudgetTooSmall, PatchLost)
"""What can be moved away, or had again, with other limits or with --force, by a run that writes the same."""


@dataclass(slots=True)
class Journal:
    """Of one output. `done`: finished weights by name, their bytes verified."""

    path: Path
    depends: Mapping[str, Any]
    resumed: bool
    """Whether the user asked to go on: then an interruption leaves the journal and the files."""
    done: dict[str, WeightFact] = field(default_factory=dict)
    lines: Sequence[Mapping[str, Any]] = ()
    """Of the weights that are done."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """What had become of the text that guides the rounding when the last of them was done (`Activations.state`)."""
    notes: tuple[str, ...] = ()

    def begin(self, staging: Path) -> None:
        """Write what is known, by way of a file in a folder that is cleared; what was cut off, or is not as it was, is gone."""
        anew = staging / self.path.name
        anew.write_text("".join(json.dumps(line) + "\n" for line in (self.depends, *self.lines)))
        os.replace(anew, self.path)  # whole, whenever it ends

    def add(self, step: Step, fact: WeightFact, digests: Mapping[str, str], text: Mapping[str, Any]) -> None:
        entry = {"weight": step.target.name, "fact": asdict(fact), "sha256": dict(digests), "text": dict(text)}
        line = json.dumps(entry) + "\n"
        # without a buffer of Python's: thousands of them scatter memory
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def outlives(self, error: BaseException | None) -> bool:
        """Whether the journal and the files are kept after such an end: not after a mistake that would come again."""
        again = isinstance(error, EdgeportError) and not isinstance(error, MENDED)
        return self.resumed and error is not None and not again


def opened(plan: Plan, steps: Sequence[Step], resume: bool) -> Journal:
    """The journal of an interrupted run where there is one and the user wants it; else a new one.

    Raises NotResumable where the interrupted run was of other inputs, or asked for something else.
    """
    path = journal_path(plan.target.output)
    interrupted = path.is_file()
    depends = json.loads(json.dumps(dependencies(plan, steps)))
    lines = list(entries(path)) if interrupted else []
    if not resume or not lines:
        cleared = "the files of an interrupted run were cleared away; " + (
            "its journal tells nothing" if resume else "with --resume a run goes on from there"
        )
        return Journal(path, depends, resume, notes=(cleared,) * interrupted)
    check_same(lines[0], depends)
    found = dict(verified(plan, steps, lines[1:]))
    told = f"{len(found)} of {len(steps)} weights were written before an interruption, and are as they were"
    kept = [line for line in lines[1:] if line.get("weight") in found]
    return Journal(path, depends, resume, found, kept, kept[-1]["text"] if kept else {}, (told,))


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not isinstance(entry, dict):
            return
        yield entry


def dependencies(plan: Plan, steps: Sequence[Step]) -> dict[str, Any]:
    """What the output's bytes depend on, as far as it can be told without reading all of it."""
    return {
        "inputs": plan.stamps,
        "fingerprints": [fingerprint(source) for source in (plan.source, plan.old) if source],
        "versions": versions(),
        "command": {
            # in their order: whole values take the place of what came before them
            "method": plan.method.to_json(), "patches": [[str(patch.path.resolve()), patch.scale] for patch in plan.patches],
            "steps": digest_of(steps), "tokens": plan.rule.tokens if may_see(steps, plan.rule) else 0,
            "device": plan.limits.device,
            "files": [[one.name, one.size, *(hashlib.sha256(blob).hexdigest() for _, blob in one.blobs)] for one in plan.files],
        },
    }  # fmt: skip


def digest_of(steps: Sequence[Step]) -> str:
    """sha256 of what is done to each weight: a list of it would stay in memory, and grow with the layers."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(json.dumps([step.target.name, step.action, step.target.format, step.rounding]).encode())
    return digest.hexdigest()


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises NotResumable, with what has changed."""
    inputs = before.get("inputs")
    if not isinstance(inputs, dict) or inputs.keys() != now["inputs"].keys():
        raise NotResumable(f"the interrupted run had other inputs; {ANEW}")
    changed = [name for name, facts in now["inputs"].items() if inputs[name] != facts]
    if changed or before.get("fingerprints") != now["fingerprints"]:
        raise NotResumable(f"{Path(changed[0]).name if changed else 'a base'} has changed since the run was interrupted; {ANEW}")
    if before.get("versions") != now["versions"]:
        raise NotResumable(f"the interrupted run was of other versions of edgeport or its libraries; {ANEW}")
    told = before.get("command")
    if isinstance(told, dict) and told | {"tokens": 0} == now["command"] | {"tokens": 0} and told != now["command"]:
        raise NotResumable(
            f"the interrupted run read {told.get('tokens')} tokens of text, and this one would read {now['command']['tokens']}; "
            f"give the --max-ram of before, or {ANEW}"
        )
    if told != now["command"]:
        raise NotResumable(f"the interrupted run was told otherwise (another --quant, --rounding, scale ...); {ANEW}")


def verified(plan: Plan, steps: Sequence[Step], lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, WeightFact]]:
    """The journal's weights whose stored bytes are as it says."""
    known = {step.target.name: step for step in steps}
    written = Written.of(staging_path(plan.target.output), plan.files)
    for line in lines:
        step = known.get(str(line.get("weight")))
        if step is None or line.get("sha256") != digests_at(step, written):
            continue
        fact = dict(line["fact"])
        yield step.target.name, WeightFact(**fact | {"shape": tuple(fact["shape"])})


def digests_at(step: Step, written: Written) -> dict[str, str] | None:
    """Hashes of a weight's stored tensors in the files of an interrupted run; None where they are not there."""
    try:
        return digests(step, written.read)
    except (OSError, CorruptCheckpoint):
        return None


def digests(step: Step, read: Read) -> dict[str, str]:
    """sha256 of each stored tensor of a weight, in small pieces. `read(spec, start, stop)` gives its bytes."""
    found = {}
    for part in step.target.parts.values():
        digest = hashlib.sha256()
        for start in range(0, part.spec.nbytes, PIECE_BYTES):
            digest.update(read(part.spec, start, min(start + PIECE_BYTES, part.spec.nbytes)))
        found[part.spec.name] = digest.hexdigest()
    return found

