"""The choice of tokens by our kernels for rows of any settings that these know: at most two kernels for all rows, and one copy from the host.

host    rules and end tokens of the rows, int64 [k * (14 + E)] -> one copy before each step
tokens  int64 [slots, M] on the GPU, of rows whose next token depends on them: kernels write them, so no step waits for the host
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from t5_trt.generation.sampling import variates_of
from t5_trt.generation.token_rules import RULES, TokenRules
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.kv_buffers import bucket_length
from t5_trt.runtime.recently_used import keep
from t5_trt.serving.rows import Row

#: settings whose numbers are kept, least recently used first out
KEPT = 256
_WIDTH = RULES.itemsize // 8


class RuledChoice:
    """Chooses tokens as ``generate()`` does for each request alone.

    Args:
        vocab_size: V.
        rows: most rows.
        device: of the logits, with `t5_trt.runtime.cuda_kernels.choice_kernels`; the thread's current one when it is made and called.
    """

    def __init__(self, vocab_size: int, rows: int, device: torch.device) -> None:
        self._device, self._drawn = device, cuda_kernels.drawn(vocab_size, device)
        self._kernel_draws = draws_as_torch(vocab_size, device)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._best = TokenRules.of([]).numbers(device, draws=False).view(np.int64)
        self._tokens = torch.zeros((rows, 0), dtype=torch.int64, device=device)
        self._free = list(range(rows))  # slots of `_tokens`

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row], places: Sequence[int], chosen: torch.Tensor) -> None:
        """Choose the tokens of some rows; this waits for nothing.

        Args:
            logits: float32 [R, V], which may be overwritten.
            rows: some of them, all plain, vacant or with `Prepared.rules`.
            places: of these rows.
            chosen: int64 [R], gets their tokens.
        """
        table = np.stack([self._numbers(row) for row in rows])
        numbers = table.view(RULES)[:, 0]
        numbers["place"], numbers["length"] = places, [row.next_length for row in rows]
        variates = self._prepare_draws(logits, rows, numbers) if numbers["draws"].any() else None
        looks_back = [at for at, row in enumerate(rows) if not row.vacant and _looks_back(row)]
        for at in looks_back:
            numbers["slot"][at], numbers["first"][at] = self._slot(rows[at]), rows[at].job.prepared.prompt[0]
        edits = len(looks_back) > 0 or bool((numbers["until"] > numbers["length"]).any())
        rules, ends = self._copied(rows, table, edits=edits)
        if edits:
            cuda_kernels.edit_scores(logits, rules, self._tokens, ends, None, len(rows))
        cuda_kernels.choose_tokens(logits, rules, variates, chosen, len(rows), self._tokens)

    def forget(self, row: Row) -> None:
        """Free what is kept of a row that is over; steps under way may still use it, which no later step does before them."""
        if row.slot is not None:
            self._free.append(row.slot)
            row.slot = None

    def _slot(self, row: Row) -> int:
        """Where the tokens of a row are, with room for all that it may have."""
        if row.slot is None:
            row.slot = self._free.pop()
            wanted = bucket_length(row.job.prepared.limit + 1)
            if wanted > self._tokens.shape[1]:
                wider = self._tokens.new_zeros((len(self._tokens), wanted))
                wider[:, : self._tokens.shape[1]] = self._tokens
                self._tokens = wider
        return row.slot

    def _prepare_draws(self, logits: torch.Tensor, rows: Sequence[Row], numbers: Any) -> torch.Tensor | None:
        """Give rows that draw what their generators stand at, and move these on; or draw their variates."""
        drawing = numbers["draws"].nonzero()[0].tolist()
        if self._kernel_draws:
            for at in drawing:
                numbers["seed"][at], numbers["offset"][at] = rows[at].pass_over(self._drawn, self._device)
            return None
        return variates_of(logits, {int(numbers["place"][at]): rows[at].generator(self._device) for at in drawing})

    def _copied(self, rows: Sequence[Row], table: Any, *, edits: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rules [k, 14] and end tokens [k, E] on the device."""
        lists = [_ends(row) for row in rows] if edits else [()]
        width = max(map(len, lists))
        memory = torch.empty(len(rows) * (_WIDTH + width), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        flat = memory.numpy()
        flat[: table.size] = table.reshape(-1)
        if width:
            ends = flat[table.size :].reshape(len(rows), width)
            ends.fill(-1)
            for own, its in zip(lists, ends, strict=True):
                its[: len(own)] = own
        on_device = memory.to(self._device, non_blocking=True)
        return on_device[: table.size].view(len(rows), _WIDTH), on_device[table.size :].view(len(rows), width)

    def _numbers(self, row: Row) -> Any:
        """What the kernels read of a row's settings, int64 [14]."""
        prepared = row.job.prepared
        if row.vacant or row.plain or (not row.hides_end and row.plain):  # it may have become plain just now
            return self._best
        assert prepared.choice is not None and prepared.rules is not None
        rules, draws = prepared.rules, prepared.do_sample
        return keep(self._kept, prepared.choice, KEPT, lambda: rules.numbers(self._device, draws=draws).view(np.int64))


def _ends(row: Row) -> tuple[int, ...]:
    rules = row.job.prepared.rules
    return () if rules is None else rules.ends


def _looks_back(row: Row) -> bool:
    rules = row.job.prepared.rules
    return rules is not None and rules.looks_back


@cache
def draws_as_torch(vocab_size: int, device: torch.device) -> bool:
    """Whether the kernel draws for a generator what torch draws: that depends on how torch deals numbers out to threads, which may change."""
    if device.type != "cuda":
        return False
    seeds, scores = (0, 1, 1 << 40, 12345), torch.zeros((4, vocab_size), device=device)
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
