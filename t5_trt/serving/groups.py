"""Runs requests of several rows (beams, several results) by ``generate()``, one after the other, beside the shared rows."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from t5_trt.errors import EngineClosedError
from t5_trt.runtime.cuda_graph import at_home, outside_capture
from t5_trt.serving.handle import Job


class GroupRunner:
    """A thread that runs requests in their order.

    Args:
        model: see `t5_trt.serving.engine.Engine`.
        ended: called when a request has ended, with its error or None.

    Attributes:
        waiting: requests that have not started. The owner's lock guards it.
        running: the request that runs.
    """

    def __init__(self, model: Any, lock: threading.Lock, ended: Callable[[BaseException | None], None]) -> None:
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self._model, self._lock, self._ended = model, lock, ended
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
            self._take_turns()

    def _take_turns(self) -> None:
        while True:
            self._calls.get()
            if self._stopped:
                return
            with self._lock:
                job = self.running = self.waiting.popleft() if self.waiting else None
            if job is None:  # it was removed meanwhile
                continue
            self._generate(job)
            self.running = None
            self._ended(job.error)
            del job

    def _generate(self, job: Job) -> None:
        stop = StoppingCriteriaList([_Stop(self, job)])
        # a seed must not affect other draws of the process
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        try:
            with nullcontext() if job.seed is None else torch.random.fork_rng(devices):
                if job.seed is not None:
                    with outside_capture():  # which puts the generator back
                        torch.manual_seed(job.seed)
                made = self._model.generate(
                    input_ids=job.input_ids,
                    attention_mask=job.attention_mask,
                    stopping_criteria=stop,
                    **job.prepared.arguments,
                )
        except BaseException as error:
            job.finish(error=error)
            return
        for token in made[0, len(job.prepared.prompt) :].tolist():
            job.put(token)
        job.finish(made)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a call of ``generate()`` by an error once its request must stop."""

    def __init__(self, runner: GroupRunner, job: Job) -> None:
        self._runner, self._job = runner, job

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        reason = self._job.overdue()
        if self._runner._stopped:
            reason = closed()
        if reason is not None:
            raise reason
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def closed() -> EngineClosedError:
    """The error of requests that end because the engine is closed."""
    return EngineClosedError("the engine was closed before the request had ended.")
