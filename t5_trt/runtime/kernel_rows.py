"""Rows at positions of their own on a GPU: their buffers, and the kernels' step over the first rows of them.

How data flows, all of it in the order of one stream:

    host     tokens, positions, source lengths -> page-locked int32 [3, R] -> one copy to the GPU before each step
    joining  the encoder's K and V of a source -> the row's part of `cross`; its own cache needs nothing, as its position is 0
    step     a CUDA graph over the first rows, their number rounded up: rows of padding stand at position 0 and write where nobody reads
    after    the best tokens (int64 [count]) or logits stay on the GPU until the next step; whoever wants them on the host copies them
    leaving  the last row's K and V -> the free row

The kernels read no key behind a row's position or a source's length, so what is left there harms nobody, and room that is too large costs
nothing but memory: it grows by doubling, and every growth costs new captures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.decode_step import CHUNK, DecodeKernels, DecodeStep, StepBuffers, StepInputs, StepWeights
from t5_trt.runtime.row_buffers import RowBuffers

#: rows of a group, of which kernels compute all or none
GROUP = 8


def padded_count(count: int, rows: int) -> int:
    """Rows that a step is captured for, of `rows` that there are: all of a group cost what one does, but fewer are started sooner."""
    padded = 1 << (count - 1).bit_length() if count <= GROUP else -(-count // GROUP) * GROUP
    return min(padded, rows)


class KernelRowBuffers(RowBuffers):
    """As `RowBuffers`, with int32 numbers that the host hands over in one copy before each step.

    Attributes:
        numbers: int32 [3, R]: tokens, positions and source lengths.
        best: int64 [R], the tokens that a step chose.
        logits: float32 [R, V], where it was asked for them.
    """

    smallest = (CHUNK, CHUNK)
    slack = 8
    reads_empty_places = False

    def __init__(
        self, arch: Architecture, rows: int, *, dtype: torch.dtype, hidden: float, device: torch.device
    ) -> None:
        super().__init__(arch, rows, dtype=dtype, bias_dtype=torch.float32, hidden=hidden, device=device)
        on_gpu = device.type == "cuda"
        self.numbers = torch.zeros((3, rows), dtype=torch.int32, device=device)
        self.tokens, self.positions = self.numbers[0, :, None], self.numbers[1]
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits = torch.zeros((rows, arch.vocab_size), device=device)
        self._arch = arch
        self._host = torch.zeros((3, rows), dtype=torch.int32, pin_memory=on_gpu)
        self._written = self._host.numpy()
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def feed(self, tokens: Sequence[int]) -> None:
        """See `RowBuffers.feed`; the GPU gets them with the step."""
        if self._copied is not None:
            self._copied.synchronize()  # what is still being copied must stay as it is
        self._written[0, : self.count] = tokens

    def hand_over(self) -> None:
        """Copy the numbers of the rows in use to the GPU; those of all others are 0."""
        count = self.count
        self._written[1, :count], self._written[2, :count] = self._lengths[:count], self._sources[:count]
        self._written[:, count:] = 0
        self.numbers.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.numbers.device))

    def step(self, count: int, kernels: DecodeKernels, weights: StepWeights, embedding_scale: float) -> DecodeStep:
        """The step over the first `count` rows. All such steps share what kernels hand on, as none runs beside another."""
        tokens, positions, lengths = self.numbers
        inputs = StepInputs(
            tokens[:count], positions, self.kv, self.cross, self.cross_bias[:, 0, 0], lengths, 1, self.logits
        )
        shared: Any = self.bindings.get("buffers")
        if shared is None:
            chunks = -(-max(self.capacity, self.source_capacity) // CHUNK)
            shared = StepBuffers.allocate(
                self._arch, self.kv.dtype, self.rows, chunks, self.kv.device, int8=weights.int8
            )
            self.bindings["buffers"] = shared
        return DecodeStep(self._arch, kernels, weights, shared, inputs, self._arch.epsilon, embedding_scale)

    def name_best(self, ranks: torch.Tensor) -> None:
        """Turn what the kernels left for each of the first rows (see `t5_trt.runtime.session.NextStep.best`) into tokens, and clear it."""
        best = self.best[: len(ranks)]
        torch.bitwise_not(ranks, out=best)
        best.bitwise_and_(0xFFFFFFFF)
        ranks.zero_()
