"""Any output of edgeport under lm-evaluation-harness, with the harness's own tasks (pip install lm-eval):

python -m edgeport.benchmark.harness --model edgeport --model_args path=ported-Q4_K_M.gguf --tasks arc_easy
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgeport.benchmark.runner import Runner, Tree, open_runner
from edgeport.benchmark.score import pair
from edgeport.errors import need

WINDOW = 1024
"""Tokens of a long text that are read at once."""
NEW_TOKENS = 256
"""What a task that says nothing may write."""


@cache
def register() -> None:
    """Make `edgeport` a model that the harness knows. Raises MissingExtra."""
    model: Any = need("lm_eval.api.model", "lm-eval")
    registry: Any = need("lm_eval.api.registry", "lm-eval")

    class Edgeport(model.LM):  # type: ignore[misc]
        """A GGUF file or a transformers folder; each request's `args` are texts."""

        def __init__(self, path: str, **_: Any) -> None:
            super().__init__()
            self.runner = open_runner(Path(path))

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            trees = [pair(self.runner, *request.args) for request in requests]
            return [(judged.loglikelihoods[0], judged.greedy[0]) for judged in self.runner.judge(trees)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [rolling(self.runner, request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self.written(*request.args) for request in requests]

        def written(self, prompt: str, settings: dict[str, Any]) -> str:
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            tokens = settings.get("max_gen_toks", NEW_TOKENS)
            text = self.runner.write([self.runner.encode(prompt)], tokens, stops)[0]
            return text[: min([len(text), *(at for stop in stops if (at := text.find(stop)) >= 0)])]

    registry.register_model("edgeport")(Edgeport)


def rolling(runner: Runner, text: str) -> float:
    """Log-likelihood in nats of all of a text's tokens, each window of them after the one token before it."""
    ids = [*(() if runner.encode("") else (runner.start,)), *runner.encode(text)]
    width = min(WINDOW, runner.positions)
    trees = [Tree(ids[at : at + 1], [ids[at + 1 : at + 1 + width]]) for at in range(0, len(ids) - 1, width)]
    return sum(judged.loglikelihoods[0] for judged in runner.judge(trees))


def main() -> None:
    register()
    program: Any = need("lm_eval.__main__", "lm-eval")
    program.cli_evaluate()


if __name__ == "__main__":
    main()
