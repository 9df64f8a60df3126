"""Greedy search and sampling after each decoder step, with Transformers' rules for rows that have ended.

It consists of torch operations on buffers of fixed size, so that a session may capture it as part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.generation.processors import CapturableProcessors
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.cuda_graph import outside_capture
from t5_trt.runtime.session import NextStep
from t5_trt.runtime.top_tokens import best

_STEP = 4  # a GPU generator's offsets are multiples of this


@dataclass(frozen=True)
class StopTokens:
    """When a row ends, and what pads it afterwards.

    Attributes:
        eos: token ids that end a row.
        pad: token id that pads rows after their end; None where Transformers continues to write tokens.
    """

    eos: tuple[int, ...] = ()
    pad: int | None = None


class RowTokenSelector:
    """Chooses one token for every row: the best, or a random one.

    Args:
        rows: R; a request may use only the first ones, the others are marked as finished.
        capacity: M, tokens that a row can have, with the prompt.
        process: of the logits.
        ending: see `StopTokens`.
        do_sample: draw instead of taking the best.
        device: of the buffers.

    Attributes:
        tokens: int64 [R, M], the prompt and what was chosen.
        finished: bool [R].
        report: int64 [1 + 2 R]: 1 after the last row has ended; 1 for each row that has ended; the tokens chosen last.
        expired: bool [1]; set from outside when time is up.
    """

    capturable = True
    moves_rows = False

    def __init__(
        self,
        rows: int,
        capacity: int,
        process: CapturableProcessors,
        ending: StopTokens,
        *,
        do_sample: bool,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.tokens = torch.zeros((rows, capacity), dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.report = torch.zeros(1 + 2 * rows, dtype=torch.int64, device=device)
        self.expired = torch.zeros(1, dtype=torch.bool, device=device)
        self.process = process
        self._eos = torch.tensor(ending.eos, dtype=torch.int64, device=device)
        self._pad = ending.pad
        self.draws = do_sample
        self.takes_best = not do_sample and (not process or process.hiding is not None)
        self.hiding = process.hiding
        self._chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        self.mailbox = cuda_kernels.mailbox(self.report)

    def load(self, processors: Sequence[Any]) -> None:
        """See `t5_trt.runtime.session.TokenSelector.load`."""
        self.process.load(processors)

    def begin(self, prompt: torch.Tensor, limit: int = 0, longest: int = 0) -> None:
        """Start with a prompt, int64 [at most R, tokens]; the other numbers are for beams."""
        self.tokens[:, : prompt.shape[1]] = pad_rows(prompt, self.rows)
        self.finished.zero_()
        self.finished[len(prompt) :] = True
        self.report.zero_()
        self.expired.zero_()
        if self.mailbox is not None:
            self.mailbox.start_anew()

    def take_over(self, other: RowTokenSelector, rows: torch.Tensor | None = None) -> None:
        """Continue from another selector's state, with all of its rows or only `rows`."""
        for mine, theirs in ((self.tokens, other.tokens), (self.finished, other.finished)):
            mine.copy_(theirs if rows is None else theirs[pad_rows(rows, self.rows)])
        if rows is not None:
            self.finished[len(rows) :] = True
        self.expired.copy_(other.expired)
        if self.mailbox is not None:
            self.mailbox.start_anew()

    def results(self, length: int) -> tuple[torch.Tensor, ...]:
        """The tokens of every row, with padding from `length` on."""
        if self._pad is not None:
            self.tokens[:, length:] = self._pad
        return (self.tokens,)

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, None] | None:
        """Choose the tokens at ``position + 1``.

        Args:
            logits: float32 [R, V].
            position: int64 [1], of the tokens that the logits follow.
            following: see `t5_trt.runtime.session.TokenSelector.advance`.

        Returns:
            The tokens, int64 [R]; no rows change places. None if `following` was written completely.
        """
        if following is not None and following.best is not None:
            chosen = self._chosen
        elif self.process.chooses:
            chosen = self._chosen
            variates = exponential_variates(logits) if self.draws else None
            self.process.choose(self.tokens, position, logits, variates, chosen)
        else:
            scores = self.process.overwrite(self.tokens, position, logits)
            chosen = draw(scores, 1, capturable=self.capturable).flatten() if self.draws else best(scores)
        buffers = (chosen, self.tokens, self.finished, self.report, self.expired, self._eos)
        if cuda_kernels.token_step(buffers, position, self._pad, following, self.mailbox):
            return None if following is not None else (chosen, None)
        if following is not None and following.best is not None:
            chosen = ~following.best[: self.rows] & 0xFFFFFFFF
            following.best.zero_()
        if self._pad is not None:
            chosen = chosen.masked_fill(self.finished, self._pad)
        self.tokens.index_copy_(1, position + 1, chosen[:, None])
        if len(self._eos):
            self.finished |= (chosen[:, None] == self._eos).any(-1)
        self.report[:1] = self.finished.all() | self.expired
        self.report[1 : 1 + len(chosen)] = self.finished
        self.report[1 + len(chosen) :] = chosen
        return chosen, None


def pad_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Pad to `count` rows by repeating the first."""
    return rows if len(rows) == count else torch.cat((rows, rows[:1].expand(count - len(rows), *rows.shape[1:])))


class GpuDraws:
    """Restores the GPU's generator to the state before steps beyond the end.

    So the next call draws as it would after Transformers' loop, which runs no such steps. On a CPU there are none.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._generator = torch.cuda.default_generators[device.index or 0] if on_gpu else None
        with outside_capture() if on_gpu else nullcontext():
            self._start = int(self._generator.get_offset()) if self._generator else 0

    def rewind(self, launched: int, counted: int) -> None:
        """Keep the draws of the first `counted` of `launched` steps, all of which drew the same number."""
        if self._generator is None or launched <= counted:
            return
        with outside_capture():
            each, rest = divmod(int(self._generator.get_offset()) - self._start, launched)
            if each > 0 and not rest and each % _STEP == 0:  # or another thread drew or seeded meanwhile
                self._generator.set_offset(self._start + each * counted)


def draw(scores: torch.Tensor, count: int, *, capturable: bool) -> torch.Tensor:
    """Draw without replacement: the indices that ``torch.multinomial`` gives for the same state of the global generator.

    Args:
        scores: float32 [rows, V], logarithms of the probabilities up to a constant for each row.
        count: indices for each row.
        capturable: leave out ``torch.multinomial``'s check of its input, which waits for the device.

    Returns:
        int64 [rows, count].
    """
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    if not capturable:
        with _drawing(scores):
            return torch.multinomial(probabilities, count)
    keys = _keys(probabilities, exponential_variates(scores))
    return keys.argmax(-1, keepdim=True) if count == 1 else keys.topk(count).indices


def exponential_variates(scores: torch.Tensor) -> torch.Tensor:
    """As many as there are scores, from the global generator of their device."""
    with _drawing(scores):
        return torch.empty_like(scores).exponential_()


def draw_each(scores: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw an index for each row from its own generator: the one that ``torch.multinomial`` gives for that row alone.

    Args:
        scores: float32 [rows, V], as of `draw`.
        generators: of the rows, on the device.

    Returns:
        int64 [rows].
    """
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    return _keys(probabilities, variates_of(scores, dict(enumerate(generators)))).argmax(-1)


def variates_of(scores: torch.Tensor, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """As `exponential_variates`, but each row's are those that its own generator gives for it alone; rows without one get none."""
    variates = torch.empty_like(scores)
    with _drawing(scores):
        for row, generator in generators.items():
            variates[row : row + 1].exponential_(generator=generator)
    return variates


def _drawing(scores: torch.Tensor) -> AbstractContextManager[Any]:
    return outside_capture() if scores.is_cuda else nullcontext()


def _keys(probabilities: torch.Tensor, variates: torch.Tensor) -> torch.Tensor:
    """Numbers whose largest ones are draws: dividing by exponential variates is how ``torch.multinomial`` draws.

    Source: aten/src/ATen/native/Distributions.cpp; https://github.com/pytorch/pytorch/issues/11931.
    """
    return probabilities / variates
