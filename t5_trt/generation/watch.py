"""Reading what a GPU reports without waiting for its newest step."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

#: steps that the host may be ahead of the newest report that it has seen: enough to hide its own work on a step, few
#: enough that little is computed in vain after the end
STEPS_AHEAD = 4


class Watcher:
    """Copies a small tensor to the host after every step and hands the copies out in order, some steps late.

    On the CPU, and with ``ahead=0``, each copy is handed out at once.

    Args:
        report: int64, written by every step.
        ahead: steps that may be launched before a report is waited for.
    """

    def __init__(self, report: torch.Tensor, ahead: int = STEPS_AHEAD) -> None:
        self._ahead = ahead if report.is_cuda else 0
        # page-locked once, because allocating that takes longer than a step; a place is used again after it was handed out
        places = (self._ahead + 2, *report.shape)
        self._copies = torch.empty(places, dtype=report.dtype, pin_memory=report.is_cuda)
        self._events: list[Any] = [torch.cuda.Event() if report.is_cuda else None for _ in self._copies]  # type: ignore[no-untyped-call]
        self._posted = 0
        self._waiting: deque[int] = deque()

    def post(self, report: torch.Tensor) -> None:
        """Send the current report on its way; does not wait."""
        place = self._posted % len(self._copies)
        self._posted += 1
        self._copies[place].copy_(report, non_blocking=True)
        if self._events[place] is not None:
            self._events[place].record()
        self._waiting.append(place)

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        """Reports that have arrived; waits only where more than `ahead` are outstanding, or for all if asked to.

        They are good until the next one is posted.
        """
        arrived = []
        while self._waiting:
            place = self._waiting[0]
            event = self._events[place]
            if event is not None and not event.query():
                if len(self._waiting) <= self._ahead and not all_of_them:
                    break
                event.synchronize()
            self._waiting.popleft()
            arrived.append(self._copies[place])
        return arrived
