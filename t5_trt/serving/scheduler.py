"""The scheduling loop: between decoder steps, ended requests leave their rows and waiting ones take them."""

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

#: most source tokens that are encoded between two steps (more only for a single longer source): rows in use wait meanwhile
ENCODED_TOKENS = 1024
#: interval in seconds at which waiting groups are checked for cancelled ones while no row is in use
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
    """Runs requests of one model in its own thread.

    Args:
        model: a `TRTT5ForConditionalGeneration`.
        session: of the model; its decoder supports rows at different positions.
        max_rows: most requests that decode at the same time.
        max_waiting: most requests that wait.
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
        self._calls: SimpleQueue[None] = SimpleQueue()  # no lock, because a finalizer may run this
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="t5_trt rows", daemon=True)
        self._thread.start()
        _running.add(self)

    def check_open(self) -> None:
        """Check that a request can be queued.

        Raises:
            QueueFullError: the queue is full.
            EngineClosedError: after `close`.
        """
        with self._lock:
            self._check_open()

    def submit(self, job: Job) -> None:
        """Queue a request. Raises as `check_open`."""
        with self._lock:
            self._check_open()
            if job.prepared.in_group:
                self._groups.waiting.append(job)
                self._groups.wake()
            else:
                self._waiting.append(job)
        self._calls.put(None)

    def stats(self) -> Stats:
        """The current counts."""
        with self._lock:
            running = len(self._rows) + sum(map(len, self._entering)) + (self._groups.running is not None)
            return replace(self._stats, waiting=len(self._waiting) + len(self._groups.waiting), running=running)

    def close(self, grace: float) -> None:
        """Accept no more requests; let the accepted ones run for `grace` seconds, and end the rest."""
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
        """Wait for the end of the threads, at most about a number of seconds."""
        self._thread.join(timeout)
        self._groups.join(timeout)

    def stop(self) -> None:
        """End the threads after the running step. Takes no lock."""
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
        finally:  # nobody may wait forever
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
            self._buffers = self._session.row_buffers(self._max_rows)  # the contents of the old buffers are undefined

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
        """Free rows that have ended, give rows to waiting requests, and decode one token of all rows."""
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
        """Take waiting requests for the free rows. The caller holds the lock."""
        jobs: list[Job] = []
        tokens = 0
        while self._waiting and len(self._rows) + len(jobs) < self._max_rows:
            tokens += self._waiting[0].input_ids.shape[1]
            if jobs and tokens > ENCODED_TOKENS:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _leave_queues(self) -> None:
        """Remove waiting requests that must stop. The caller holds the lock."""
        for queue in (self._waiting, self._groups.waiting):
            for job in [job for job in queue if job.overdue() is not None]:
                queue.remove(job)
                job.finish(error=job.overdue())
                self._stats = self._stats.ended(job.error)

    def _enter(self, jobs: list[Job]) -> None:
        """Encode sources as one batch and give each a row."""
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
            except Exception as error:  # an error of this request only
                over.append((place, error))
        with self._lock:
            self._stats = self._stats.more(steps=1, tokens=len(rows))
        for place, failure in reversed(over):
            self._leave(place, failure)

    def _leave(self, place: int, error: BaseException | None) -> None:
        """Free a row; the last row takes its place."""
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
        self._count(error)  # first, so that a caller who gets the error finds it counted
        if error is not None:
            job.finish(error=error)

    def _count(self, error: BaseException | None) -> None:
        with self._lock:
            self._stats = self._stats.ended(error)


def by_length(jobs: list[Job]) -> list[list[Job]]:
    """Batches of requests whose source lengths differ by less than a factor of two, the earliest first."""
    batches: dict[int, list[Job]] = {}
    for job in jobs:
        batches.setdefault(bucket_length(job.input_ids.shape[1], SMALLEST_SOURCE), []).append(job)
    return list(batches.values())
