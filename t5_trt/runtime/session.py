"""What every backend offers to the model: encode, project, decode. Generation loops and modeling use nothing else."""

from __future__ import annotations

from typing import Protocol

import torch

from t5_trt.architecture import Architecture
from t5_trt.runtime.buffers import CrossStates, DecoderState


class Session(Protocol):
    """Engines of one model on one device. Calls are thread-safe as long as each thread has its own `DecoderState`."""

    arch: Architecture
    backend: str
    precision: str
    device: torch.device
    dtype: torch.dtype

    def encode(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, CrossStates]:
        """Run the encoder.

        Args:
            input_ids: int64 [B, S], or None with `inputs_embeds`.
            inputs_embeds: [B, S, E], or None with `input_ids`.
            attention_mask: int64 [B, S], 0 hides a token.

        Returns:
            Hidden states [B, S, E] and the decoder's cross-attention K/V.
        """
        ...

    def project_cross(self, hidden: torch.Tensor) -> CrossStates:
        """Cross-attention K/V of encoder states [B, S, E] that came from elsewhere."""
        ...

    def start(self, cross: CrossStates, capacity_tokens: int) -> DecoderState:
        """An empty cache over sources, with room for at least `capacity_tokens`; no source token is hidden yet."""
        ...

    def cross_bias(self, attention_mask: torch.Tensor, cross: CrossStates) -> torch.Tensor:
        """Additive form of a mask [B, S], shaped [B, 1, 1, S] as the buffers of `cross` are."""
        ...

    def streams(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the encoder or the many-query decoder once on full buffers, for finding where a result goes wrong.

        Args:
            graph: `t5_trt.signature.ENCODER` or `QUERIES`.
            inputs: every input of the graph's signature, on the device, of buckets' sizes.

        Returns:
            The residual stream after every block, [rows of tokens, E] each, named "encoder.block.0" and so on, and
            "encoder_hidden_states" [B, S, E] or "logits" [R, Q, V].
        """
        ...

    def decode(
        self, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the decoder on Q new tokens per row and write their K/V into the state.

        Args:
            state: of R rows; it is Q tokens longer afterwards.
            input_ids: int64 [R, Q].
            key_mask: int64 [R, length + Q], 0 hides one of the decoder's own tokens; None hides none.

        Returns:
            Logits, float32 [R, Q, V], in memory that later calls do not touch.
        """
        ...
