"""Reading what a GPU reports without waiting for its newest step."""

from __future__ import annotations

from collections import deque

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
        self._on_gpu = report.is_cuda
        self._ahead = ahead if self._on_gpu else 0
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def post(self, report: torch.Tensor) -> None:
        """Send the current report on its way; does not wait."""
        if not self._on_gpu:
            self._waiting.append((report.clone(), None))
            return
        copy = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        copy.copy_(report, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.append((copy, event))

    def take(self, *, all_of_them: bool = False) -> list[torch.Tensor]:
        """Reports that have arrived; waits only where more than `ahead` are outstanding, or for all if asked to."""
        arrived = []
        while self._waiting:
            report, event = self._waiting[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                if len(self._waiting) <= self._ahead and not all_of_them:
                    break
                event.synchronize()
            self._waiting.popleft()
            arrived.append(report)
        return arrived
