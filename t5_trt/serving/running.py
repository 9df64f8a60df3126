"""The rows that decode: their steps, the tokens that steps make, and their ends.

Where buffers remember what a step chose (on a GPU), the next step starts before the host has seen those tokens, and the host's work is
done meanwhile. So a request that ends by an end token has one step too many, whose token nobody gets; an end by a length is known before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from t5_trt.generation.processors import CapturableProcessors
from t5_trt.runtime.row_buffers import RowSession
from t5_trt.runtime.top_tokens import best
from t5_trt.serving.groups import at_home
from t5_trt.serving.handle import Job
from t5_trt.serving.outbox import Outbox
from t5_trt.serving.rows import Row, StartedStep, device_processors
from t5_trt.serving.settings import Prepared
from t5_trt.serving.sources import EncodedSource
from t5_trt.validation import check_length

#: ends a request with a result or an error
End = Callable[[Job, torch.Tensor | None, BaseException | None], None]


class RunningRows:
    """The rows of one scheduler. Used by one thread.

    Args:
        session: of the model.
        most: rows.
        longest: most target tokens by the configuration, and by the model's positions; None: no limit.
        outbox: gets the tokens.
        end: gets the ends.
        count: gets numbers of steps and of tokens.

    Attributes:
        rows: in use, in the order of the buffers.
    """

    def __init__(
        self,
        session: RowSession,
        most: int,
        longest: tuple[int | None, int | None],
        outbox: Outbox,
        end: End,
        count: Callable[[int, int], None],
    ) -> None:
        self.rows: list[Row] = []
        self._leaving: list[Row] = []  # have no place any more; their last tokens are on their way
        self._choosing = 0  # rows that do not always take the token of the largest logit
        self._started: StartedStep | None = None  # the step whose tokens nobody has seen
        self._session, self._most, self._longest = session, most, longest
        self._limited = any(limit is not None for limit in longest)
        self._outbox, self._end, self._count = outbox, end, count
        self._processing: weakref.WeakKeyDictionary[Prepared, CapturableProcessors | None] = weakref.WeakKeyDictionary()
        with at_home(session.device):
            self._buffers = session.row_buffers(most)

    def __len__(self) -> int:
        """The number of requests that have not ended."""
        return len(self.rows) + len(self._leaving)

    @property
    def busy(self) -> bool:
        """Whether there is something to do: rows, or a step whose tokens nobody has seen."""
        return bool(self.rows) or self._started is not None

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._most - len(self.rows)

    def add(self, job: Job) -> None:
        """Give a request a free place; `take_in` must follow."""
        row = Row(job, self._processors)
        self.rows.append(row)
        self._choosing += not row.plain

    def take_in(self, source: EncodedSource) -> None:
        """Have the last row decode from a source."""
        self._buffers.add(source.cross, source.bias)

    def make_room(self) -> None:
        """Free the places of rows whose last token is on its way, and end those that must not go on."""
        for row in list(self.rows):
            job = row.job
            if row.place >= 0 and row.left == 1:
                self._free(row)
                self._leaving.append(row)
            elif job.cancelled or job.deadline is not None or self._limited:
                reason = job.overdue() or self._too_long(row)
                if reason is not None:
                    self._leave(row, error=reason)

    def step(self, *, on_gpu: bool) -> None:
        """Decode one token of every row, and tell what steps have made; what is told waits in the outbox while rows decode on a GPU."""
        if self.rows and self._buffers.remembers_tokens and not self._limited and not self._choosing:
            before, self._started = self._started, self._start()
            self._tell(before)
            self._outbox.send()
            return
        self._tell(self._started)
        if self.rows:
            self._started = self._start()
            if on_gpu:
                self._outbox.send()
            self._tell(self._started)
        if not (on_gpu and self.rows):
            self._outbox.send()

    def fail(self) -> list[Job]:
        """Give up all rows; return their requests."""
        jobs = [row.job for row in (*self.rows, *self._leaving)]
        self.rows, self._leaving, self._started, self._choosing = [], [], None, 0
        return jobs

    def renew(self) -> None:
        """Take new buffers: nobody knows what is in the old ones."""
        self._buffers.release()
        self._buffers = self._session.row_buffers(self._most)

    def _start(self) -> StartedStep:
        """Start a step of all rows; on a GPU this waits for nothing but tokens that logits processors look at."""
        rows, buffers = self.rows, self._buffers
        buffers.fit()
        buffers.feed([row.token for row in rows], [row.place for row in rows] if buffers.remembers_tokens else None)
        made = self._session.step_rows(buffers, best_only=not self._choosing)
        failures: dict[int, Exception] = {}
        if self._choosing:
            made = self._chosen(made, failures)
        for place, row in enumerate(rows):
            row.place = place
        return StartedStep(list(rows), buffers.fetch(made), failures)

    def _tell(self, started: StartedStep | None) -> None:
        """Give each request the token that a step made for it; rows of those that end with it become free."""
        if started is None:
            return
        tokens = started.tokens.tolist()  # the one wait for a GPU
        latest, told = started is self._started, 0
        if latest:
            self._started = None
        for place, (row, token) in enumerate(zip(started.rows, tokens, strict=True)):
            if row.over:
                continue
            if latest:
                row.place = -1
            if started.failures and place in started.failures:
                self._leave(row, error=started.failures[place])
                continue
            told += 1
            self._outbox.put(row.job, token)
            result = row.take(token)
            if result is not None:
                self._leave(row, result)
        self._count(1, told)

    def _chosen(self, logits: torch.Tensor, failures: dict[int, Exception]) -> torch.Tensor:
        """The next token of every row, int64 [rows], where the logits are; errors of single rows by their place."""
        chosen = best(logits)
        for place, row in enumerate(self.rows):
            if not row.plain:
                try:
                    chosen[place : place + 1] = row.choose(logits[place : place + 1])
                except Exception as error:  # of this request alone
                    failures[place] = error
        return chosen

    def _leave(self, row: Row, result: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """End a row's request."""
        row.over = True
        if row in self._leaving:
            self._leaving.remove(row)
        else:
            self._free(row)
        self._end(row.job, result, error)

    def _free(self, row: Row) -> None:
        """Free the place of a row; the last one takes it."""
        place = self.rows.index(row)
        self._buffers.remove(place)
        self._choosing -= not row.plain
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def _too_long(self, row: Row) -> BaseException | None:
        if not self._limited:
            return None
        limit, positions = self._longest
        try:
            check_length("target", self._buffers.position(self.rows.index(row)) + 1, limit, positions)
        except ValueError as error:
            return error
        return None

    def _processors(self, prepared: Prepared) -> CapturableProcessors | None:
        """See `device_processors`; equal settings have the same."""
        if prepared not in self._processing:
            session = self._session
            self._processing[prepared] = device_processors(prepared, session.arch.vocab_size, session.device)
        return self._processing[prepared]
