"""The one-token decoder step on a GPU: by the library's kernels or by a TensorRT engine. A session holds one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from t5_trt.runtime.kv_buffers import CrossStates, DecoderState
from t5_trt.runtime.session import GenerationStep, TokenSelector


class StepDecoder(Protocol):
    """Decodes one token of every row. Not thread-safe: its session takes turns."""

    def start(self, cross: CrossStates, cross_bias: torch.Tensor, capacity_tokens: int) -> DecoderState:
        """An empty cache for the rows of some sources, see `t5_trt.runtime.session.Session.start`.

        Args:
            cross: the sources.
            cross_bias: [B, 1, 1, S] as the buffers of `cross` are.
            capacity_tokens: number of tokens to reserve room for.
        """
        ...

    def step(self, state: DecoderState, input_ids: torch.Tensor) -> torch.Tensor:
        """Decode one token of every row, int64 [R, 1], of a state with room for it; return logits [R, 1, V] in new memory."""
        ...

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> GenerationStep:
        """See `t5_trt.runtime.session.Session.generation_step`."""
        ...

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`."""
        ...

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`."""
        ...

    def update_weight(self, key: str, tensor: torch.Tensor) -> None:
        """Write a new value of a checkpoint tensor into weights that only this decoder reads, in place.

        Args:
            key: of the state dict; what it maps to has changed, too.
            tensor: on the device.
        """
        ...

    def forget(self) -> None:
        """Free idle buffers and what was captured over them."""
        ...

    @property
    def weight_bytes(self) -> int:
        """GPU memory of weights that only this decoder reads, in bytes."""
        ...
