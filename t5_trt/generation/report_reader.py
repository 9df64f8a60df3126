"""Reading the reports of decoder steps from a GPU without waiting for the newest step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.errors import BackendError
from t5_trt.runtime.session import Mailbox, TokenSelector

#: steps that the host may be ahead of the newest report it has seen: enough to hide the host's work, few enough to waste little
#: after the end
STEPS_AHEAD = 2
#: seconds after which a missing report is checked for an error of the GPU
PATIENCE = 1.0


class Watcher:
    """Copies a small tensor to the host after every step and returns the copies in order, some steps later.

    If the kernels of a token selector write into its mailbox, the host reads that; else the report is copied. On the CPU, and with
    ``ahead=0``, each report is returned at once.

    Args:
        selector: with a ``report``, int64, written by every step.
        ahead: steps that may be launched before a report is waited for.
    """

    def __init__(self, selector: TokenSelector, ahead: int = STEPS_AHEAD) -> None:
        report = selector.report
        self._ahead = ahead if report.is_cuda else 0
        self._posted: deque[_Letter | _Copy] = deque()
        self._copies = _Copies(self._ahead + 2, report)

    def post(self, selector: TokenSelector, position: int) -> None:
        """Expect the report of the step by which a token selector has chosen the tokens at a position; does not wait."""
        mailbox = selector.mailbox
        if mailbox is not None and mailbox.in_use:
            self._posted.append(_Letter(mailbox, position))
        else:
            self._posted.append(self._copies.copy(selector.report))

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        """Reports that have arrived; waits only where more than `ahead` are outstanding, or for all if asked to.

        They are valid until the next one is posted.

        Raises:
            BackendError: the GPU has finished without a report.
        """
        arrived = []
        while self._posted:
            waits = len(self._posted) > self._ahead or all_of_them
            report = self._posted[0].find(waits=waits)
            if report is None:
                break
            self._posted.popleft()
            arrived.append(report)
        return arrived


@dataclass(frozen=True)
class _Letter:
    """A report that a kernel will leave in a mailbox."""

    mailbox: Mailbox
    position: int

    def find(self, *, waits: bool) -> torch.Tensor | None:
        report = self.mailbox.find(self.position)
        started = time.perf_counter()
        while report is None and waits:
            time.sleep(0)  # let another thread run
            report = self.mailbox.find(self.position)
            if report is None and time.perf_counter() - started > PATIENCE:
                self._look_into()
                started = time.perf_counter()
        return report

    def _look_into(self) -> None:
        """Raise the GPU's error, if it has finished."""
        done = torch.cuda.current_stream(self.mailbox.epoch.device).query()  # raises an error of an earlier kernel
        if done and self.mailbox.find(self.position) is None:
            raise BackendError(
                f"the GPU has ended its work without the report of token {self.position}. Please report this as a bug."
            )


@dataclass(frozen=True)
class _Copy:
    """A report that is being copied into the host's memory."""

    memory: torch.Tensor
    event: Any

    def find(self, *, waits: bool) -> torch.Tensor | None:
        if self.event is not None and not self.event.query():
            if not waits:
                return None
            self.event.synchronize()
        return self.memory


class _Copies:
    """A ring buffer for copies of reports. Page-locked memory is allocated once, because that takes longer than a step.

    Args:
        count: copies that are valid at a time.
        like: a report.
    """

    def __init__(self, count: int, like: torch.Tensor) -> None:
        self._count, self._like = count, like
        self._places: list[_Copy] = []
        self._next = 0

    def copy(self, report: torch.Tensor) -> _Copy:
        """Start the copy of a report."""
        if not self._places:
            on_gpu = self._like.is_cuda
            memory = torch.empty((self._count, *self._like.shape), dtype=self._like.dtype, pin_memory=on_gpu)
            self._places = [_Copy(place, torch.cuda.Event() if on_gpu else None) for place in memory]  # type: ignore[no-untyped-call]
        place = self._places[self._next % self._count]
        self._next += 1
        place.memory.copy_(report, non_blocking=True)
        if place.event is not None:
            place.event.record()
        return place
