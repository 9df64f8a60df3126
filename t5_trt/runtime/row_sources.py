"""Encoded sources of rows to come. On a GPU they are encoded in a stream of their own, beside the steps of rows.

How data flows; the host waits for none of it:

    host     ids and masks, packed or padded -> page-locked memory -> one copy in the encoder's stream
    encoder  a CUDA graph, or its kernels one by one -> results in memory of the encoder's stream -> an event
    steps    rows run on until the event has passed; their stream waits for it where no row runs, then copies sources into rows

Our own kernels take sources of unlike lengths one behind another (`t5_trt.runtime.packed_sources`); torch's operations, TensorRT's engines
and ONNX Runtime take a batch, padded to its longest source. An encoder's buffers and graphs belong to whichever stream used them last: `StreamOrder` lets the next one wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from t5_trt.engine.profiles import power_of_two
from t5_trt.runtime.captured_encoder import CAPTURED_TOKENS
from t5_trt.runtime.session import Session

SMALLEST_SOURCE = 16
#: ids and mask of a source, int64 [s] each
Source = tuple[np.ndarray, np.ndarray]
#: (sources, tokens of the longest) -> rows and tokens that are encoded, padding counted
BatchSize = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class RowSources:
    """What rows read of sources that were encoded together.

    Attributes:
        cross: [L, 2, B, H, S, D].
        bias: [B, S].
        places: of each source, where it lies in both: its place along B, its first token, its length.
        event: behind the work that makes them; None where it is done.
    """

    cross: torch.Tensor
    bias: torch.Tensor
    places: Sequence[tuple[int, int, int]]
    event: Any = None

    @property
    def done(self) -> bool:
        """Whether they are there; this does not wait."""
        return self.event is None or bool(self.event.query())

    def follow(self) -> None:
        """Have the current stream wait for them, and keep their memory until what it is given up to their deletion is done."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.cross.device)
            stream.wait_event(self.event)
            for tensor in (self.cross, self.bias):
                tensor.record_stream(stream)

    def split(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each source, views: K/V [L, 2, H, s, D] and bias [s]."""
        return [
            (self.cross[:, :, row, :, begin : begin + length], self.bias[row, begin : begin + length])
            for row, begin, length in self.places
        ]


class EncoderStream:
    """The stream of one model's encoder beside its steps; nothing on a CPU.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream, made at the first use."""
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return self._stream

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it the thread's current stream."""
        with torch.cuda.stream(self.stream):
            yield

    def host_memory(self, count: int) -> torch.Tensor:
        """Zeros in memory that `upload` copies from at once, int64."""
        return torch.zeros(count, dtype=torch.int64, pin_memory=self._device.type == "cuda")

    def upload(self, given: torch.Tensor) -> torch.Tensor:
        """A copy on the device of `host_memory`, which does not wait for it."""
        return given.to(self._device, non_blocking=True)

    def sources(self, cross: torch.Tensor, bias: torch.Tensor, places: Sequence[tuple[int, int, int]]) -> RowSources:
        """What the stream's latest work makes; see `RowSources`."""
        event: Any = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return RowSources(cross, bias, places, event)


def encode_in_turn(session: Session, sources: Sequence[Source], size: BatchSize) -> RowSources:
    """`t5_trt.runtime.row_buffers.RowSession.encode_rows` of a session that encodes batches, and steps and encoders in one order."""
    rows, tokens = padded_size(sources, size)
    given = torch.zeros((2, rows, tokens), dtype=torch.int64)
    places = pad(sources, given)
    ids, mask = given.to(session.device)
    _, cross = session.encode(ids, None, mask, 1)
    return RowSources(cross.kv, session.cross_bias(mask, cross)[:, 0, 0], places)


def padded_size(sources: Sequence[Source], size: BatchSize) -> tuple[int, int]:
    """Rows and tokens of a batch of sources; it is as small as can be where more would not be captured."""
    needed = len(sources), max(len(ids) for ids, _ in sources)
    rows, tokens = size(*needed)
    return (rows, tokens) if rows * tokens <= CAPTURED_TOKENS else needed


def pad(sources: Sequence[Source], batch: torch.Tensor) -> list[tuple[int, int, int]]:
    """Write ids and masks of sources into a batch of zeros, int64 [2, B, S]; return their places, see `RowSources`."""
    written = batch.numpy()
    for row, (ids, mask) in enumerate(sources):
        written[0, row, : len(ids)], written[1, row, : len(ids)] = ids, mask
    return [(row, 0, len(ids)) for row, (ids, _) in enumerate(sources)]


def own_size(rows: int, tokens: int) -> tuple[int, int]:
    """The size of a batch without padding of its own."""
    return rows, tokens


def common_size(rows: int, tokens: int) -> tuple[int, int]:
    """The next size of those that many batches have: rows are powers of two, tokens are those and one and a half times those."""
    room = power_of_two(tokens, SMALLEST_SOURCE)
    if tokens <= room // 4 * 3 and room >= 4 * SMALLEST_SOURCE:  # smaller steps are none of a captured encoder's
        room = room // 4 * 3
    return power_of_two(rows, 1), room
