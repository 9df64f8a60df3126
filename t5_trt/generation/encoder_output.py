"""An encoder output that remembers the cross-attention K/V which the encoder engine made along with it.

The memory is used only while it is certain to belong to the hidden states: after they were replaced, copied or written
to, the K/V are computed anew from what the caller hands in.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.session import Session


@dataclass
class EngineEncoderOutput(BaseModelOutput):
    """`BaseModelOutput` (last_hidden_state [B, S, E]) with the K/V of those states attached."""

    def remember(self, cross: CrossStates, session: Session) -> EngineEncoderOutput:
        """Attach K/V that a session computed from the current `last_hidden_state`."""
        hidden = self["last_hidden_state"]
        # plain attributes are not ModelOutput fields: tuple(), ** and copies leave them behind, which is what we want
        self._cross, self._source, self._version, self._maker = cross, hidden, hidden._version, weakref.ref(session)
        self._updates = session.updates
        return self


def recall(encoder_outputs: Any, session: Session) -> CrossStates | None:
    """The K/V attached to an encoder output; None if its hidden states or the session are not those they were made with."""
    cross = getattr(encoder_outputs, "_cross", None)
    if not isinstance(encoder_outputs, EngineEncoderOutput) or not isinstance(cross, CrossStates):
        return None
    hidden: torch.Tensor = encoder_outputs["last_hidden_state"]
    same = hidden is encoder_outputs._source and hidden._version == encoder_outputs._version
    same = same and encoder_outputs._maker() is session and encoder_outputs._updates == session.updates
    return cross if same else None
