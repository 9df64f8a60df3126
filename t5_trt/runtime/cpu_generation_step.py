"""A decoder step on a CPU and the choice of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from t5_trt.runtime.kv_buffers import DecoderState
from t5_trt.runtime.session import TokenSelector

if TYPE_CHECKING:
    from t5_trt.runtime.onnxruntime_session import OrtSession


class CpuGenerationStep:
    """A step followed by a token selector; see `t5_trt.runtime.session.GenerationStep`.

    Args:
        session: that decodes.
        state: of R rows.
        selector: for R rows.
    """

    def __init__(self, session: OrtSession, state: DecoderState, selector: TokenSelector) -> None:
        self.selector = selector
        self.tokens = torch.zeros((state.rows, 1), dtype=torch.int64)
        self._session, self._state = session, state
        self._logits = torch.empty((state.rows, 1, session.arch.vocab_size), dtype=torch.float32)
        self._position = torch.zeros(1, dtype=torch.int64)
        self._ends = None if selector.hiding is None else selector.hiding.tokens.nonzero()[:, 0]

    def feed(self, tokens: torch.Tensor) -> None:
        """See `t5_trt.runtime.session.GenerationStep.feed`."""
        self.tokens.copy_(tokens)

    def launch(self) -> None:
        """See `t5_trt.runtime.session.GenerationStep.launch`."""
        state, selector = self._state, self.selector
        self._position.fill_(state.length)
        hiding = selector.hiding
        hidden = self._ends if hiding is not None and hiding.holds(state.length + 1) else None
        self._session.step(state, self.tokens, self._logits, hidden, best_only=selector.takes_best)
        made = selector.advance(self._logits[:, 0], self._position)
        assert made is not None
        chosen, parents = made
        self.tokens.copy_(chosen[:, None])
        if parents is not None:
            state.reorder(parents)
