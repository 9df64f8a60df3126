"""The scheduling loop: between decoder steps, ended requests leave their rows and waiting ones take them."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter, deque
from queue import Empty, SimpleQueue
from typing import Any

import torch

from t5_trt.errors import EngineClosedError, QueueFullError
from t5_trt.runtime.captured_encoder import CAPTURED_TOKENS
from t5_trt.runtime.cuda_graph import at_home
from t5_trt.runtime.row_buffers import RowSession
from t5_trt.serving.groups import GroupRunner, closed
from t5_trt.serving.handle import Job
from t5_trt.serving.outbox import Outbox
from t5_trt.serving.running import RunningRows
from t5_trt.serving.sources import EncodedSource, EncodingBatch, by_length
from t5_trt.serving.stats import Stats, end_named

logger = logging.getLogger("t5_trt")

#: most source tokens that are encoded between two steps (more only for a single longer source): rows in use wait meanwhile. Where a row is
#: free and more requests wait, up to half of the rows' number of them are encoded with it: few sources take little longer than one
ENCODED_TOKENS, ENCODED_AHEAD = 1024, 256
#: and that are being encoded beside the steps on a GPU; there as many requests beyond the free rows are encoded as are half of the rows, or this
ENCODED_TOKENS_GPU, AHEAD_GPU = 4096, 32
#: requests beyond the free rows that are begun together, or half of all such; small batches leave a GPU idle
AHEAD_TOGETHER = 24
#: requests that are begun together at most: a batch of TensorRT's engines by default, and of packed sources
ENCODED_ROWS_GPU = 32
#: source tokens that are encoded as fast as a batch of padded sources is begun; see `by_length`
BEGIN_TOKENS, BEGIN_TOKENS_GPU = 32, 640
#: how often waiting groups are looked through for cancelled ones while no row is in use
_LOOK_S = 0.05
#: how often all that waits is looked through for what need not wait any more; what leaves a queue is looked at in any case
_QUEUE_LOOK_S = 0.01
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
        self._session, self._max_rows, self._max_waiting = session, max_rows, max_waiting
        self._entering: deque[EncodingBatch] = deque()  # what has left the queue and is being encoded
        self._ready: deque[EncodedSource] = deque()  # and have no rows yet
        self._on_gpu = session.device.type == "cuda"
        self._outbox = Outbox()
        longest = (model.runtime_config.max_target_tokens, session.arch.longest_target)
        self._running = RunningRows(session, max_rows, longest, self._outbox, self._end, self._count_step)
        self._lock = threading.Lock()  # of what waits, and of the counts
        self._next_look = 0.0
        self._waiting: deque[Job] = deque()
        self._groups = GroupRunner(model, max_rows, self._lock, self._count)
        self._counts: Counter[str] = Counter()  # fields of `Stats`
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
            running = len(self._running) + sum(len(batch.jobs) for batch in self._entering)
            running += self._groups.running
            return Stats(waiting=self._without_rows(), running=running, **self._counts)

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
            self._look_through()
        if self._full():
            self._counts["refused"] += 1
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
            self._running.renew()

    def _has_work(self) -> bool:
        """Wait until there is something to do; False after `stop`."""
        while not (self._running.busy or self._waiting or self._entering or self._ready or self._stopped):
            try:
                self._calls.get(timeout=_LOOK_S if self._groups.waiting else None)
            except Empty:
                break
        while not self._calls.empty():
            self._calls.get()
        return not self._stopped

    def _turn(self) -> None:
        """Free rows that have ended, give rows to waiting requests, and decode one token of all rows."""
        self._running.make_room()
        with self._lock:
            if time.monotonic() >= self._next_look:
                self._look_through()
            begun, arrived = len(self._entering), self._arrivals()
            if arrived:
                self._entering += [EncodingBatch(jobs) for jobs in self._batches(arrived)]
        self._begin_encoding(begun)
        self._end_encoding()
        self._take_rows()
        self._running.step(on_gpu=self._on_gpu)

    def _arrivals(self) -> list[Job]:
        """Take waiting requests for the free rows, and some more for rows that will be free. The lock is held."""
        jobs: list[Job] = []
        entering = [job.input_ids.shape[1] for batch in self._entering for job in batch.jobs]
        free, tokens = self._running.free - len(self._ready) - len(entering), sum(entering)
        most = self._most_arrivals(free, bool(entering))
        while self._waiting and len(jobs) < most:
            job = self._waiting[0]
            if job.overdue() is None:
                tokens += job.input_ids.shape[1]
                if (jobs or entering) and tokens > self._most_tokens(len(jobs) < free):
                    break
                jobs.append(job)
            else:
                self._drop(job)
            self._waiting.popleft()
        return jobs

    def _batches(self, jobs: list[Job]) -> list[list[Job]]:
        """Requests that are to be encoded together."""
        size = self._session.batch_size
        if size is None:
            return [jobs]
        if self._on_gpu:
            return by_length(jobs, size, BEGIN_TOKENS_GPU, CAPTURED_TOKENS)
        return by_length(jobs, size, BEGIN_TOKENS)

    def _most_arrivals(self, free: int, entering: bool) -> int:
        """Requests to take out of the queue; `free` rows have none, fewer than 0 where more requests than rows are on their way."""
        if not self._on_gpu:
            return free + self._max_rows // 2 if free > 0 else 0
        ahead = max(self._max_rows // 4, min(self._max_rows // 2, AHEAD_GPU))
        if free <= 0 and (entering or free + ahead < min(ahead, max(AHEAD_TOGETHER, ahead // 2))):
            return 0
        return min(free + ahead, ENCODED_ROWS_GPU)

    def _most_tokens(self, has_row: bool) -> int:
        """Source tokens that may be encoded with those of a request that has a row, or waits for one."""
        if self._on_gpu:
            return ENCODED_TOKENS_GPU
        return ENCODED_TOKENS if has_row else min(ENCODED_TOKENS, ENCODED_AHEAD)

    def _look_through(self) -> None:
        """Take out requests without rows that must not go on. The lock is held."""
        self._next_look = time.monotonic() + _QUEUE_LOOK_S
        for queue in (self._waiting, self._groups.waiting):
            for job in [job for job in queue if job.overdue() is not None]:
                queue.remove(job)
                self._drop(job)
        for source in [source for source in self._ready if source.job.overdue() is not None]:
            self._ready.remove(source)
            self._drop(source.job)

    def _drop(self, job: Job) -> None:
        job.finish(error=job.overdue())
        self._counts[end_named(job.error)] += 1

    def _begin_encoding(self, begun: int) -> None:
        """Have batches encoded that are entering, behind a number of those that are being encoded already."""
        while begun < len(self._entering):
            try:
                self._entering[begun] = self._entering[begun].begun(self._session)
                begun += 1
            except Exception as error:
                for job in self._entering[begun].jobs:
                    self._end(job, error=error)
                with self._lock:
                    del self._entering[begun]
                self._outbox.send()

    def _end_encoding(self) -> None:
        """Take sources that are encoded; only where no row decodes, steps wait for the first batch."""
        while self._entering and (self._entering[0].done or not (self._running.active or self._ready)):
            sources = self._entering[0].split()
            with self._lock:
                self._entering.popleft()
                self._ready += sources

    def _take_rows(self) -> None:
        """Give free rows to requests that are encoded."""
        while self._ready and self._running.free:
            with self._lock:
                if not self._ready:  # a client looked for those that need not go on
                    break
                source = self._ready.popleft()
                if source.job.overdue() is not None:
                    self._drop(source.job)
                    continue
                self._running.add(source.job)
            self._running.take_in(source)

    def _fail_rows(self, error: BaseException) -> None:
        jobs = [*self._running.fail(), *(job for batch in self._entering for job in batch.jobs)]
        self._entering.clear()
        for job in jobs:
            self._end(job, error=error)

    def _end(self, job: Job, result: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        self._count(error)  # first: whoever gets the error finds it counted
        self._outbox.finish(job, result, error)

    def _count(self, error: BaseException | None) -> None:
        with self._lock:
            self._counts[end_named(error)] += 1

    def _count_step(self, steps: int, tokens: int) -> None:
        with self._lock:
            self._counts["steps"] += steps
            self._counts["tokens"] += tokens
