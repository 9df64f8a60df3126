"""Encoded sources of rows to come. On a GPU they are encoded in a stream of their own, beside the steps of rows.

How data flows; the host waits for none of it:

    host     ids and masks -> page-locked memory -> one copy in the encoder's stream
    encoder  a CUDA graph, or its kernels one by one -> results in memory of the encoder's stream -> an event
    steps    rows run on until the event has passed; their stream waits for it where no row runs, then copies sources into rows

An encoder's buffers and graphs belong to whichever stream used them last: `StreamOrder` lets the next one wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.runtime.session import Session


@dataclass(frozen=True)
class RowSources:
    """What rows read of sources that were encoded together.

    Attributes:
        cross: [L, 2, B, H, S, D].
        bias: [B, S].
        event: behind the work that makes them; None where it is done.
    """

    cross: torch.Tensor
    bias: torch.Tensor
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

    def upload(self, given: torch.Tensor) -> torch.Tensor:
        """A copy on the device of a tensor of the host, which does not wait for it."""
        return given if self._device.type == "cpu" else given.pin_memory().to(self._device, non_blocking=True)

    def sources(self, cross: torch.Tensor, bias: torch.Tensor) -> RowSources:
        """What the stream's latest work makes; see `RowSources`."""
        event: Any = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return RowSources(cross, bias, event)


def encode_in_turn(session: Session, ids_and_mask: torch.Tensor) -> RowSources:
    """`t5_trt.runtime.row_buffers.RowSession.encode_rows` of a session that encodes and steps in one order."""
    ids, mask = ids_and_mask.to(session.device)
    _, cross = session.encode(ids, None, mask, 1)
    return RowSources(cross.kv, session.cross_bias(mask, cross)[:, 0, 0])
