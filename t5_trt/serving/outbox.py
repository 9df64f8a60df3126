"""What clients get to know of their requests, kept until it may be sent."""

from __future__ import annotations

from collections import deque

import torch

from t5_trt.serving.handle import Job


class Outbox:
    """Tokens and ends in order. To wake clients takes time, which a GPU that is at work has. Used by one thread."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Job, int | None, torch.Tensor | None, BaseException | None]] = deque()

    def put(self, job: Job, token: int) -> None:
        """See `Job.put`."""
        self._kept.append((job, token, None, None))

    def finish(self, job: Job, sequences: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """See `Job.finish`."""
        self._kept.append((job, None, sequences, error))

    def send(self) -> None:
        """Tell all of it."""
        while self._kept:
            job, token, sequences, error = self._kept.popleft()
            if token is None:
                job.finish(sequences, error)
            else:
                job.put(token)
