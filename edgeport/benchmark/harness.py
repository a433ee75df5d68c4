"""Any output of edgeport under lm-evaluation-harness, with the harness's own tasks (pip install lm-eval):

python -m edgeport.benchmark.harness --model edgeport --model_args path=ported-Q4_K_M.gguf --tasks arc_easy
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeport.benchmark.runner import Runner, Tree, open_runner
from edgeport.benchmark.score import pair
from edgeport.errors import ConvertError, EdgeportError, MissingExtra, UnknownName

GIVEN = {"batch_size", "max_batch_size", "device"}
"""What the harness tells every model. Texts are packed here, and go to the device that there is."""
NEW_TOKENS = 256
"""What a task that says nothing may write."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names under which a task may say it, the first that it has before the others."""


@cache
def register() -> None:
    """Make `edgeport` a model that the harness knows. Raises MissingExtra."""
    if not find_spec("lm_eval"):
        raise MissingExtra("lm-evaluation-harness is not installed: pip install lm-eval")
    model: Any = import_module("lm_eval.api.model")
    registry: Any = import_module("lm_eval.api.registry")

    class Edgeport(model.LM):  # type: ignore[misc]
        """A GGUF file, or a folder of transformers or ONNX; each request's `args` are texts."""

        def __init__(self, path: str = "", max_length: int | None = None, **more: Any) -> None:
            super().__init__()
            check_arguments(path, max_length, more)
            self.runner = open_runner(Path(path))
            self.window = min(max_length or sys.maxsize, self.runner.positions)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            trees = [shortened(pair(self.runner, *request.args), self.runner.positions) for request in requests]
            return [(judged.loglikelihoods[0], judged.greedy[0]) for judged in self.runner.judge(trees)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [rolling(self.runner, request.args[0], self.window) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self.written(*request.args) for request in requests]

        def written(self, prompt: str, settings: dict[str, Any]) -> str:
            check_greedy(settings)
            until = settings.get("until") or []
            # an empty one stands at every text's begin, and the harness does not cut there either
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            tokens = longest(settings)
            seen = self.runner.encode(prompt)[-max(self.runner.positions - tokens, 1) :]
            text = self.runner.write([seen], tokens, stops)[0]
            return text[: min([len(text), *(at for stop in stops if (at := text.find(stop)) >= 0)])]

    registry.register_model("edgeport")(Edgeport)


def check_arguments(path: str, max_length: object, more: Mapping[str, Any]) -> None:
    """Raises UnknownName for what `--model_args` gives beside these, and without a path."""
    if unknown := more.keys() - GIVEN:
        names = ", ".join(sorted(unknown))
        raise UnknownName(f"--model_args {names}: edgeport's model takes path=MODEL and max_length=TOKENS alone")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise UnknownName(f"--model_args max_length={max_length}: tokens of a long text that are read at once were expected")
    if not path:
        raise UnknownName("--model_args has to be path=MODEL: a GGUF file, or a folder of transformers or ONNX")


def longest(settings: Mapping[str, Any]) -> int:
    """Tokens that a task may write."""
    return next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), NEW_TOKENS)


def check_greedy(settings: Mapping[str, Any]) -> None:
    """Raises UnknownName where a task wants to be written otherwise. A temperature means samples unless it says not."""
    sampled = settings.get("do_sample")
    if sampled is None:
        sampled = (settings.get("temperature") or 0) > 0
    if sampled or settings.get("num_beams", 1) != 1:
        raise UnknownName("the task wants samples or beams, and edgeport writes the likeliest token each time")


def shortened(tree: Tree, positions: int) -> Tree:
    """Without the begin of a prompt that has no place before its continuation, as the harness cuts its own models'.

    Raises ConvertError where the continuation alone has none.
    """
    after = tree.longest - len(tree.prompt)
    room = positions - after
    if room < 1:
        raise ConvertError(f"a continuation of {after + 1} tokens is too long for {positions} positions")
    return replace(tree, prompt=tree.prompt[-room:])


def rolling(runner: Runner, text: str, width: int) -> float:
    """Log-likelihood in nats of all of a text's tokens, each window of `width` of them after the one token before it, and the
    last, which may be shorter, after as many as there is room for: as in the harness' `get_rolling_token_windows`. Before the
    first stands the start token, also where the tokenizer has put one there, which then counts as a token of the text."""
    ids = [runner.start, *runner.encode(text)]
    windows = [(start, min(start + width, len(ids) - 1)) for start in range(0, len(ids) - 1, width)]
    trees = [Tree(ids[max(stop - width, 0) : start + 1], [ids[start + 1 : stop + 1]]) for start, stop in windows]
    return sum(judged.loglikelihoods[0] for judged in runner.judge(trees))


def main() -> int:
    try:
        register()
        import_module("lm_eval.__main__").cli_evaluate()
    except (EdgeportError, MissingExtra) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
