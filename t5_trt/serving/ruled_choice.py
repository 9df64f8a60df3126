"""The choice of tokens by our kernels for rows of any settings that these know: two kernels for all of them, and one copy from the host.

rules, end tokens and histories of the rows: int64 [k * (12 + E + M)]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from t5_trt.generation.token_rules import RULES, TokenRules
from t5_trt.runtime import cuda_kernels
from t5_trt.serving.rows import Row
from t5_trt.serving.settings import Prepared

#: settings whose numbers are kept, least recently used first out
KEPT = 256
_WIDTH = RULES.itemsize // 8


class RuledChoice:
    """Chooses tokens as ``generate()`` does for each request alone.

    Args:
        vocab_size: V.
        device: of the logits, with `t5_trt.runtime.cuda_kernels.choice_kernels`.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device, self._drawn = device, cuda_kernels.drawn(vocab_size, device)
        self._kernel_draws = draws_as_torch(vocab_size, device)
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row], places: Sequence[int], chosen: torch.Tensor) -> None:
        """Choose the tokens of some rows; this waits for nothing.

        Args:
            logits: float32 [R, V], which may be overwritten.
            rows: some of them, all with `Prepared.rules`.
            places: of these rows.
            chosen: int64 [R], gets their tokens.
        """
        variates = None
        numbers = np.concatenate([self._numbers(row.job.prepared) for row in rows])
        numbers["place"], numbers["length"] = places, [row.next_length for row in rows]
        if numbers["draws"].any():
            variates = self._prepare_draws(logits, rows, numbers)
        edits = bool(
            ((numbers["penalty"] != 1) | (numbers["ngram"] > 0) | (numbers["until"] > numbers["length"])).any()
        )
        table, ends, tokens = self._copied(rows, numbers, edits=edits)
        if edits:
            cuda_kernels.edit_scores(logits, table, tokens, ends, None)
        cuda_kernels.choose_tokens(logits, table, variates, chosen, len(rows))

    def _prepare_draws(self, logits: torch.Tensor, rows: Sequence[Row], numbers: Any) -> torch.Tensor | None:
        """Give rows that draw what their generators stand at, and move these on; or draw their variates."""
        drawing = numbers["draws"].nonzero()[0].tolist()
        if self._kernel_draws:
            for at in drawing:
                numbers["seed"][at], numbers["offset"][at] = rows[at].pass_over(self._drawn, self._device)
            return None
        variates = torch.empty_like(logits)
        for at in drawing:
            variates[int(numbers["place"][at])].exponential_(generator=rows[at].generator(self._device))
        return variates

    def _copied(self, rows: Sequence[Row], numbers: Any, *, edits: bool) -> tuple[torch.Tensor, ...]:
        """Rules [k, 12], end tokens [k, E] and histories [k, M] on the device."""
        count, lists = len(rows), [_rules(row.job.prepared).ends if edits else () for row in rows]
        room = max((row.room for row in rows if row.looks_back), default=0) if edits else 0
        widths = (_WIDTH, max(map(len, lists)), room)
        memory = torch.empty(count * sum(widths), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        flat = memory.numpy()
        flat[: count * _WIDTH] = numbers.view(np.int64)
        ends, tokens = (part.reshape(count, -1) for part in np.split(flat[count * _WIDTH :], [count * widths[1]]))
        ends.fill(-1)
        for row, own, its_ends, history in zip(rows, lists, ends, tokens, strict=True):
            its_ends[: len(own)] = own
            if row.looks_back and edits:
                history[: row.room] = row.history[: row.room]
        parts = memory.to(self._device, non_blocking=True).split([count * width for width in widths])
        return tuple(part.view(count, width) for part, width in zip(parts, widths, strict=True))

    def _numbers(self, prepared: Prepared) -> Any:
        """What the kernels read of a request's settings, `RULES` [1]."""
        assert prepared.choice is not None
        if prepared.choice not in self._kept:
            self._kept[prepared.choice] = _rules(prepared).numbers(self._device, draws=prepared.do_sample)
        self._kept.move_to_end(prepared.choice)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[prepared.choice]


def _rules(prepared: Prepared) -> TokenRules:
    assert prepared.rules is not None
    return prepared.rules


@cache
def draws_as_torch(vocab_size: int, device: torch.device) -> bool:
    """Whether the kernel draws for a generator what torch draws: that depends on how torch deals numbers out to threads, which may change."""
    seeds, scores = (0, 1, 1 << 40, 12345), torch.zeros((4, vocab_size), device=device)
    if device.type != "cuda":
        return False
    numbers = np.repeat(TokenRules.of([]).numbers(device, draws=True), len(seeds))
    wanted = []
    for place, seed in enumerate(seeds):
        generator = torch.Generator(device).manual_seed(seed)
        torch.empty((1, vocab_size), device=device).exponential_(generator=generator)
        numbers["place"][place], numbers["seed"][place] = place, seed
        numbers["offset"][place] = generator.get_offset()
        wanted.append(torch.empty((1, vocab_size), device=device).exponential_(generator=generator).argmin())
    table = torch.from_numpy(numbers.view(np.int64).reshape(len(seeds), -1)).to(device)
    chosen = torch.zeros(len(seeds), dtype=torch.int64, device=device)
    cuda_kernels.choose_tokens(scores, table, None, chosen, len(seeds))
    return torch.equal(chosen, torch.stack(wanted))
