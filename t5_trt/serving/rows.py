"""One row of the batch: its request, the choice of its next token, and its end."""

from __future__ import annotations

import torch

from t5_trt.serving.handle import Job


class Row:
    """A request in a row. Its tokens are chosen by Transformers' own processors, one row at a time, as ``generate()`` alone chooses them.

    Args:
        job: the request, without tokens so far.

    Attributes:
        plain: it always takes the token of the largest logit.
        token: the one that the next step decodes.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._prepared = job.prepared
        self._generator: torch.Generator | None = None
        self.plain = not job.prepared.do_sample and not job.prepared.processors
        self.token = job.prepared.prompt[-1]

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: float32 [1, V].
        """
        scores = logits
        if self._prepared.processors:
            tokens = torch.tensor([[*self._prepared.prompt, *self.job.tokens]], device=logits.device)
            for processor in self._prepared.processors:
                scores = processor(tokens, scores)
        if not self._prepared.do_sample:
            return int(scores.argmax(-1))
        # its own generator draws as the global one with the same seed, without draws by others
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._draws(logits.device)))

    def take(self, token: int) -> bool:
        """Add a token; return whether the request has ended."""
        job, prepared = self.job, self._prepared
        self.token = token
        job.put(token)
        if token not in prepared.eos and len(prepared.prompt) + len(job.tokens) < prepared.limit:
            return False
        job.finish(torch.tensor([[*prepared.prompt, *job.tokens]]))
        return True

    def _draws(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.job.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.job.seed)
        return self._generator
