"""Runs requests of several rows (beams, several results) by ``generate()``, beside the shared rows.

Those with equal settings that wait at the same time run in one call, as far as the number of rows allows:

    waiting ── first one, and others with its settings ──> generate(sources padded to the longest)
                    between two steps: who was cancelled, or is late, gets an error; the call ends early if nobody is left
                    once half of the sources have ended: their requests have their results
               rows of each request, cut to their own length ──> its Job
               an error: each of them by itself, so that it meets only the request that is at fault
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteriaList

from t5_trt.errors import EngineClosedError
from t5_trt.generation.request import StepCheck
from t5_trt.runtime.cuda_graph import at_home, outside_capture
from t5_trt.serving.handle import Job, length


class GroupRunner:
    """A thread that runs requests, the one that waits longest next.

    Args:
        model: see `t5_trt.serving.engine.Engine`.
        max_rows: most rows of a call that runs several requests.
        lock: of what waits and of the counts.
        ended: called when a request ends, with its error or None.

    Attributes:
        waiting: requests that have not started. The owner's lock guards it.
        running: number of requests that run; likewise.
    """

    def __init__(
        self, model: Any, max_rows: int, lock: threading.Lock, ended: Callable[[BaseException | None], None]
    ) -> None:
        self.waiting: deque[Job] = deque()
        self.running = 0
        self._model, self._max_rows, self._lock, self._ended = model, max_rows, lock, ended
        self._stopped = False
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Wake the thread; the first call starts it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="t5_trt groups", daemon=True)
            self._thread.start()
        self._calls.put(None)

    def stop(self) -> None:
        """End the thread after the running step. Takes no lock."""
        self._stopped = True
        self._calls.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the thread, at most a number of seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        with at_home(self._model.device):
            while True:
                self._calls.get()
                if self._stopped:
                    return
                jobs = self._next()
                if jobs:  # they may have been removed meanwhile, or have run with others
                    self._generate(jobs)
                del jobs

    def _next(self) -> list[Job]:
        """Take the requests that run next: with the first one those of equal settings. One with a seed draws alone."""
        with self._lock:
            first = self.waiting[0] if self.waiting else None
            if first is None:
                return []
            jobs = [first]
            if not _seeded(first):
                equal = [job for job in self.waiting if job.prepared is first.prepared and not _seeded(job)]
                jobs = equal[: max(1, self._max_rows // first.prepared.rows)]
            for job in jobs:
                self.waiting.remove(job)
            self.running = len(jobs)
            return jobs

    def _generate(self, jobs: list[Job]) -> None:
        """Run requests of equal settings to their ends."""
        left = list(jobs)
        try:
            made = self._made(jobs, StepCheck(partial(self._look, left), partial(self._tell, jobs, left)))
        except _NobodyWaitsError:
            return
        except BaseException as error:
            if len(left) == 1:
                self._end(left[0], error=error)
            else:
                for job in left:
                    self._generate([job])
            return
        self._tell(jobs, left, range(len(jobs)), made)

    def _made(self, jobs: list[Job], check: StepCheck) -> torch.Tensor:
        """The results of one call: int64 [requests * results, tokens]."""
        ids, mask = (
            pad_sequence([source[0] for source in sources], batch_first=True)
            for sources in ([job.input_ids for job in jobs], [job.attention_mask for job in jobs])
        )
        seed = jobs[0].seed if _seeded(jobs[0]) else None
        # a seed must not affect other draws of the process
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with nullcontext() if seed is None else torch.random.fork_rng(devices):
            if seed is not None:
                with outside_capture():  # which puts the generator back
                    self._seed(seed)
            made: torch.Tensor = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList([check]),
                **jobs[0].prepared.arguments,
            )
        return made

    def _seed(self, seed: int) -> None:
        """Have the model draw as after ``torch.manual_seed``, which would seed other GPUs of the process, too."""
        torch.default_generator.manual_seed(seed)
        if self._model.device.type == "cuda":
            torch.cuda.manual_seed(seed)  # of the current one; see `at_home`

    def _tell(self, jobs: list[Job], left: list[Job], places: Sequence[int], made: torch.Tensor) -> None:
        """End the requests at some places of a call with their results, int64 [places * results, tokens], and take them out of those left."""
        for place, rows in zip(places, made.cpu().chunk(len(places)), strict=True):
            if jobs[place] in left:
                left.remove(jobs[place])
                self._end(jobs[place], _cut(rows, jobs[place]))

    def _look(self, left: list[Job]) -> None:
        """End those of the requests of a call that must stop, and take them out; raise if no other is left."""
        for job in list(left):
            error = closed() if self._stopped else job.overdue()
            if error is not None:
                left.remove(job)
                self._end(job, error=error)
        if not left:
            raise _NobodyWaitsError

    def _end(self, job: Job, rows: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        if rows is not None:
            for token in rows[0, len(job.prepared.prompt) :].tolist():
                job.put(token)
        with self._lock:
            self.running -= 1
        self._ended(error)  # first: whoever gets the error finds it counted
        job.finish(rows, error)


class _NobodyWaitsError(Exception):
    """All requests of a call have ended before it."""


def _seeded(job: Job) -> bool:
    """Whether a request needs certain draws."""
    return job.seed is not None and job.prepared.do_sample


def _cut(rows: torch.Tensor, job: Job) -> torch.Tensor:
    """A request's results, int64 [results, tokens], without the padding that longer ones of other requests need."""
    prompt = len(job.prepared.prompt)
    longest = max(length(row, job.prepared.eos)[0] for row in rows[:, prompt:].tolist())
    return rows[:, : prompt + longest].clone()


def closed() -> EngineClosedError:
    """The error of requests that end because the engine is closed."""
    return EngineClosedError("the engine was closed before the request had ended.")
