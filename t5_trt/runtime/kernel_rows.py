"""Rows at positions of their own on a GPU: their buffers, and the kernels' step over the first rows of them.

How data flows, all of it in the order of one stream:

    host     tokens, positions, source lengths, where tokens come from -> page-locked int32 [4, R] -> one copy to the GPU before each step,
             but for one that follows another one of the same rows
    tokens   the host's, or what the step before chose for a row, which need not have come to the host
    joining  the encoder's K and V of a source -> the row's part of `cross`; its own cache needs nothing, as its position is 0
    step     a CUDA graph over the first rows, their number rounded up: rows of padding stand at position 0 and write where nobody reads
    after    the best tokens (int32 [count]) or logits stay on the GPU until the next step; whoever wants them on the host copies them
    leaving  the last row's K and V -> the free row

The kernels read no key behind a row's position or a source's length, so what is left there harms nobody, and room that is too large costs
nothing but memory: it grows by doubling, and every growth costs new captures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.decode_step import CHUNK, DecodeKernels, DecodeStep
from t5_trt.kernels.step_memory import StepBuffers, StepInputs, StepWeights
from t5_trt.runtime.row_buffers import RowBuffers

#: rows of a group, of which kernels compute all or none
GROUP = 8
#: steps that may be started before anyone has seen the tokens of the first of them: what the host does between two steps may take as long
STEPS_AHEAD = 2
#: steps that are started at once at most, see `RowBuffers.follow`
STEPS_AT_ONCE = 2


def padded_count(count: int, rows: int) -> int:
    """Rows that a step is captured for, of `rows` that there are: all of a group cost what one does, but fewer are started sooner."""
    padded = 1 << (count - 1).bit_length() if count <= GROUP else -(-count // GROUP) * GROUP
    return min(padded, rows)


class FetchedTokens:
    """Tokens on their way from a GPU to the host.

    Args:
        rows: most tokens.
        on_gpu: they come from one.
    """

    def __init__(self, rows: int, on_gpu: bool) -> None:
        self._memory, self._count = torch.zeros(rows, dtype=torch.int32, pin_memory=on_gpu), 0
        self._there: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def begin(self, made: torch.Tensor) -> None:
        """Start to copy tokens [count]."""
        self._count = len(made)
        self._memory[: self._count].copy_(made, non_blocking=True)
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(made.device))

    def tolist(self) -> list[int]:
        """The tokens; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._memory[: self._count].tolist()  # type: ignore[no-any-return]


class HandedNumbers:
    """Numbers on their way from the host to a GPU.

    Args:
        rows: entries of each of the four kinds.
        on_gpu: they go to one.

    Attributes:
        written: int32 [4, rows].
    """

    def __init__(self, rows: int, on_gpu: bool) -> None:
        self._memory = torch.zeros((4, rows), dtype=torch.int32, pin_memory=on_gpu)
        self._copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.written = self._memory.numpy()

    def begin(self, target: torch.Tensor) -> None:
        """Start to copy them."""
        target.copy_(self._memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        """Wait until they are copied: what is on its way must stay as it is."""
        if self._copied is not None:
            self._copied.synchronize()


class KernelRowBuffers(RowBuffers):
    """As `RowBuffers`, with int32 numbers that the host hands over in one copy before each step.

    Attributes:
        numbers: int32 [5, R]: what the last step chose, the host's tokens, positions, source lengths, and for each row which of the
            first 2 R numbers is its token.
        best: int32 [R], the tokens that a step chose.
        logits: float32 [R, V], where it was asked for them.
    """

    smallest = (CHUNK, CHUNK)
    slack = 8
    reads_empty_places = False
    remembers_tokens = True

    def __init__(
        self, arch: Architecture, rows: int, *, dtype: torch.dtype, hidden: float, device: torch.device
    ) -> None:
        super().__init__(arch, rows, dtype=dtype, bias_dtype=torch.float32, hidden=hidden, device=device)
        on_gpu = device.type == "cuda"
        self.numbers = torch.zeros((5, rows), dtype=torch.int32, device=device)
        self.tokens, self.positions = torch.zeros((rows, 1), dtype=torch.int32, device=device), self.numbers[2]
        self.best = torch.zeros(rows, dtype=torch.int32, device=device)
        self.logits = torch.zeros((rows, arch.vocab_size), device=device)
        self._arch = arch
        self._chosen, self._given = self.numbers[0], self.numbers[1:]
        self._own = np.arange(rows, 2 * rows, dtype=np.int32)  # the places of the host's tokens
        # the last one is the latest
        self._handed = deque(HandedNumbers(rows, on_gpu) for _ in range(STEPS_AHEAD + 1))
        self._fetched = deque(FetchedTokens(rows, on_gpu) for _ in range(STEPS_AHEAD + 2 * STEPS_AT_ONCE - 1))
        self._follows = False
        self._in_place = torch.arange(rows, dtype=torch.int32, device=device)  # the places of what the last step chose

    def feed(self, tokens: Sequence[int], places: Sequence[int] | None = None) -> None:
        """See `RowBuffers.feed`; the GPU gets them with the step."""
        self._handed.rotate(-1)
        self._handed[-1].wait()
        count, written = self.count, self._handed[-1].written
        written[0, :count], written[0, count:], written[3] = tokens, 0, self._own
        if places is not None:
            given = np.array(places, dtype=np.int32)
            written[3, :count] = np.where(given < 0, self._own[:count], given)

    def follow(self) -> None:
        """See `RowBuffers.follow`; the host has no numbers for such a step."""
        self._follows = True

    def remember(self, made: torch.Tensor) -> None:
        """See `RowBuffers.remember`."""
        self.best[: len(made)].copy_(made)

    def hand_over(self) -> None:
        """Copy the numbers of the rows in use to the GPU, where those of all others are 0; or have the next step follow the last one."""
        count = self.count
        self._chosen.copy_(self.best)  # not by the step, which may run more than once before it is captured
        if self._follows:
            self.positions[:count].add_(1)
            self.numbers[4, :count].copy_(self._in_place[:count])
            self._follows = False
            return
        written = self._handed[-1].written
        written[1, :count], written[2, :count] = self._lengths[:count], self._sources[:count]
        written[1:3, count:] = 0
        self._handed[-1].begin(self._given)

    def take_tokens(self, count: int) -> None:
        """What a step of the first rows does first: find their tokens."""
        torch.index_select(self.numbers.view(-1), 0, self.numbers[4, :count], out=self.tokens[:count, 0])

    def fetch(self, made: torch.Tensor) -> FetchedTokens:
        """See `RowBuffers.fetch`. The tokens of `STEPS_AHEAD` steps can be under way, and of those that are started and read at once."""
        self._fetched.rotate(-1)
        self._fetched[-1].begin(made)
        return self._fetched[-1]

    def step(self, count: int, kernels: DecodeKernels, weights: StepWeights, embedding_scale: float) -> DecodeStep:
        """The step over the first `count` rows. All such steps share what kernels hand on, as none runs beside another."""
        _, _, positions, lengths, _ = self.numbers
        inputs = StepInputs(
            self.tokens[:count, 0], positions, self.kv, self.cross, self.cross_bias[:, 0, 0], lengths, 1, self.logits
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
        torch.bitwise_not(ranks.view(torch.int32)[::2], out=self.best[: len(ranks)])  # the lower half
        ranks.zero_()

    def _forget_addresses(self) -> None:
        """See `RowBuffers`; a step under way still uses them."""
        if self.numbers.is_cuda:
            torch.cuda.current_stream(self.numbers.device).synchronize()
        super()._forget_addresses()
