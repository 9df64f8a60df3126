"""An encoder output with the cross-attention K/V that the encoder engine computed along with it.

The K/V are used only while they certainly belong to the hidden states: if those were replaced, copied or written to, the K/V are
computed again from the hidden states that the caller passes.
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

    def remember(
        self, cross: CrossStates, session: Session, given_mask: Any = None, mask: torch.Tensor | None = None
    ) -> EngineEncoderOutput:
        """Attach what a session computed from the current `last_hidden_state`.

        Args:
            cross: K/V.
            session: that made them.
            given_mask: the caller's attention mask.
            mask: the same, checked: int64 [B, S].
        """
        hidden = self["last_hidden_state"]
        # plain attributes are not ModelOutput fields: tuple(), ** and copies drop them, as intended. Setting them one by one takes 2 us each
        self.__dict__.update(
            _cross=cross, _source=hidden, _version=hidden._version, _maker=weakref.ref(session), _updates=session.updates,
            _given_mask=version_of(given_mask), _mask=mask,
        )  # fmt: skip
        return self


def share(encoder_outputs: Any, session: Session, given_mask: Any, beams: int) -> bool:
    """Have the K/V of an output that nobody else holds serve `beams` decoder rows of each source; its hidden states need not be repeated then.

    Returns:
        False where it has no K/V of its hidden states, or the mask is not the encoder's: everything is as before.
    """
    cross, mask = recall(encoder_outputs, session), recall_mask(encoder_outputs, given_mask)
    if cross is None or mask is None:
        return False
    encoder_outputs.remember(cross.for_beams(beams), session, given_mask, mask)
    return True


def recall(encoder_outputs: Any, session: Session) -> CrossStates | None:
    """The K/V attached to an encoder output; None if its hidden states or the session are not those they were made with."""
    cross = getattr(encoder_outputs, "_cross", None)
    if not isinstance(encoder_outputs, EngineEncoderOutput) or not isinstance(cross, CrossStates):
        return None
    hidden: torch.Tensor = encoder_outputs["last_hidden_state"]
    same = hidden is encoder_outputs._source and hidden._version == encoder_outputs._version
    same = same and encoder_outputs._maker() is session and encoder_outputs._updates == session.updates
    return cross if same else None


def recall_mask(encoder_outputs: Any, given_mask: Any) -> torch.Tensor | None:
    """The checked form of a mask that the encoder ran with, int64 [B, S]; None if it is another mask or was written to since."""
    if not isinstance(encoder_outputs, EngineEncoderOutput):
        return None
    then, now = getattr(encoder_outputs, "_given_mask", None), version_of(given_mask)
    same = then is not None and now is not None and then[0] is now[0] and then[1] == now[1]
    return encoder_outputs._mask if same else None


def version_of(mask: Any) -> tuple[Any, int] | None:
    """Identity and version of a mask; None for inference tensors, which have no version counter."""
    tracked = not (isinstance(mask, torch.Tensor) and mask.is_inference())
    return (mask, getattr(mask, "_version", 0)) if tracked else None
