"""Binding torch tensors to ONNX Runtime by address, once for many runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from t5_trt.runtime.kv_buffers import Binding

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int8: np.int8, torch.uint8: np.uint8}


@dataclass(frozen=True)
class LoadedGraph:
    """ONNX Runtime's session of a graph, and the weights that the graph takes as inputs."""

    session: Any
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class BoundStep:
    """A `t5_trt.runtime.kv_buffers.Binding`: the one-token step over the addresses of a state.

    Attributes:
        owner: of the session.
        session: ONNX Runtime's.
        io: ONNX Runtime's binding.
        tokens: int64 [R, 1], the step's input.
        position: int64 [1].
        inputs: tensors whose memory is bound.
        earlier: another session's binding, which may have lent the state its memory.
    """

    owner: object
    session: Any
    io: Any
    tokens: torch.Tensor
    position: torch.Tensor
    inputs: dict[str, torch.Tensor]
    earlier: Binding | None

    def of(self, owner: object) -> bool:
        """See `t5_trt.runtime.kv_buffers.Binding.of`."""
        return self.owner is owner


@dataclass(frozen=True)
class BoundRows:
    """The step of a number of rows over `RowBuffers`; session and binding are ONNX Runtime's, logits float32 [rows, V]."""

    session: Any
    io: Any
    logits: torch.Tensor


def bind(bind_one: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Bind contiguous tensors by address; the caller keeps them alive as long as the binding."""
    for name, tensor in tensors.items():
        bind_one(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
