"""Transformers folders, quantized or not, on the CPU or the device that there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.benchmark.runner import STEM, Judged, Pack, Tree, groups, opened, opening, together
from edgeport.device import choose
from edgeport.errors import need

if TYPE_CHECKING:
    from torch import Tensor

PACK_TOKENS, PACK_BRANCHES = 512, 256
WRITERS = 32
PACKABLE = {"full_attention", "sliding_attention", "chunked_attention", "global"}
"""Layers that a mask and positions tell all that there is of who sees whom, as configurations call them."""


class FolderRunner:
    def __init__(self, path: Path) -> None:
        import torch

        transformers: Any = need("transformers", "hf")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch: Any = torch
        self.device = choose("auto")
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
        self.opening = opening(lambda text: list(self.tokenizer(text)["input_ids"]), self.bare)
        # no device_map for unquantized weights: it would need accelerate
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        if self.model.device.type != self.device and not hasattr(self.model, "hf_quantizer"):
            self.model.to(self.device)
        alone = not packable(self.model)
        self.window = 0 if alone else sliding_window(self.model.config)
        self.writers = 1 if alone else WRITERS
        named = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.model.config.get_text_config().bos_token_id
        self.start = next((int(token) for token in named if token is not None), 0)
        self.positions = positions(self.model.config)

    def encode(self, text: str) -> list[int]:
        return opened(self.opening, self.bare(text))

    def bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def judge(self, trees: Sequence[Tree]) -> Iterator[Judged]:
        for group in groups(trees, PACK_TOKENS, PACK_BRANCHES):
            if all(tree.longest <= self.window for tree in group):
                pack = Pack.of(group)
                yield from self._judged(pack, self.mask(pack))
                continue
            for tree in group:
                # a mask of ours would take the place of the model's own, which only some layers cut off, or which is not all
                alone = (Pack.of([Tree(tree.prompt, [branch])]) for branch in tree.branches)
                yield together([judged for pack in alone for judged in self._judged(pack, None)])

    def _judged(self, pack: Pack, mask: Tensor | None) -> Iterator[Judged]:
        wanted = pack.wanted
        with self.torch.inference_mode():
            logits = self.model(
                input_ids=self._row(pack.ids), position_ids=self._row(pack.positions), attention_mask=mask,
                use_cache=False, logits_to_keep=self.torch.tensor(wanted, device=self.model.device),
            ).logits[0].float().cpu().numpy()  # fmt: skip
        place = {token: row for row, token in enumerate(wanted)}
        yield from pack.judged(lambda token: logits[place[token]])

    def _row(self, values: Sequence[int]) -> Tensor:
        row: Tensor = self.torch.tensor([values], device=self.model.device)
        return row

    def mask(self, pack: Pack) -> Tensor:
        """[1, 1, tokens, tokens] to be added to the attention scores: 0 where a token sees another, else the least number."""
        torch = self.torch
        tree, branch = torch.tensor(pack.trees), torch.tensor(pack.branches)
        order = torch.arange(len(tree))
        sees = (tree[:, None] == tree) & (order[:, None] >= order) & ((branch == STEM) | (branch[:, None] == branch))
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill_(~sees, torch.finfo(self.model.dtype).min)
        added: Tensor = mask[None, None].to(self.model.device)
        return added

    def write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str]) -> list[str]:
        several = (prompts[start : start + self.writers] for start in range(0, len(prompts), self.writers))
        return [text for some in several for text in self._write(some, tokens, stops)]

    def _write(self, prompts: Sequence[Sequence[int]], tokens: int, stops: Sequence[str]) -> list[str]:
        torch = self.torch
        width = max(map(len, prompts))
        padding = self.start if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=self.model.device)
        seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.model.device)

        added = self.tokenizer.added_tokens_decoder
        controls = {*self.tokenizer.all_special_ids, *(token for token, one in added.items() if one.special)}

        def stopped(rows: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(rows[:, width:])
            stopped_by = [any(one in text.lstrip() for one in stops) for text in texts]
            over = [last in controls for last in rows[:, -1].tolist()]
            return torch.tensor([one or other for one, other in zip(stopped_by, over, strict=True)], device=rows.device)  # type: ignore[no-any-return]

        with torch.inference_mode():
            rows = self.model.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
                pad_token_id=padding, temperature=None, top_p=None, top_k=None, stopping_criteria=[stopped],
            )  # fmt: skip
        # behind its end a row has padding, or what the model went on with while others wrote
        ends = [next((place for place, token in enumerate(row) if token in controls), tokens) for row in rows[:, width:].tolist()]
        return [self.tokenizer.decode(row[width : width + end]) for row, end in zip(rows, ends, strict=True)]


def packable(model: Any) -> bool:
    """Whether texts can share a row. Layers that carry a state along it, biases by the place in it (ALiBi) and windows that
    are cut out of it would let one text into the next, whatever the mask."""
    text = model.config.get_text_config()
    layers = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "attention_layers", None) or ())}
    placed = "position_ids" in signature(model.forward).parameters and not getattr(text, "alibi", False)
    return placed and not model._is_stateful and layers <= PACKABLE


def positions(config: Any) -> int:
    """Tokens that a text may have, by config.json: of a model that reads more than texts, its part for them says it."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize))


def sliding_window(config: Any) -> int:
    """Tokens that every layer attends to: by config.json, whose window may be in use or not."""
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if isinstance(window, int)), default=sys.maxsize)


def open_runner(path: Path) -> FolderRunner:
    return FolderRunner(path)
