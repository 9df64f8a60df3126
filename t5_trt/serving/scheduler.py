"""The loop: between two decoder steps requests leave their rows, and waiting ones take them."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import torch

from t5_trt.errors import EngineClosedError, QueueFullError
from t5_trt.runtime.kv_buffers import bucket_length
from t5_trt.runtime.row_buffers import SMALLEST_SOURCE, RowSession
from t5_trt.serving.groups import GroupRunner, closed
from t5_trt.serving.handle import Job
from t5_trt.serving.rows import Row
from t5_trt.serving.stats import Stats
from t5_trt.validation import check_length

logger = logging.getLogger("t5_trt")

#: source tokens that are encoded between two steps, unless one source alone has more: rows in use wait for them
ENCODED_TOKENS = 1024
#: how often waiting groups are looked through for cancelled ones while no row is in use
_LOOK_S = 0.05
#: seconds that the exit of the interpreter waits for threads: Python aborts a process whose daemon threads are inside of torch
_EXIT_S = 5.0
_running: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    schedulers = list(_running)
    for scheduler in schedulers:
        scheduler.stop()
    for scheduler in schedulers:
        scheduler.join(_EXIT_S)


class Scheduler:
    """Runs requests of one model in a thread of its own.

    Args:
        model: a `TRTT5ForConditionalGeneration`.
        session: of the model; its decoder takes rows at positions of their own.
        max_rows: requests that decode at a time.
        max_waiting: requests that may wait.
    """

    def __init__(self, model: Any, session: RowSession, max_rows: int, max_waiting: int) -> None:
        self._session = session
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._longest = (model.runtime_config.max_target_tokens, session.arch.longest_target)
        self._rows: list[Row] = []
        self._entering: list[list[Job]] = []  # batches that have left the queue and have no rows yet
        self._buffers = session.row_buffers(max_rows)
        self._lock = threading.Lock()  # of what waits, and of the counts
        self._waiting: deque[Job] = deque()
        self._groups = GroupRunner(model, self._lock, self._count)
        self._stats = Stats()
        self._calls: SimpleQueue[None] = SimpleQueue()  # takes no lock that a finalizer could meet
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="t5_trt rows", daemon=True)
        self._thread.start()
        _running.add(self)

    def check_open(self) -> None:
        """Refuse a request that could not wait.

        Raises:
            QueueFullError: too many wait.
            EngineClosedError: after `close`.
        """
        with self._lock:
            self._check_open()

    def submit(self, job: Job) -> None:
        """Let a request wait for a row. Raises as `check_open`."""
        with self._lock:
            self._check_open()
            if job.prepared.in_group:
                self._groups.waiting.append(job)
                self._groups.wake()
            else:
                self._waiting.append(job)
        self._calls.put(None)

    def stats(self) -> Stats:
        """The counts as they are."""
        with self._lock:
            running = len(self._rows) + sum(map(len, self._entering)) + (self._groups.running is not None)
            return replace(self._stats, waiting=len(self._waiting) + len(self._groups.waiting), running=running)

    def close(self, grace: float) -> None:
        """Take no more requests; let those that are there go on for `grace` seconds, and end the rest."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + grace
        while time.monotonic() < end and self._thread.is_alive():
            stats = self.stats()
            if not stats.waiting and not stats.running:
                break
            time.sleep(0.005)
        self.stop()
        self.join()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the ends of the threads, or at most about so many seconds."""
        self._thread.join(timeout)
        self._groups.join(timeout)

    def stop(self) -> None:
        """End the threads after the step that is running. It takes no lock."""
        self._closing = self._stopped = True
        self._groups.stop()
        self._calls.put(None)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine is closed; expected an open one. Make another Engine.")
        if self._full():
            self._leave_queues()
        if self._full():
            self._stats = self._stats.more(refused=1)
            raise QueueFullError(
                f"{self._max_waiting} requests wait for a row, as many as may (max_waiting). Try again later, or elsewhere."
            )

    def _full(self) -> bool:
        return len(self._waiting) + len(self._groups.waiting) >= self._max_waiting

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._has_work():
                    self._turn_or_fail()
        finally:  # nobody may wait for ever
            self.stop()
            self._fail_rows(closed())
            with self._lock:
                left = [*self._waiting, *self._groups.waiting]
                self._waiting.clear()
                self._groups.waiting.clear()
            for job in left:
                self._end(job, closed())

    def _turn_or_fail(self) -> None:
        try:
            self._turn()
        except Exception as error:
            logger.exception("decoder steps failed; their requests end with the error")
            self._fail_rows(error)
            self._buffers = self._session.row_buffers(self._max_rows)  # nobody knows what is in the old ones

    def _has_work(self) -> bool:
        """Wait until there is something to do; False after `stop`."""
        while not (self._rows or self._waiting or self._stopped):
            try:
                self._calls.get(timeout=_LOOK_S if self._groups.waiting else None)
            except Empty:
                break
        while not self._calls.empty():
            self._calls.get()
        return not self._stopped

    def _turn(self) -> None:
        """Rows that are over leave, waiting requests take free rows, and all rows decode one token."""
        for place in reversed(range(len(self._rows))):
            reason = self._rows[place].job.overdue() or self._too_long(place)
            if reason is not None:
                self._leave(place, reason)
        with self._lock:
            self._leave_queues()
            self._entering = by_length(self._arrivals())
        while self._entering:
            self._enter(self._entering[0])
            self._entering.pop(0)
        if self._rows:
            self._step()

    def _arrivals(self) -> list[Job]:
        """Take waiting requests for the free rows. The lock is held."""
        jobs: list[Job] = []
        tokens = 0
        while self._waiting and len(self._rows) + len(jobs) < self._max_rows:
            tokens += self._waiting[0].input_ids.shape[1]
            if jobs and tokens > ENCODED_TOKENS:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _leave_queues(self) -> None:
        """Take out waiting requests that must not go on. The lock is held."""
        for queue in (self._waiting, self._groups.waiting):
            for job in [job for job in queue if job.overdue() is not None]:
                queue.remove(job)
                job.finish(error=job.overdue())
                self._stats = self._stats.ended(job.error)

    def _enter(self, jobs: list[Job]) -> None:
        """Encode sources together and give each a row."""
        lengths = [job.input_ids.shape[1] for job in jobs]
        ids = torch.zeros((len(jobs), max(lengths)), dtype=torch.int64, device=self._session.device)
        mask = torch.zeros_like(ids)
        for place, (job, length) in enumerate(zip(jobs, lengths, strict=True)):
            ids[place, :length], mask[place, :length] = job.input_ids[0], job.attention_mask[0]
        try:
            _, cross = self._session.encode(ids, None, mask, 1)
            bias = self._session.cross_bias(mask, cross)
        except Exception as error:
            for job in jobs:
                self._end(job, error)
            return
        for place, length in enumerate(lengths):
            self._buffers.add(cross.kv[:, :, place, :, :length], bias[place, 0, 0, :length])
        self._rows += map(Row, jobs)

    def _step(self) -> None:
        rows, buffers = self._rows, self._buffers
        buffers.fit()
        buffers.tokens[: len(rows), 0] = torch.tensor([row.token for row in rows])
        logits = self._session.step_rows(buffers)
        best = logits.argmax(-1).tolist() if any(row.plain for row in rows) else []
        over: list[tuple[int, BaseException | None]] = []
        for place, row in enumerate(rows):
            try:
                if row.take(best[place] if row.plain else row.choose(logits[place : place + 1])):
                    over.append((place, None))
            except Exception as error:  # of this request alone
                over.append((place, error))
        with self._lock:
            self._stats = self._stats.more(steps=1, tokens=len(rows))
        for place, failure in reversed(over):
            self._leave(place, failure)

    def _leave(self, place: int, error: BaseException | None) -> None:
        """Free a row, whose place the last one takes."""
        job = self._rows[place].job
        self._buffers.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._end(job, error)

    def _too_long(self, place: int) -> BaseException | None:
        limit, positions = self._longest
        if limit is None and positions is None:
            return None
        try:
            check_length("target", self._buffers.position(place) + 1, limit, positions)
        except ValueError as error:
            return error
        return None

    def _fail_rows(self, error: BaseException) -> None:
        jobs = [*(row.job for row in self._rows), *(job for batch in self._entering for job in batch)]
        self._rows, self._entering = [], []
        for job in jobs:
            self._end(job, error)

    def _end(self, job: Job, error: BaseException | None) -> None:
        self._count(error)  # first: whoever gets the error finds it counted
        if error is not None:
            job.finish(error=error)

    def _count(self, error: BaseException | None) -> None:
        with self._lock:
            self._stats = self._stats.ended(error)


def by_length(jobs: list[Job]) -> list[list[Job]]:
    """Requests in batches whose sources differ in length by less than a factor of two, the earliest first."""
    batches: dict[int, list[Job]] = {}
    for job in jobs:
        batches.setdefault(bucket_length(job.input_ids.shape[1], SMALLEST_SOURCE), []).append(job)
    return list(batches.values())
