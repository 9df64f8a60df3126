"""One row of the batch: its request, its tokens, and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from t5_trt.runtime.kv_buffers import bucket_length
from t5_trt.runtime.row_buffers import SupportsToList
from t5_trt.serving.handle import Job


class Row:
    """A request in a row.

    Args:
        job: the request, of which no token has been made.

    Attributes:
        history: its tokens, in an array that is long enough for all of them; empty where nothing looks at them.
        plain: it takes the token of the largest logit from now on.
        token: the last one that is known, which the next step decodes unless one is on its way.
        place: of the row in the last step that was started; -1 where all of its tokens are known.
        under_way: steps whose tokens are not known.
        left: tokens that may still come, those of steps under way counted.
        vacant: its place is free.
        vacant_steps: which have decoded it since.
        over: the request has ended, whatever is on its way.
        slot: where a GPU keeps its tokens; None if it keeps none.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._prepared = job.prepared
        self._generator: torch.Generator | None = None
        self.history = np.zeros(bucket_length(job.prepared.limit + 1) if job.prepared.processors else 0, dtype=np.int64)
        if len(self.history):
            self.history[: len(job.prepared.prompt)] = job.prepared.prompt
        self._eos = job.prepared.eos
        self.plain = not job.prepared.do_sample and not job.prepared.processors
        self.token = job.prepared.prompt[-1]
        self.place, self.under_way, self.vacant, self.vacant_steps, self.over = -1, 0, False, 0, False
        self.slot: int | None = None
        self.left = job.prepared.limit - len(job.prepared.prompt)

    @property
    def length(self) -> int:
        """The number of its tokens, with the prompt."""
        return len(self._prepared.prompt) + len(self.job.tokens)

    @property
    def next_length(self) -> int:
        """The number of tokens that it has when the next step that is started chooses one: those of steps under way are there by then."""
        return self.length + self.under_way

    def pass_over(self, drawn: int, device: torch.device) -> tuple[int, int]:
        """The seed and the offset of its generator, on a GPU, which then is as after so many numbers."""
        generator = self.generator(device)
        offset = generator.get_offset()
        generator.set_offset(offset + drawn)
        return generator.initial_seed() & (1 << 64) - 1, offset

    @property
    def room(self) -> int:
        """How much of its history processors get: more than it has tokens, and few numbers for all lengths."""
        return bucket_length(self.length + 1) if len(self.history) else 0

    @property
    def hides_end(self) -> bool:
        """Whether the next token is that of the largest logit but for the end tokens; once it is not, the row is `plain`."""
        prepared = self._prepared
        hides = self.next_length < prepared.hidden_until
        self.plain |= prepared.hidden_until > 0 and not hides
        return hides

    def take(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Give the request tokens up to its end; how many these are, and whether it is over with them."""
        for count, token in enumerate(tokens, 1):
            self.token = token
            if len(self.history):
                self.history[self.length] = token
            self.job.put(token)
            self.left -= 1
            if token in self._eos or self.left <= 0:
                return count, True
        return len(tokens), False

    @property
    def result(self) -> torch.Tensor:
        """All tokens, int64 [1, tokens]."""
        return torch.tensor([[*self._prepared.prompt, *self.job.tokens]])

    def generator(self, device: torch.device) -> torch.Generator:
        """What it draws from: with the same seed the global one would draw the same, if nobody else drew from it."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.job.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.job.seed)
        return self._generator


@dataclass(frozen=True)
class StartedSteps:
    """Steps of the same rows that run or have run.

    Attributes:
        rows: of the steps, in their order.
        tokens: of each step, one for each row.
        failures: of single rows, by their place.
    """

    rows: list[Row]
    tokens: Sequence[SupportsToList]
    failures: dict[int, Exception]
