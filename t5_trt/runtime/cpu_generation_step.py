"""A decoder step on a CPU and the choice of its tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from t5_trt.runtime.kv_buffers import DecoderState
from t5_trt.runtime.session import TokenSelector


class Step(Protocol):
    """A decoder step, see `t5_trt.runtime.onnxruntime_session.OrtSession.step`."""

    def __call__(  # noqa: D102 - see above
        self,
        state: DecoderState,
        input_ids: torch.Tensor,
        logits: torch.Tensor,
        hidden: torch.Tensor | None = None,
        *,
        best_only: bool = False,
    ) -> None: ...


class CpuGenerationStep:
    """A step followed by a token selector; see `t5_trt.runtime.session.GenerationStep`.

    Args:
        step: of the session.
        vocabulary: V.
        state: of R rows.
        selector: for R rows.
    """

    def __init__(self, step: Step, vocabulary: int, state: DecoderState, selector: TokenSelector) -> None:
        self.selector = selector
        self.tokens = torch.zeros((state.rows, 1), dtype=torch.int64)
        self._step, self._state = step, state
        self._logits = torch.empty((state.rows, 1, vocabulary), dtype=torch.float32)
        self._position = torch.zeros(1, dtype=torch.int64)
        self._ends = None if selector.hiding is None else selector.hiding.tokens.nonzero()[:, 0]

    def feed(self, tokens: torch.Tensor) -> None:
        """See `t5_trt.runtime.session.GenerationStep.feed`."""
        self.tokens.copy_(tokens)

    def launch(self) -> None:
        """See `t5_trt.runtime.session.GenerationStep.launch`."""
        state, selector = self._state, self.selector
        self._position.fill_(state.length)
        self._step(state, self.tokens, self._logits, self._hidden(state.length + 1), best_only=selector.takes_best)
        made = selector.advance(self._logits[:, 0], self._position)
        assert made is not None
        chosen, parents = made
        self.tokens.copy_(chosen[:, None])
        if parents is not None:
            state.reorder(parents)

    def _hidden(self, length: int) -> torch.Tensor | None:
        """The tokens that the selector hides after so many, int64."""
        hiding = self.selector.hiding
        return None if hiding is None or length >= float(hiding.until) else self._ends
