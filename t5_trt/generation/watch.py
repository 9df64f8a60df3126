"""Reading what a GPU reports without waiting for its newest step."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from t5_trt.errors import BackendError
from t5_trt.runtime.session import Mailbox

#: steps that the host may be ahead of the newest report that it has seen: enough to hide its own work on a step, few
#: enough that little is computed in vain after the end
STEPS_AHEAD = 4
#: seconds after which a report that has not come is looked into
PATIENCE = 1.0


class Watcher:
    """Brings a small tensor to the host after every step and hands it out in order, some steps late.

    Where the kernels of a choice write into its mailbox, the host looks into that; else it has the report copied. On the CPU, and with
    ``ahead=0``, each report is handed out at once.

    Args:
        choice: with a ``report``, int64, written by every step, and maybe a ``mailbox``.
        ahead: steps that may be launched before a report is waited for.
    """

    def __init__(self, choice: Any, ahead: int = STEPS_AHEAD) -> None:
        report = choice.report
        self._ahead = ahead if report.is_cuda else 0
        self._posted: deque[tuple[int, Any]] = deque()  # place, and the event behind a copy
        self._mailbox: Mailbox | None = choice.mailbox if choice.mailbox is not None and choice.mailbox.in_use else None
        if self._mailbox is None:
            # page-locked once, because allocating that takes longer than a step; a place is used again after it was handed out
            self._copies = torch.empty((self._ahead + 2, *report.shape), dtype=report.dtype, pin_memory=report.is_cuda)
            self._events: list[Any] = [torch.cuda.Event() if report.is_cuda else None for _ in self._copies]  # type: ignore[no-untyped-call]

    def post(self, report: torch.Tensor, position: int) -> None:
        """Expect the report of the step that has chosen the tokens at a position; does not wait."""
        if self._mailbox is not None:
            self._posted.append((position, None))
            return
        place = position % len(self._copies)
        self._copies[place].copy_(report, non_blocking=True)
        if self._events[place] is not None:
            self._events[place].record()
        self._posted.append((place, self._events[place]))

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        """Reports that have arrived; waits only where more than `ahead` are outstanding, or for all if asked to.

        They are good until the next one is posted.

        Raises:
            BackendError: the GPU is done and has not reported.
        """
        arrived = []
        while self._posted:
            waits = len(self._posted) > self._ahead or all_of_them
            report = self._look(*self._posted[0], waits=waits)
            if report is None:
                break
            self._posted.popleft()
            arrived.append(report)
        return arrived

    def _look(self, place: int, event: Any, *, waits: bool) -> torch.Tensor | None:
        if self._mailbox is None:
            if event is not None and not event.query():
                if not waits:
                    return None
                event.synchronize()
            return self._copies[place]
        report = self._mailbox.find(place)
        started = time.perf_counter()
        while report is None and waits:
            time.sleep(0)  # another thread's turn
            report = self._mailbox.find(place)
            if report is None and time.perf_counter() - started > PATIENCE:
                report, started = self._look_into(place), time.perf_counter()
        return report

    def _look_into(self, place: int) -> torch.Tensor | None:
        """Raise what has gone wrong on the GPU; None if it is still at work."""
        assert self._mailbox is not None
        if not torch.cuda.current_stream(self._mailbox.epoch.device).query():  # raises an error of an earlier kernel
            return None
        report = self._mailbox.find(place)
        if report is None:
            raise BackendError(
                f"the GPU has ended its work without the report of token {place}. Please report this as a bug."
            )
        return report
