"""One row of the batch: its request, the choice of its next token, and its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.sampling import draw
from t5_trt.runtime.kv_buffers import bucket_length
from t5_trt.runtime.row_buffers import SupportsToList
from t5_trt.runtime.top_tokens import best
from t5_trt.serving.handle import Job
from t5_trt.serving.settings import Prepared


class Row:
    """A request in a row. Its tokens are chosen one row at a time, by what chooses those of ``generate()`` alone.

    Args:
        job: the request, of which no token has been made.
        processors: gives the device forms of settings, see `device_processors`.

    Attributes:
        plain: it takes the token of the largest logit from now on.
        token: the last one that is known, which the next step decodes unless one is on its way.
        place: of the row in the last step that was started; -1 where all of its tokens are known.
        under_way: steps whose tokens are not known.
        left: tokens that may still come, those of steps under way counted.
        vacant: its place is free.
        vacant_steps: which have decoded it since.
        over: the request has ended, whatever is on its way.
    """

    def __init__(self, job: Job, processors: Callable[[Prepared], CapturableProcessors | None]) -> None:
        self.job = job
        self._prepared, self._processors = job.prepared, processors
        self._process: CapturableProcessors | None = None
        self._generator: torch.Generator | None = None
        self._history: torch.Tensor | None = None  # int64 [1, M] where logits are, made when a processor wants it
        self._position: torch.Tensor | None = None  # int64 [1], of the last token in it
        self._eos = job.prepared.eos
        self.plain = not job.prepared.do_sample and not job.prepared.processors
        self.token = job.prepared.prompt[-1]
        self.place, self.under_way, self.vacant, self.vacant_steps, self.over = -1, 0, False, 0, False
        self.left = job.prepared.limit - len(job.prepared.prompt)

    @property
    def hides_end(self) -> bool:
        """Whether the next token is that of the largest logit but for the end tokens; once it is not, the row is `plain`."""
        prepared = self._prepared
        hides = len(prepared.prompt) + len(self.job.tokens) < prepared.hidden_until
        self.plain |= prepared.hidden_until > 0 and not hides
        return hides

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token, int64 [1], where the logits are; on a GPU this does not wait for it.

        Args:
            logits: float32 [1, V].
        """
        scores = self._processed(logits) if self._prepared.processors else logits
        if self._prepared.do_sample:
            # a generator of its own draws what the global one would with the same seed, if nobody else drew from it
            chosen = draw(scores, 1, capturable=True, generator=self._draws(logits.device)).flatten()
        else:
            chosen = best(scores)
        if self._history is not None and self._position is not None:
            self._history.index_copy_(1, self._position.add_(1), chosen[:, None])
        return chosen

    def take(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Give the request tokens up to its end; how many these are, and whether it is over with them."""
        for count, token in enumerate(tokens, 1):
            self.token = token
            self.job.put(token)
            self.left -= 1
            if token in self._eos or self.left <= 0:
                return count, True
        return len(tokens), False

    @property
    def result(self) -> torch.Tensor:
        """All tokens, int64 [1, tokens]."""
        return torch.tensor([[*self._prepared.prompt, *self.job.tokens]])

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        prompt = self._prepared.prompt
        if self._history is None or self._position is None:
            self._history = torch.zeros((1, history_room(self._prepared)), dtype=torch.int64, device=logits.device)
            for place, token in enumerate(prompt):
                self._history[:, place] = token
            self._process = self._processors(self._prepared)
            self._position = torch.full((1,), len(prompt) - 1, device=logits.device)
        if self._process is not None:
            return self._process(self._history, self._position, logits)
        scores, tokens = logits, self._history[:, : len(prompt) + len(self.job.tokens)]
        for processor in self._prepared.processors:
            scores = processor(tokens, scores)
        return scores

    def _draws(self, device: torch.device) -> torch.Generator:
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


def device_processors(prepared: Prepared, vocab_size: int, device: torch.device) -> CapturableProcessors | None:
    """The forms of a request's processors that do not wait for a GPU; None where one of them has none."""
    forms = capturable_processors(prepared.processors, vocab_size, history_room(prepared), device)
    return None if forms is None else CapturableProcessors(forms)


def history_room(prepared: Prepared) -> int:
    """Tokens that a request's processors may look back at."""
    return bucket_length(prepared.limit + 1)
