"""The encoder of the backend "cuda" as a session calls it: captured where it pays, with the decoder's cross-attention K/V."""

from __future__ import annotations

from functools import partial

import torch

from t5_trt.runtime.captured_encoder import CapturedEncoder
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.row_sources import EncoderStream
from t5_trt.runtime.torch_layers import TorchEncoder


class GpuEncoder:
    """Runs an encoder of our own. Not thread-safe: its session takes turns.

    Args:
        form: computes, by kernels or by torch.
        device: the GPU.

    Attributes:
        beside: the stream of sources that are encoded beside steps.
    """

    def __init__(self, form: TorchEncoder, device: torch.device) -> None:
        self.form, self.beside = form, EncoderStream(device)
        self._captured = CapturedEncoder(partial(_both, form), device)

    def encode(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`."""
        if input_ids is None:
            hidden = self.form.run(None, inputs_embeds, attention_mask)
            return hidden, self.project(hidden)
        hidden, cross = self._captured.run(input_ids, attention_mask)
        return hidden, CrossStates(cross, used=(hidden.shape[0], hidden.shape[1]))

    def project(self, hidden: torch.Tensor) -> CrossStates:
        """Cross-attention K/V of hidden states [B, S, E] in the session's type."""
        return CrossStates(self.form.cross(hidden), used=(hidden.shape[0], hidden.shape[1]))

    def clear(self) -> None:
        """Drop what was captured."""
        self._captured.clear()


def _both(
    form: TorchEncoder, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = form.run(input_ids, None, attention_mask)
    return hidden, form.cross(hidden)
