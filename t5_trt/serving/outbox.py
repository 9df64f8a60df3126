"""What clients get to know of their requests, kept until it may be sent."""

from __future__ import annotations

import torch

from t5_trt.serving.handle import Job, Wakes


class Outbox:
    """New tokens and ends. To wake clients takes time, which a GPU that is at work has. Used by one thread."""

    def __init__(self) -> None:
        self._read: list[Job] = []
        self._ends: list[tuple[Job, torch.Tensor | None, BaseException | None]] = []

    def tell(self, job: Job) -> None:
        """See `Job.tell`."""
        self._read.append(job)

    def finish(self, job: Job, sequences: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """See `Job.finish`; no token may follow."""
        self._ends.append((job, sequences, error))

    def send(self) -> None:
        """Tell all of it."""
        if not (self._read or self._ends):
            return
        wakes = Wakes()
        read, self._read = self._read, []
        for job in read:
            job.tell(wakes)
        ends, self._ends = self._ends, []
        for job, sequences, error in ends:
            job.finish(sequences, error, wakes)
        wakes.send()
