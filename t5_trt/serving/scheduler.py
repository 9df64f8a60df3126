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
from t5_trt.generation.processors import CapturableProcessors
from t5_trt.runtime.row_buffers import RowSession
from t5_trt.serving.groups import GroupRunner, at_home, closed
from t5_trt.serving.handle import Job
from t5_trt.serving.outbox import Outbox
from t5_trt.serving.rows import Row, device_processors
from t5_trt.serving.settings import Prepared
from t5_trt.serving.sources import EncodedSource, by_length, encode
from t5_trt.serving.stats import Stats
from t5_trt.validation import check_length

logger = logging.getLogger("t5_trt")

#: most source tokens that are encoded between two steps (more only for a single longer source): rows in use wait meanwhile
ENCODED_TOKENS = 1024
#: and on a GPU, which small batches leave idle; there as many requests beyond the free rows are encoded as are a quarter of the rows
ENCODED_TOKENS_GPU = 4096
#: requests of such a batch at most, as TensorRT's engines have by default; see `by_length`
ENCODED_ROWS_GPU, LEAST_TOKENS_GPU = 32, 1024
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
        self._limited = any(longest is not None for longest in self._longest)
        self._rows: list[Row] = []
        self._entering: list[list[Job]] = []  # batches that have left the queue and are being encoded
        self._ready: deque[EncodedSource] = deque()  # and have no rows yet
        self._on_gpu = session.device.type == "cuda"
        self._outbox = Outbox()
        self._processing: weakref.WeakKeyDictionary[Prepared, CapturableProcessors | None] = weakref.WeakKeyDictionary()
        with at_home(session.device):
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

    @property
    def closed(self) -> bool:
        """Whether no request is accepted any more."""
        return self._closing

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
            return replace(self._stats, waiting=self._without_rows(), running=running)

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
        return self._without_rows() >= self._max_waiting

    def _without_rows(self) -> int:
        return len(self._waiting) + len(self._ready) + len(self._groups.waiting)

    def _run(self) -> None:
        try:
            with torch.no_grad(), at_home(self._session.device):
                while self._has_work():
                    self._turn_or_fail()
        except Exception:
            logger.exception("rows cannot be made again; the engine ends")
        finally:  # nobody may wait forever
            self.stop()
            self._fail_rows(closed())
            with self._lock:
                left = [*(each.job for each in self._ready), *self._waiting, *self._groups.waiting]
                for queue in (self._ready, self._waiting, self._groups.waiting):
                    queue.clear()
            for job in left:
                self._end(job, error=closed())
            self._outbox.send()

    def _turn_or_fail(self) -> None:
        try:
            self._turn()
        except Exception as error:
            logger.exception("decoder steps failed; their requests end with the error")
            self._fail_rows(error)
            self._outbox.send()
            self._buffers.release()
            self._buffers = self._session.row_buffers(self._max_rows)  # nobody knows what is in the old ones

    def _has_work(self) -> bool:
        """Wait until there is something to do; False after `stop`."""
        while not (self._rows or self._waiting or self._ready or self._stopped):
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
            job = self._rows[place].job
            if job.cancelled or job.deadline is not None or self._limited:
                reason = job.overdue() or self._too_long(place)
                if reason is not None:
                    self._leave(place, error=reason)
        with self._lock:
            self._leave_queues()
            self._entering = by_length(self._arrivals(), LEAST_TOKENS_GPU if self._on_gpu else 0)
        while self._entering:
            self._encode(self._entering[0])
        self._take_rows()
        if self._rows:
            self._step()
        if not (self._on_gpu and self._rows):
            self._outbox.send()

    def _arrivals(self) -> list[Job]:
        """Take waiting requests for the free rows, and on a GPU some more, if there is a free one. The lock is held."""
        jobs: list[Job] = []
        free, tokens = self._max_rows - len(self._rows) - len(self._ready), 0
        if free <= 0:
            return jobs
        most, limit = free, ENCODED_TOKENS
        if self._on_gpu:
            most, limit = min(free + self._max_rows // 4, ENCODED_ROWS_GPU), ENCODED_TOKENS_GPU
        while self._waiting and len(jobs) < most:
            tokens += self._waiting[0].input_ids.shape[1]
            if jobs and tokens > limit:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _leave_queues(self) -> None:
        """Take out requests without rows that must not go on. The lock is held."""
        for queue in (self._waiting, self._groups.waiting):
            for job in [job for job in queue if job.overdue() is not None]:
                queue.remove(job)
                self._drop(job)
        for source in [source for source in self._ready if source.job.overdue() is not None]:
            self._ready.remove(source)
            self._drop(source.job)

    def _drop(self, job: Job) -> None:
        job.finish(error=job.overdue())
        self._stats = self._stats.ended(job.error)

    def _encode(self, jobs: list[Job]) -> None:
        """Encode the sources of a batch that is entering."""
        try:
            made = encode(self._session, jobs, in_common_sizes=self._on_gpu)
        except Exception as error:
            made = []
            for job in jobs:
                self._end(job, error=error)
        with self._lock:
            self._entering.pop(0)
            self._ready += made
        self._outbox.send()

    def _take_rows(self) -> None:
        """Give free rows to requests that are encoded."""
        while self._ready and len(self._rows) < self._max_rows:
            with self._lock:
                if not self._ready:  # a client looked for those that need not go on
                    break
                source = self._ready.popleft()
                self._rows.append(Row(source.job, self._processors))
            self._buffers.add(source.cross, source.bias)

    def _processors(self, prepared: Prepared) -> CapturableProcessors | None:
        """See `device_processors`; equal settings have the same."""
        if prepared not in self._processing:
            session = self._session
            self._processing[prepared] = device_processors(prepared, session.arch.vocab_size, session.device)
        return self._processing[prepared]

    def _step(self) -> None:
        rows, buffers = self._rows, self._buffers
        buffers.fit()
        buffers.feed([row.token for row in rows])
        best_only = all(row.plain for row in rows)
        made = self._session.step_rows(buffers, best_only=best_only)
        if self._on_gpu:
            self._outbox.send()
        failures: dict[int, Exception] = {}
        if not best_only:
            made = self._chosen(made, failures)
        over: list[tuple[int, torch.Tensor | None]] = []
        for place, (row, token) in enumerate(zip(rows, made.tolist(), strict=True)):  # the one wait for a GPU
            if failures and place in failures:
                over.append((place, None))
                continue
            self._outbox.put(row.job, token)
            result = row.take(token)
            if result is not None:
                over.append((place, result))
        with self._lock:
            self._stats = self._stats.more(steps=1, tokens=len(rows))
        for place, result in reversed(over):
            self._leave(place, result, failures.get(place))

    def _chosen(self, logits: torch.Tensor, failures: dict[int, Exception]) -> torch.Tensor:
        """The next token of every row, int64 [rows], where the logits are; errors of single rows by their place."""
        chosen = logits.argmax(-1)
        for place, row in enumerate(self._rows):
            if not row.plain:
                try:
                    chosen[place : place + 1] = row.choose(logits[place : place + 1])
                except Exception as error:  # of this request alone
                    failures[place] = error
        return chosen

    def _leave(self, place: int, result: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """Free a row, whose place the last one takes."""
        job = self._rows[place].job
        self._buffers.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._end(job, result, error)

    def _too_long(self, place: int) -> BaseException | None:
        limit, positions = self._longest
        try:
            check_length("target", self._buffers.position(place) + 1, limit, positions)
        except ValueError as error:
            return error
        return None

    def _fail_rows(self, error: BaseException) -> None:
        jobs = [*(row.job for row in self._rows), *(job for batch in self._entering for job in batch)]
        self._rows, self._entering = [], []
        for job in jobs:
            self._end(job, error=error)

    def _end(self, job: Job, result: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        self._count(error)  # first: whoever gets the error finds it counted
        self._outbox.finish(job, result, error)

    def _count(self, error: BaseException | None) -> None:
        with self._lock:
            self._stats = self._stats.ended(error)
