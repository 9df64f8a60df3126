"""The rows that decode: their steps, the tokens that steps make, and their ends.

Where buffers remember what a step chose (on a GPU), the next `STEPS_AHEAD` steps start before the host has seen those tokens, and the
host's work is done meanwhile. So a request that ends by an end token has that many steps too many, whose tokens nobody gets; an end by a
length is known before. Where many rows decode, `STEPS_AT_ONCE` steps start at once: what the host does for a step takes longer than the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from t5_trt.runtime.cuda_graph import at_home
from t5_trt.runtime.kernel_rows import STEPS_AHEAD, STEPS_AT_ONCE
from t5_trt.runtime.row_buffers import RowSession
from t5_trt.serving.choice import TokenChoice
from t5_trt.serving.handle import Job
from t5_trt.serving.outbox import Outbox
from t5_trt.serving.rows import Row, StartedSteps
from t5_trt.serving.sources import EncodedSource
from t5_trt.validation import check_length

#: steps that decode a row without a request: a client that has its answer mostly asks again, and to move a row into the place costs more
VACANT_STEPS = 4
#: rows from which several steps start at once, as the host's part grows with them
MANY_ROWS = 32
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
        rows: in the order of the buffers; between two steps some are vacant, and their places go to new requests or are closed.
        active: number of rows that decode.
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
        self.active = 0
        self._holes: list[int] = []  # places of vacant rows
        self._place: int | None = None  # of the row that `add` gave last; None behind all others
        self._leaving: list[Row] = []  # have no place any more; their last tokens are on their way
        self._choosing = 0  # rows that do not always take the token of the largest logit
        self._started: deque[StartedSteps] = deque()  # steps whose tokens nobody has seen
        self._session, self._most, self._longest = session, most, longest
        self._limited = any(limit is not None for limit in longest)
        self._outbox, self._end, self._count = outbox, end, count
        with at_home(session.device):
            self._choice = TokenChoice(session.arch.vocab_size, most, session.device)
            self._buffers = session.row_buffers(most)

    def __len__(self) -> int:
        """The number of requests that have not ended."""
        return self.active + len(self._leaving)

    @property
    def busy(self) -> bool:
        """Whether there is something to do: rows, or steps whose tokens nobody has seen."""
        return self.active > 0 or bool(self._started)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._most - self.active

    def add(self, job: Job) -> None:
        """Give a request a free place; `take_in` must follow."""
        row = Row(job)
        self.active += 1
        self._choosing += not row.plain
        self._place = self._holes.pop() if self._holes else None
        if self._place is None:
            self.rows.append(row)
        else:
            self.rows[self._place] = row

    def take_in(self, source: EncodedSource) -> None:
        """Have the row of the last `add` decode from a source."""
        self._buffers.add(source.cross, source.bias, self._place)

    def make_room(self) -> None:
        """Free the places of rows whose last token is on its way, and end those that must not go on."""
        for row in self.rows:
            job = row.job
            if 0 < row.left <= row.under_way:
                if not row.vacant:
                    self._free(row)
                    self._leaving.append(row)
            elif (job.cancelled or job.deadline is not None or self._limited) and not row.vacant:
                reason = job.overdue() or self._too_long(row)
                if reason is not None:
                    self._leave(row, error=reason)

    def step(self, *, on_gpu: bool) -> None:
        """Decode one token of every row, and tell what steps have made; what is told waits in the outbox while rows decode on a GPU."""
        if self.active and self._buffers.remembers_tokens and not self._limited and not self._waits:
            self._started.append(self._start(STEPS_AT_ONCE if self.active >= MANY_ROWS else 1))
            self._tell(STEPS_AHEAD)
            self._outbox.send()
            return
        self._tell()
        if self.active:
            self._started.append(self._start())
            if on_gpu:
                self._outbox.send()
            self._tell()
        if not (on_gpu and self.active):
            self._outbox.send()
        if not self.active:
            self._close_holes()  # rows hold their requests

    @property
    def _waits(self) -> bool:
        """Whether the choice of a row's next token needs tokens on the host."""
        return self._choosing > 0 and any(map(self._choice.waits_for, self.rows))

    def fail(self) -> list[Job]:
        """Give up all rows; return their requests."""
        jobs = [row.job for row in (*(row for row in self.rows if not row.vacant), *self._leaving)]
        for row in self.rows:
            self._choice.forget(row)
        self.rows, self._holes, self._leaving, self._started = [], [], [], deque()
        self.active = self._choosing = 0
        return jobs

    def renew(self) -> None:
        """Take new buffers: nobody knows what is in the old ones."""
        self._buffers.release()
        self._buffers = self._session.row_buffers(self._most)

    def _start(self, count: int = 1) -> StartedSteps:
        """Start steps of all rows; on a GPU this waits for nothing but tokens that logits processors look at."""
        self._close_holes(0 if self._limited else VACANT_STEPS)
        rows, buffers, tokens = self.rows, self._buffers, []
        buffers.fit(count)
        failures: dict[int, Exception] = {}
        for step in range(count):
            if step:
                buffers.follow()
            else:
                buffers.feed(
                    [row.token for row in rows], [row.place for row in rows] if buffers.remembers_tokens else None
                )
            made = self._session.step_rows(buffers, best_only=not self._choosing)
            if self._choosing:
                made = self._choice(made, rows, failures)
                buffers.remember(made)
                self._choosing = sum(not (row.plain or row.vacant) for row in rows)
            tokens.append(buffers.fetch(made))
            for row in rows:
                row.under_way += 1
        for place, row in enumerate(rows):
            row.place = place
        return StartedSteps(list(rows), tokens, failures)

    def _tell(self, ahead: int = 0) -> None:
        """Give requests the tokens that steps made for them, but for those of so many steps; rows of those that end become free."""
        while self._started and sum(len(each.tokens) for each in self._started) - len(self._started[0].tokens) >= ahead:
            self._tell_of(self._started.popleft())

    def _tell_of(self, started: StartedSteps) -> None:
        """Give each request the tokens of some steps."""
        steps = [tokens.tolist() for tokens in started.tokens]  # the one wait for a GPU
        count, known = len(steps), not self._started
        for place, error in started.failures.items():
            if not started.rows[place].over:
                self._leave(started.rows[place], error=error)
        told = 0
        for row, tokens in zip(started.rows, zip(*steps, strict=True), strict=True):
            row.under_way -= count
            if known:
                row.place = -1
            if row.over:
                continue
            taken, over = row.take(tokens)
            told += taken
            if row.job.readers:
                self._outbox.tell(row.job)
            if over:
                self._leave(row, row.result)
        self._count(count, told)

    def _leave(self, row: Row, result: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """End a row's request."""
        row.over = True
        if row in self._leaving:
            self._leaving.remove(row)
        else:
            self._free(row)
        self._end(row.job, result, error)

    def _free(self, row: Row) -> None:
        """Free the place of a row."""
        row.vacant = True
        self._choice.forget(row)
        self.active -= 1
        self._holes.append(self.rows.index(row))
        self._choosing -= not row.plain

    def _close_holes(self, patience: int = 0) -> None:
        """Let the last rows take the places that nobody has taken for some steps, and give up the last places."""
        if not self._holes:
            return
        for place in sorted(self._holes, reverse=True):
            row = self.rows[place]
            if row.vacant_steps < patience and place < len(self.rows) - 1:
                row.vacant_steps += 1
                continue
            self._buffers.remove(place)
            self.rows[place] = self.rows[-1]
            self.rows.pop()
        self._holes = [place for place, row in enumerate(self.rows) if row.vacant]

    def _too_long(self, row: Row) -> BaseException | None:
        if not self._limited:
            return None
        limit, positions = self._longest
        try:
            check_length("target", self._buffers.position(self.rows.index(row)) + 1, limit, positions)
        except ValueError as error:
            return error
        return None
