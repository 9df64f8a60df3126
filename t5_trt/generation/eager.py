"""Token selection with user callbacks or with kept scores, which cannot be part of a CUDA graph.

The order of calls and their tensors are those of ``GenerationMixin._sample`` and ``_beam_search``. Tensors given to user code are not
written to afterwards, and user code that writes into them has the same effect as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from t5_trt.generation.beam_search import BeamRules, BeamSelector
from t5_trt.generation.processors import CapturableProcessors
from t5_trt.generation.sampling import draw
from t5_trt.runtime.session import NextStep
from t5_trt.runtime.top_tokens import log_softmax


@dataclass(frozen=True)
class EagerCallbacks:
    """Per-step work that cannot be captured.

    Attributes:
        process: called with the tokens so far, int64 [R, tokens], and the scores of the next one, float32 [R, V].
        criteria: called with the tokens, the new one included, and the scores of all steps.
        scores: an empty list that takes the processed scores of every step, float32 [R, V]; None keeps none.
        logits: the same for unprocessed logits.
    """

    process: LogitsProcessorList
    criteria: StoppingCriteriaList
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

    def keep(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep a step's tensors, which must not be written to afterwards."""
        for kept, values in ((self.scores, scores), (self.logits, logits)):
            if kept is not None:
                kept.append(values)

    def hits(self, rows: torch.Tensor) -> Any:
        """Which rows of tokens, int64 [rows, tokens], a criterion ends: bool [rows]."""
        return self.criteria(rows, None if self.scores is None else tuple(self.scores))  # type: ignore[arg-type]


class EagerTokenSelector:
    """Chooses one token for every row, as `t5_trt.generation.sampling.RowTokenSelector` does, with callbacks.

    Args:
        rows: R.
        calls: see `EagerCallbacks`.
        pad: token id that pads rows after their end; None where Transformers continues to write tokens.
        do_sample: draw instead of taking the best.
        device: of the tensors.

    Attributes:
        input_ids: int64 [R, tokens so far], a new tensor in every step.
    """

    capturable = False
    takes_best = False
    moves_rows = False
    hiding = None
    mailbox = None

    def __init__(
        self, rows: int, calls: EagerCallbacks, pad: int | None, *, do_sample: bool, device: torch.device
    ) -> None:
        self.rows, self.draws = rows, do_sample
        self.input_ids = torch.zeros((rows, 0), dtype=torch.int64, device=device)
        self.report = torch.zeros(1 + 2 * rows, dtype=torch.int64, device=device)
        self.expired = torch.zeros(1, dtype=torch.bool, device=device)  # unused: the criteria look at the clock
        self._unfinished = torch.ones(rows, dtype=torch.int64, device=device)
        self._calls, self._pad = calls, pad

    def load(self, processors: Sequence[Any]) -> None:
        """Do nothing: this selector was made for its request."""

    def begin(self, prompt: torch.Tensor, limit: int = 0, longest: int = 0) -> None:
        """Start with a prompt, int64 [R, tokens]; the other numbers are for beams."""
        self.input_ids = prompt

    def take_over(self, other: EagerTokenSelector, rows: torch.Tensor | None = None) -> None:
        """Continue from another selector's state; its rows are never dropped."""
        assert rows is None
        self.input_ids, self._unfinished = other.input_ids, other._unfinished

    def results(self, length: int) -> tuple[torch.Tensor, ...]:
        """The tokens of every row."""
        return (self.input_ids,)

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, None]:
        """See `t5_trt.generation.sampling.RowTokenSelector.advance`."""
        logits = logits.clone()
        scores = self._calls.process(self.input_ids, logits)  # type: ignore[arg-type]
        self._calls.keep(scores, logits)
        chosen = draw(scores, 1, capturable=False).squeeze(1) if self.draws else scores.argmax(-1)
        if self._pad is not None:
            chosen = chosen.masked_fill(self._unfinished == 0, self._pad)
        self.input_ids = torch.cat((self.input_ids, chosen[:, None]), dim=-1)
        self._unfinished = self._unfinished & ~self._calls.hits(self.input_ids)
        self.report[:1] = self._unfinished.max() == 0
        self.report[1 : 1 + self.rows] = self._unfinished == 0
        self.report[1 + self.rows :] = chosen
        return self.input_ids[:, -1], None


class EagerBeamSelector(BeamSelector):
    """A `BeamSelector` that calls `EagerCallbacks` between its steps."""

    capturable = False

    def __init__(
        self, batch: int, capacity: int, calls: EagerCallbacks, rules: BeamRules, *, device: torch.device
    ) -> None:
        super().__init__(batch, capacity, CapturableProcessors(()), rules, device=device)
        self.mailbox = None
        self._calls = calls
        self._prompt: torch.Tensor | None = None  # until the first step
        self._length = 0

    def load(self, processors: Sequence[Any]) -> None:
        """Do nothing: this selector was made for its request."""

    def begin(self, prompt: torch.Tensor, limit: int, longest: int) -> None:
        """See `BeamSelector.begin`."""
        super().begin(prompt, limit, longest)
        self._prompt, self._length = prompt, prompt.shape[1]

    def take_over(self, other: BeamSelector, rows: torch.Tensor | None = None) -> None:
        """See `BeamSelector.take_over`."""
        assert isinstance(other, EagerBeamSelector)
        super().take_over(other, rows)
        self._prompt, self._length = other._prompt, other._length

    def advance(
        self, logits: torch.Tensor, position: torch.Tensor, following: NextStep | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BeamSelector.advance`."""
        log_probs = log_softmax(logits)
        if self._prompt is not None:  # these are copies: writing into them changes no beam
            log_probs, self._prompt = self._calls.process(self._prompt, log_probs), None  # type: ignore[arg-type]
        else:
            buffer = self.tokens.flatten(0, 1)[:, : self._length]
            input_ids = buffer.clone()
            log_probs = self._calls.process(input_ids, log_probs)  # type: ignore[arg-type]
            buffer.copy_(input_ids)
        self._calls.keep(log_probs.clone(), logits.clone())
        self._length += 1
        scores, places = self._candidates(log_probs)
        vocabulary = log_probs.shape[-1]
        return self._step(scores, places // vocabulary, places % vocabulary, position)

    def _hits(self, sequences: torch.Tensor, place: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        hits: torch.Tensor = self._calls.hits(sequences[:, :, : self._length].flatten(0, 1))
        return hits.view(ids.shape)
