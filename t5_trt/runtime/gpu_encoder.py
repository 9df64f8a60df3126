"""The encoder of the backend "cuda" as a session calls it: captured where it pays, with the decoder's cross-attention K/V."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from t5_trt.runtime.captured_encoder import CapturedEncoder, CapturedSizes
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.packed_sources import PackedEncoder
from t5_trt.runtime.row_sources import (
    BatchSize,
    EncoderStream,
    RowSources,
    Source,
    common_size,
    pad,
    padded_size,
)
from t5_trt.runtime.torch_layers import TorchEncoder


class GpuEncoder:
    """Runs an encoder of our own. Not thread-safe: its session takes turns.

    Args:
        form: computes, by kernels or by torch.
        device: the GPU.

    Attributes:
        beside: the stream of sources that are encoded beside steps.
        batch_size: see `t5_trt.runtime.row_buffers.RowSession`.
    """

    def __init__(self, form: TorchEncoder, device: torch.device) -> None:
        self.form, self.beside = form, EncoderStream(device)
        self.batch_size: BatchSize | None = None if form.packs else common_size
        self._sizes = CapturedSizes(device)
        self._captured = CapturedEncoder(partial(_both, form), self._sizes)
        self._packed = PackedEncoder(form, self._sizes, self.beside)

    def encode(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`."""
        if input_ids is None:
            hidden = self.form.run(None, inputs_embeds, attention_mask)
            return hidden, self.project(hidden)
        hidden, cross = self._captured.run(input_ids, attention_mask)
        return hidden, CrossStates(cross, used=(hidden.shape[0], hidden.shape[1]))

    def encode_rows(self, sources: Sequence[Source], hidden_bias: float) -> RowSources:
        """Encode sources for rows in the stream `beside`, which is the current one.

        Args:
            sources: of any lengths.
            hidden_bias: value of the cross bias that hides a token.
        """
        if self.batch_size is None:
            return self._packed.run(sources, hidden_bias)
        rows, tokens = padded_size(sources, self.batch_size)
        given = self.beside.host_memory(2 * rows * tokens).view(2, rows, tokens)
        places = pad(sources, given)
        ids, mask = self.beside.upload(given)
        _, cross = self.encode(ids, None, mask)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, hidden_bias)
        return self.beside.sources(cross.kv, bias, places)

    def project(self, hidden: torch.Tensor) -> CrossStates:
        """Cross-attention K/V of hidden states [B, S, E] in the session's type."""
        return CrossStates(self.form.cross(hidden), used=(hidden.shape[0], hidden.shape[1]))

    def clear(self) -> None:
        """Drop what was captured."""
        self._sizes.clear()


def _both(
    form: TorchEncoder, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = form.run(input_ids, None, attention_mask)
    return hidden, form.cross(hidden)
