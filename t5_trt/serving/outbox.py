"""What clients get to know of their requests, kept until it may be sent."""

from __future__ import annotations

import torch

from t5_trt.serving.handle import Job


class Outbox:
    """Tokens, in order, and ends. To wake clients takes time, which a GPU that is at work has. Used by one thread."""

    def __init__(self) -> None:
        self._tokens: list[tuple[Job, int]] = []
        self._ends: list[tuple[Job, torch.Tensor | None, BaseException | None]] = []

    def put(self, job: Job, token: int) -> None:
        """See `Job.put`."""
        self._tokens.append((job, token))

    def finish(self, job: Job, sequences: torch.Tensor | None = None, error: BaseException | None = None) -> None:
        """See `Job.finish`; no token may follow."""
        self._ends.append((job, sequences, error))

    def send(self) -> None:
        """Tell all of it."""
        tokens, self._tokens = self._tokens, []
        for job, token in tokens:
            job.put(token)
        ends, self._ends = self._ends, []
        for job, sequences, error in ends:
            job.finish(sequences, error)
