"""One request, shared by its submitter and the threads that run it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.errors import RequestCancelledError, RequestTimeoutError
from t5_trt.serving.settings import Prepared


@dataclass
class Times:
    """When a request came to its stations, in seconds of ``time.monotonic()``; None is to come.

    Attributes:
        submitted: to the engine.
        first_token: was there.
        end: with a result or an error.
    """

    submitted: float
    first_token: float | None = None
    end: float | None = None


class Job:
    """The state of a request. The engine writes tokens and the end; any thread may cancel.

    Args:
        input_ids: int64 [1, S].
        attention_mask: int64 [1, S] of zeros and ones.
        prepared: its settings.
        seed: of its draws; None takes any.
        timeout: seconds from now; None sets no limit.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prepared: Prepared,
        seed: int | None,
        timeout: float | None,
    ) -> None:
        self.input_ids, self.attention_mask, self.prepared, self.seed = input_ids, attention_mask, prepared, seed
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self.timeout = timeout
        self.times = Times(time.monotonic())
        self.cancelled = False  # set without a lock: finalizers run in any thread, wherever it stands
        self.tokens: list[int] = []
        self.sequences: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.done = False
        self._changed = threading.Condition()
        self.readers = 0  # who waits for a token; others sleep until the end
        self._futures: list[tuple[asyncio.Future[None], bool]] = []  # and whether a token is enough

    def overdue(self) -> BaseException | None:
        """The error if the request must stop, else None."""
        if self.cancelled:
            return RequestCancelledError("the request was cancelled.")
        if self.deadline is not None and time.monotonic() > self.deadline:
            return RequestTimeoutError(f"the request did not end within its timeout of {self.timeout:g} s.")
        return None

    def put(self, token: int) -> None:
        """Add a token. Where there are `readers` then, `tell` must follow: whoever waits for a token counts as one before looking for it."""
        if not self.tokens:
            self.times.first_token = time.monotonic()
        self.tokens.append(token)

    def tell(self, wakes: Wakes) -> None:
        """Wake those who wait for a token."""
        with self._changed:
            self._tell(wakes)

    def finish(
        self, sequences: torch.Tensor | None = None, error: BaseException | None = None, wakes: Wakes | None = None
    ) -> None:
        """End the request.

        Args:
            sequences: the result, int64 [results, tokens].
            error: in place of one.
            wakes: gets the coroutines that wait; None wakes them.
        """
        told = wakes or Wakes()
        with self._changed:
            if not self.done:
                self.times.end = time.monotonic()
                self.sequences, self.error, self.done = sequences, error, True
                self._tell(told)
        if wakes is None:
            told.send()

    def wait(self, count: int | None, timeout: float | None) -> bool:
        """Wait for more than `count` tokens or the end; None waits for the end. Return False after the timeout."""
        reads = count is not None
        with self._changed:
            self.readers += reads
            try:
                return self._changed.wait_for(lambda: self._reached(count), timeout)
            finally:
                self.readers -= reads

    async def wait_async(self, count: int | None, timeout: float | None) -> bool:
        """`wait` in a coroutine; cancelling the coroutine cancels the request, because its client is gone."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (future, count is not None)
            try:
                with self._changed:
                    self.readers += entry[1]
                    self._futures.append(entry)
                    if self._reached(count):
                        return True
                if end is None:
                    await future
                else:
                    await asyncio.wait([future], timeout=max(end - time.monotonic(), 0))
            except asyncio.CancelledError:
                self.cancelled = True
                raise
            finally:
                with self._changed:
                    self.readers -= entry[1]
                    if entry in self._futures:
                        self._futures.remove(entry)
            if end is not None and time.monotonic() >= end:
                with self._changed:
                    return self._reached(count)

    def _reached(self, count: int | None) -> bool:
        return self.done or (count is not None and len(self.tokens) > count)

    def _tell(self, wakes: Wakes) -> None:
        if self.done or self.readers:
            self._changed.notify_all()
        if self._futures:
            told = [entry for entry in self._futures if self.done or entry[1]]
            self._futures = [entry for entry in self._futures if entry not in told]
            for future, _ in told:
                wakes.add(self, future)


class Wakes:
    """Coroutines to be woken. Those of one event loop are woken together: its thread is woken once, and wants the interpreter once."""

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, list[tuple[Job, asyncio.Future[None]]]] = {}

    def add(self, job: Job, future: asyncio.Future[None]) -> None:
        """Add what waits for a request."""
        self._loops.setdefault(future.get_loop(), []).append((job, future))

    def send(self) -> None:
        """Wake them."""
        loops, self._loops = self._loops, {}
        for loop, waiting in loops.items():
            try:
                loop.call_soon_threadsafe(_wake, [future for _, future in waiting])
            except RuntimeError:  # the loop is closed
                for job, _ in waiting:
                    job.cancelled = True


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Handle:
    """A submitted request: its tokens as they come, and its result. Deleting the handle cancels the request.

    Iteration (``for`` or ``async for``) gives the new tokens as ints, from the first one on. A request of several rows (beams, several
    results) gives those of its first result after its end.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def tokens(self) -> list[int]:
        """A copy of the new tokens so far."""
        return list(self._job.tokens)

    @property
    def done(self) -> bool:
        """Whether the request has ended, with a result or an error."""
        return self._job.done

    @property
    def times(self) -> Times:
        """When it was submitted, had its first token, and ended."""
        return self._job.times

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a sequence of this request."""
        return self._job.prepared.eos

    def cancel(self) -> None:
        """End the request within two decoder steps; no effect after its end."""
        self._job.cancelled = True

    def result(self, timeout: float | None = None) -> Any:
        """The tokens, as ``generate()`` alone returns them.

        In a coroutine this must be awaited; a task that is cancelled meanwhile cancels the request. In a thread without an event loop
        it waits.

        Args:
            timeout: seconds to wait; the request continues after them. None waits for the end.

        Returns:
            int64 [results, tokens] on the CPU, with the decoder's prompt.

        Raises:
            TimeoutError: the request has not ended yet.
            RequestCancelledError, RequestTimeoutError, EngineClosedError: the request ended with this error.
            T5TRTError: the request failed.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._result(self._job.wait(None, timeout))
        return self._awaited(timeout)

    async def tokens_after(self, count: int) -> list[int]:
        """Wait for more than `count` new tokens, or the end.

        Returns:
            Those behind the first `count`, all that are there; none after the end.

        Raises:
            RequestCancelledError, RequestTimeoutError, EngineClosedError: it ended so, and there is none.
            T5TRTError: it failed, likewise.
        """
        await self._job.wait_async(count, None)
        found = self._job.tokens[count:]
        if not found:
            self._result(ended=True)
        return found

    def __iter__(self) -> Iterator[int]:
        count = 0
        while True:
            self._job.wait(count, None)
            if count >= len(self._job.tokens):
                break
            yield self._job.tokens[count]
            count += 1
        self._result(ended=True)

    def __aiter__(self) -> TokenIterator:
        return TokenIterator(self)

    def __del__(self) -> None:
        self._job.cancelled = True

    async def _awaited(self, timeout: float | None) -> torch.Tensor:
        return self._result(await self._job.wait_async(None, timeout))

    def _result(self, ended: bool) -> torch.Tensor:
        if not ended:
            raise TimeoutError("the request has not ended yet.")
        if self._job.error is not None:
            raise self._job.error
        assert self._job.sequences is not None
        return self._job.sequences


class TokenIterator:
    """Tokens of a request for ``async for``; leaving the loop early does not cancel the request."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self._count = handle, 0

    def __aiter__(self) -> TokenIterator:
        return self

    async def __anext__(self) -> int:
        found = await self._handle.tokens_after(self._count)
        if not found:
            raise StopAsyncIteration
        self._count += 1
        return found[0]


def length(tokens: list[int], ends: frozenset[int]) -> tuple[int, bool]:
    """The number of a sequence's tokens up to its end token, and whether it has one; padding may follow."""
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    return (len(tokens), False) if end is None else (end + 1, True)
