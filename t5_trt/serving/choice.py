"""The choice of tokens of rows that sample or have processors: rows of equal settings choose together.

    logits [R, V] ── hide end tokens of rows that take none yet ── best ──> tokens [R] of most rows
                  └─ rows of one `Prepared`: [k, V] ── processors ── best, or drawn ──> tokens [k] in their places
                         places, lengths and histories of the rows: one copy from the host, int64 [k, 2 + M]

A choice is ten to thirty of torch's operations, whether of one row or of many. Only draws are one operation a row, as each row has its generator.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch

from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.sampling import draw_each
from t5_trt.runtime.top_tokens import best
from t5_trt.serving.rows import Row
from t5_trt.serving.settings import Prepared


class TokenChoice:
    """Chooses tokens as ``generate()`` does for each request alone.

    Args:
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._forms: weakref.WeakKeyDictionary[Prepared, dict[int, CapturableProcessors | None]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, logits: torch.Tensor, rows: Sequence[Row], failures: dict[int, Exception]) -> torch.Tensor:
        """The next token of every row, int64 [R]; on a GPU this does not wait, unless a processor has no form that does not.

        Args:
            logits: float32 [R, V], which may be overwritten.
            rows: those of the logits; who has become `plain` says so afterwards.
            failures: gets errors of single rows by their place.
        """
        groups = self._groups(self._hide_ends(logits, rows), rows)
        chosen = best(logits)
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

    def _choose(self, logits: torch.Tensor, rows: list[Row], places: list[int], chosen: torch.Tensor) -> None:
        """Choose the tokens of rows that choose together."""
        prepared, room = rows[0].job.prepared, rows[0].room
        facts = np.empty((len(rows), 2 + room), dtype=np.int64)
        for fact, row, place in zip(facts, rows, places, strict=True):
            fact[0], fact[1] = place, row.length - 1
            fact[2:] = row.history[:room]
        at, position, history = torch.from_numpy(facts).to(self._device, non_blocking=True).tensor_split((1, 2), dim=1)
        scores = logits.index_select(0, at[:, 0])
        process = self._processors(prepared, room)
        if process is not None:
            scores = process(history, position, scores)
        else:  # one row
            for processor in prepared.processors:
                scores = processor(history[:, : rows[0].length], scores)
        if prepared.do_sample:
            tokens = draw_each(scores, [row.generator(self._device) for row in rows])
        else:
            tokens = best(scores)
        chosen.index_copy_(0, at[:, 0], tokens)

    def _groups(self, places: list[int], rows: Sequence[Row]) -> list[list[int]]:
        """Places of rows that choose together."""
        together: dict[tuple[Prepared, int], list[int]] = {}
        alone: list[list[int]] = []
        for place in places:
            key = rows[place].job.prepared, rows[place].room
            if self._share(*key):
                together.setdefault(key, []).append(place)
            else:
                alone.append([place])
        return [*together.values(), *alone]

    def _share(self, prepared: Prepared, room: int) -> bool:
        """Whether several rows get the tokens that each would get alone."""
        try:
            process = self._processors(prepared, room)
        except Exception:  # a value that cannot be used; each row's own choice raises it again
            return False
        return process is not None and (process.by_row or self._device.type == "cpu")

    def _processors(self, prepared: Prepared, room: int) -> CapturableProcessors | None:
        """The forms of a request's processors that do not wait for a GPU, for a width of histories; None where one of them has none."""
        known = self._forms.setdefault(prepared, {})
        if room not in known:
            forms = capturable_processors(prepared.processors, self._vocab_size, room, self._device)
            known[room] = None if forms is None else CapturableProcessors(forms)
        return known[room]

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
