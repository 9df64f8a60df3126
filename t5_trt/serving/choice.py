"""The choice of tokens of rows that sample or have processors: those that kernels know by `RuledChoice`, others that choose alike together.

    logits [R, V] ── hide end tokens of rows that take none yet ── best ──> tokens [R] of most rows
                  ├─ rows with `Prepared.rules` on a GPU ── ruled_choice.py
                  └─ rows of one `Prepared.choice`: [k, V] ── processors ── best, or drawn ──> tokens [k] in their places
                         lengths and histories of the rows: one copy from the host, int64 [k, 1 + M]

A choice is ten to thirty of torch's operations, whether of one row or of many. Only draws are one operation a row, as each row has its generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.sampling import draw_each
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.cuda_graph import at_home
from t5_trt.runtime.recently_used import keep
from t5_trt.runtime.top_tokens import best
from t5_trt.serving.rows import Row
from t5_trt.serving.ruled_choice import RuledChoice
from t5_trt.serving.settings import Prepared

#: scores that a CPU processes together: more of them leave its cache between two operations
CACHED_SCORES = 1 << 16
#: forms of processors that are kept, least recently used first out
KEPT = 64


class TokenChoice:
    """Chooses tokens as ``generate()`` does for each request alone.

    Args:
        vocab_size: V.
        rows: most rows.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, rows: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._forms: OrderedDict[tuple[str, int], CapturableProcessors] = OrderedDict()
        by_kernels = cuda_kernels.choice_kernels(device, vocab_size)
        self._ruled = RuledChoice(vocab_size, rows, device) if by_kernels else None

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row], failures: dict[int, Exception]) -> torch.Tensor:
        """The next token of every row, int64 [R]; on a GPU this does not wait, unless a processor has no form that does not.

        Args:
            logits: float32 [R, V], which may be overwritten.
            rows: those of the logits; who has become `plain` says so afterwards.
            failures: gets errors of single rows by their place.
        """
        if self._ruled is None:
            places, chosen = self._hide_ends(logits, rows), best(logits)
        else:
            waits = [self.waits_for(row) for row in rows]
            places, ruled = (
                [place for place, each in enumerate(waits) if each == waiting] for waiting in (True, False)
            )
            chosen = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
            if ruled:
                with at_home(self._device):
                    self._ruled(logits, [rows[place] for place in ruled], ruled, chosen)
        groups = self._groups(places, rows)
        while groups:
            places = groups.pop()
            try:
                self._choose(logits, [rows[place] for place in places], places, chosen)
            except Exception as error:
                if len(places) == 1:  # of this request alone
                    failures[places[0]] = error
                else:
                    groups += [[place] for place in places]
        return chosen

    def waits_for(self, row: Row) -> bool:
        """Whether the host must know all of a row's tokens before it can start the choice of the next one."""
        prepared = row.job.prepared
        if row.plain or row.vacant:
            return False
        return prepared.hidden_until == 0 if self._ruled is None else prepared.rules is None

    def forget(self, row: Row) -> None:
        """Free what is kept of a row that is over."""
        if self._ruled is not None:
            self._ruled.forget(row)

    def _choose(self, logits: torch.Tensor, rows: list[Row], places: list[int], chosen: torch.Tensor) -> None:
        """Choose the tokens of rows that choose alike."""
        prepared = rows[0].job.prepared
        at = self._at(places)
        scores = logits[at]
        if prepared.processors:
            scores = self._processed(scores, rows)
        if prepared.do_sample:
            chosen[at] = draw_each(scores, [row.generator(self._device) for row in rows])
        else:
            chosen[at] = best(scores)

    def _at(self, places: list[int]) -> Any:
        """An index of the places: a slice where it can be, which costs nothing."""
        if places[-1] - places[0] == len(places) - 1:
            return slice(places[0], places[-1] + 1)
        return torch.tensor(places).to(self._device, non_blocking=True)

    def _processed(self, scores: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Scores [k, V] after the processors of rows that choose alike."""
        prepared, room = rows[0].job.prepared, max(row.room for row in rows)
        facts = np.zeros((len(rows), 1 + room), dtype=np.int64)
        for fact, row in zip(facts, rows, strict=True):
            fact[0], fact[1 : 1 + row.room] = row.length - 1, row.history[: row.room]
        on_device = torch.from_numpy(facts).to(self._device, non_blocking=True)
        if prepared.choice is not None:
            return self._processors(prepared, room)(on_device[:, 1:], on_device[:, :1], scores)
        for processor in prepared.processors:  # one row
            scores = processor(on_device[:, 1 : 1 + rows[0].length], scores)
        return scores

    def _groups(self, places: list[int], rows: Sequence[Row]) -> list[list[int]]:
        """Places of rows that choose together."""
        together: dict[str, list[int]] = {}
        alone: list[list[int]] = []
        for place in places:
            prepared = rows[place].job.prepared
            if prepared.choice is not None and (prepared.by_row or self._device.type == "cpu"):
                together.setdefault(prepared.choice, []).append(place)
            else:
                alone.append([place])
        most = len(rows) if self._device.type == "cuda" else max(1, CACHED_SCORES // self._vocab_size)
        return [*(group[at : at + most] for group in together.values() for at in range(0, len(group), most)), *alone]

    def _processors(self, prepared: Prepared, room: int) -> CapturableProcessors:
        """The forms of a request's processors, for a width of histories."""
        assert prepared.choice is not None
        key = prepared.choice, room

        def make() -> CapturableProcessors:
            forms = capturable_processors(prepared.processors, self._vocab_size, room, self._device)
            assert forms is not None
            return CapturableProcessors(forms)

        return keep(self._forms, key, KEPT, make)

    def _hide_ends(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        """Hide the end tokens of rows that take none yet and do nothing else; the places of rows that choose in other ways."""
        choosing: list[int] = []
        hidden: dict[frozenset[int], list[int]] = {}  # places by end tokens
        for place, row in enumerate(rows):
            if row.plain or row.vacant:
                continue
            if row.hides_end:
                hidden.setdefault(row.job.prepared.eos, []).append(place)
            elif not row.plain:
                choosing.append(place)
        for ends, places in hidden.items():
            known = [end for end in ends if 0 <= end < logits.shape[1]]
            at, tokens = (torch.tensor(each).to(logits.device, non_blocking=True) for each in (places, known))
            logits[at[:, None], tokens.long()] = -torch.inf
        return choosing
