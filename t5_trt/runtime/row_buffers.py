"""The memory of rows that decode side by side, each at a position of its own over a source of its own.

Rows in use are the first ones: a step runs over a prefix of every buffer. Only torch is used here; a session computes on the buffers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.runtime.kv_buffers import SMALLEST_BUCKET, bucket_length
from t5_trt.runtime.row_sources import SMALLEST_SOURCE, BatchSize, RowSources, Source
from t5_trt.runtime.session import Session

#: steps after which room is given up: a long request mostly comes after a long one, and to move all rows takes as long as several steps
KEPT_STEPS = 32


class RowBuffers:
    """Caches, sources and positions of up to R rows.

    Args:
        arch: of the model.
        rows: R.
        dtype: of keys and values.
        bias_dtype: of the cross bias.
        hidden: value of the cross bias that hides a source token.
        device: of all buffers.

    Attributes:
        count: rows in use, the first ones.
        kv: [L, 2, R, H, T, D]; a row's entries from its position on are zero.
        new: [L, 2, R, H, 1, D], where a step leaves its K and V.
        cross: [L, 2, R, H, S, D], zero behind a row's source.
        cross_bias: [R, 1, 1, S], 0 or `hidden`.
        tokens: int64 [R, 1], the next step's input.
        positions: int64 [R], tokens in each row's cache.
        bindings: what a session keeps for these buffers, by count; dropped when an address or a shape changes.
    """

    #: the smallest room for a row's own tokens, and for a source's
    smallest = (SMALLEST_BUCKET, SMALLEST_SOURCE)
    #: room is given up once so many times less has done for `KEPT_STEPS`
    slack = 1
    #: a step reads all of the caches, and multiplies what is behind a row's own by 0
    reads_empty_places = True
    #: the next step can decode tokens that the last one chose before the host has seen them
    remembers_tokens = False

    def __init__(
        self,
        arch: Architecture,
        rows: int,
        *,
        dtype: torch.dtype,
        bias_dtype: torch.dtype,
        hidden: float,
        device: torch.device,
    ) -> None:
        self.rows, self.count, self.hidden = rows, 0, hidden
        outer = (arch.decoder_layers, 2, rows, arch.num_heads)
        room, source = self.smallest
        self.kv = torch.zeros((*outer, room, arch.d_kv), dtype=dtype, device=device)
        self.new = torch.zeros((*outer, 1, arch.d_kv), dtype=dtype, device=device)
        self.cross = torch.zeros((*outer, source, arch.d_kv), dtype=dtype, device=device)
        self.cross_bias = torch.full((rows, 1, 1, source), hidden, dtype=bias_dtype, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bindings: dict[Hashable, object] = {}
        self._too_much = 0  # steps that had more room than they needed
        # positions, on the host; on a CPU the same memory
        self._lengths: Any = self.positions.numpy() if device.type == "cpu" else np.zeros(rows, np.int32)
        self._sources = np.zeros(rows, np.int32)
        heads = np.arange(arch.decoder_layers * 2 * rows * arch.num_heads)
        self._heads = heads.reshape(-1, rows, arch.num_heads)  # place of each head's first token, in units of T tokens

    @property
    def capacity(self) -> int:
        """T."""
        return int(self.kv.shape[4])

    @property
    def source_capacity(self) -> int:
        """S."""
        return int(self.cross.shape[4])

    def position(self, row: int) -> int:
        """Tokens in a row's cache."""
        return int(self._lengths[row])

    def add(self, cross: torch.Tensor, cross_bias: torch.Tensor, row: int | None = None) -> int:
        """Take a row for a source; its cache is empty.

        Args:
            cross: [L, 2, H, s, D].
            cross_bias: [s].
            row: in use, for a source that is over; None takes a free one.

        Returns:
            The row; a free one is `count` - 1 afterwards.
        """
        length = cross.shape[3]
        if row is None:
            row = self.count
            self.count += 1
        else:
            self._clear(row)
        self._sources[row], self._lengths[row] = length, 0
        self._fit_sources()
        _write(self.cross[:, :, row, :, :length], cross)
        _write(self.cross_bias[row, ..., :length], cross_bias)
        if self.reads_empty_places:
            _write(self.cross[:, :, row, :, length:], 0)
            _write(self.cross_bias[row, ..., length:], self.hidden)
        return row

    def remove(self, row: int) -> int:
        """Free a row; the last one takes its place.

        Returns:
            The row that moved, which is `row` if none did.
        """
        last = self.count - 1
        self._clear(row)
        if row != last:
            self._move(last, row)
        self.count = last
        return last

    def _clear(self, row: int) -> None:
        """Remove what a row has written."""
        if self.reads_empty_places:  # 0 * NaN would be NaN in another request
            _write(self.kv[:, :, row, :, : self.position(row)], 0)

    def _move(self, last: int, row: int) -> None:
        """Let a free row take over what the last one holds."""
        length, source = self.position(last), int(self._sources[last])
        _write(self.kv[:, :, row, :, :length], self.kv[:, :, last, :, :length])
        if self.reads_empty_places:
            _write(self.kv[:, :, last, :, :length], 0)
            source = self.source_capacity
            _write(self.tokens[row], self.tokens[last])
        _write(self.cross[:, :, row, :, :source], self.cross[:, :, last, :, :source])
        _write(self.cross_bias[row, ..., :source], self.cross_bias[last, ..., :source])
        self._lengths[row], self._sources[row] = length, self._sources[last]

    def feed(self, tokens: Sequence[int], places: Sequence[int] | None = None) -> None:
        """Set the tokens that the next step of the rows in use decodes.

        Args:
            tokens: one for each row.
            places: with `remembers_tokens`, for each row where it was when the last step chose its token, which then counts; or -1.
        """
        assert places is None
        self.tokens.numpy()[: self.count, 0] = tokens

    def follow(self) -> None:
        """Have the next step of the same rows decode what the last one chose; with `remembers_tokens` only."""
        raise RuntimeError("these rows do not remember what a step chose; expected their tokens by `feed`.")

    def remember(self, made: torch.Tensor) -> None:
        """Have the next step find these tokens of the last one, [count], in place of the best ones; where `remembers_tokens`."""

    def fetch(self, made: torch.Tensor) -> SupportsToList:
        """Bring tokens [count] of a step to the host; with `remembers_tokens` this does not wait for them."""
        return made

    def fit(self, more: int = 1) -> None:
        """Make room for more tokens of the longest row in use; give up room that no row has needed for some steps."""
        tokens = bucket_length(int(self._lengths[: self.count].max(initial=0)) + more, self.smallest[0])
        too_much = tokens * self.slack < self.capacity or self._source_room() * self.slack < self.source_capacity
        self._too_much = self._too_much + 1 if too_much else 0
        gives_up = self._too_much > KEPT_STEPS
        if tokens > self.capacity or (gives_up and tokens * self.slack < self.capacity):
            kv = self.kv.new_zeros((*self.kv.shape[:4], tokens, self.kv.shape[5]))
            kept = min(tokens, self.capacity)
            kv[:, :, : self.count, :, :kept] = self.kv[:, :, : self.count, :, :kept]
            self._forget_addresses()
            self.kv = kv
        if gives_up:
            self._fit_sources(gives_up=True)
            self._too_much = 0

    def release(self) -> None:
        """Give the memory back, whoever still holds these buffers; they cannot be used any more."""
        self.bindings.clear()
        self.kv = self.new = self.cross = self.cross_bias = self.kv.new_empty(0)

    def append(self) -> None:
        """Write `new` of the rows in use behind what is in their caches; on a CPU, see `_write`."""
        count, width = self.count, self.kv.shape[5]
        places = self._heads[:, :count] * self.capacity + self._lengths[:count, None]
        self.kv.numpy().reshape(-1, width)[places] = self.new.numpy()[:, :, :count, :, 0].reshape(*places.shape, width)
        self.advance()

    def advance(self) -> None:
        """Count one more token for the rows in use, whose K and V are in their places."""
        self._lengths[: self.count] += 1

    def _source_room(self) -> int:
        """Tokens of a source that the rows in use need."""
        return bucket_length(int(self._sources[: self.count].max(initial=0)), self.smallest[1])

    def _fit_sources(self, *, gives_up: bool = False) -> None:
        source = self._source_room()
        if source <= self.source_capacity and not (gives_up and source * self.slack < self.source_capacity):
            return
        kept, used = min(source, self.source_capacity), slice(self.count)
        cross = self.cross.new_zeros((*self.cross.shape[:4], source, self.cross.shape[5]))
        cross[:, :, used, :, :kept] = self.cross[:, :, used, :, :kept]
        bias = self.cross_bias.new_full((self.rows, 1, 1, source), self.hidden)
        bias[used, ..., :kept] = self.cross_bias[used, ..., :kept]
        self._forget_addresses()
        self.cross, self.cross_bias = cross, bias

    def _forget_addresses(self) -> None:
        """Drop what a session keeps: addresses change."""
        self.bindings.clear()


def _write(target: torch.Tensor, value: torch.Tensor | float) -> None:
    """Write a part of a buffer, on a CPU in this thread alone: torch's other threads would wait for those of ONNX Runtime, which spin after a step."""
    if target.device.type == "cpu" and target.dtype in (torch.float32, torch.int64):
        target.numpy()[...] = value.numpy() if isinstance(value, torch.Tensor) else value
    elif isinstance(value, torch.Tensor) and target.dim() == 5 and target.dtype == value.dtype:
        _in_words(target).copy_(_in_words(value))
    else:
        target[...] = value


def _in_words(kv: torch.Tensor) -> torch.Tensor:
    """K/V [..., D] as words of 8 bytes, if they are whole: a GPU copies strided memory element by element, and four at a time in less time."""
    return kv.view(torch.int64) if kv.shape[-1] * kv.element_size() % 8 == 0 else kv


class SupportsToList(Protocol):
    """Tokens for the host."""

    def tolist(self) -> list[int]:
        """One for each row, as soon as they are there."""
        ...


@runtime_checkable
class RowSession(Session, Protocol):
    """A session that decodes rows at positions of their own; see `t5_trt.runtime.session.Session` for the rest.

    Attributes:
        batch_size: of sources that are encoded together; None: they are packed, without padding, whatever their lengths.
    """

    @property
    def batch_size(self) -> BatchSize | None: ...  # noqa: D102 - see above

    def rows_refusal(self) -> str | None:
        """Why it cannot, with what to do, or None: what it decodes with may have one position for all rows."""
        ...

    def row_buffers(self, rows: int) -> RowBuffers:
        """New buffers for up to so many rows; where kernels are to be compiled for them, this waits for it."""
        ...

    def encode_rows(self, sources: Sequence[Source]) -> RowSources:
        """Encode sources for rows. On a GPU this returns before it is done, and may run beside steps."""
        ...

    def step_rows(self, rows: RowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """Decode one token of each row in use, and write its K and V into the row's cache. On a GPU this returns before it is done.

        Args:
            rows: with the tokens to decode (`RowBuffers.feed` or `follow`), and room for them (`RowBuffers.fit`).
            best_only: give tokens in place of logits.

        Returns:
            Logits, float32 [count, V], or the tokens of the largest ones, integers [count]; good until the next step.
        """
        ...
