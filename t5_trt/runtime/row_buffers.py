"""The memory of rows that decode side by side, each at a position of its own over a source of its own.

Rows in use are the first ones: a step runs over a prefix of every buffer. Only torch is used here; a session computes on the buffers.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.runtime.kv_buffers import bucket_length
from t5_trt.runtime.session import Session

SMALLEST_SOURCE = 16


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
        self.kv = torch.zeros((*outer, bucket_length(1), arch.d_kv), dtype=dtype, device=device)
        self.new = torch.zeros((*outer, 1, arch.d_kv), dtype=dtype, device=device)
        self.cross = torch.zeros((*outer, SMALLEST_SOURCE, arch.d_kv), dtype=dtype, device=device)
        self.cross_bias = torch.full((rows, 1, 1, SMALLEST_SOURCE), hidden, dtype=bias_dtype, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bindings: dict[int, object] = {}
        self._lengths = [0] * rows  # positions, on the host
        self._sources = [0] * rows
        heads = torch.arange(arch.decoder_layers * 2 * rows * arch.num_heads, device=device)
        self._heads = heads.view(-1, rows, arch.num_heads)  # place of each head's first token, in units of T tokens

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
        return self._lengths[row]

    def add(self, cross: torch.Tensor, cross_bias: torch.Tensor) -> int:
        """Take a free row for a source; its cache is empty.

        Args:
            cross: [L, 2, H, s, D].
            cross_bias: [s].

        Returns:
            The row, which is `count` - 1 afterwards.
        """
        row, length = self.count, cross.shape[3]
        self.count += 1
        self._sources[row], self._lengths[row] = length, 0
        self._fit_sources()
        self.cross[:, :, row, :, :length] = cross
        self.cross[:, :, row, :, length:] = 0
        self.cross_bias[row, ..., :length] = cross_bias
        self.cross_bias[row, ..., length:] = self.hidden
        self.positions[row] = 0
        return row

    def remove(self, row: int) -> int:
        """Free a row; the last one takes its place.

        Returns:
            The row that moved, which is `row` if none did.
        """
        last = self.count - 1
        # stale entries are multiplied by probability 0, and 0 * NaN would be NaN in another request
        self.kv[:, :, row, :, : self._lengths[row]] = 0
        if row != last:
            length = self._lengths[last]
            self.kv[:, :, row, :, :length] = self.kv[:, :, last, :, :length]
            self.kv[:, :, last, :, :length] = 0
            self.cross[:, :, row] = self.cross[:, :, last]
            for buffer in (self.cross_bias, self.tokens, self.positions):
                buffer[row] = buffer[last]
            self._lengths[row], self._sources[row] = length, self._sources[last]
        self.count = last
        return last

    def fit(self) -> None:
        """Make room for one more token of the longest row in use; give up room that no row needs."""
        tokens = bucket_length(max(self._lengths[: self.count], default=0) + 1)
        if tokens != self.capacity:
            kv = self.kv.new_zeros((*self.kv.shape[:4], tokens, self.kv.shape[5]))
            kept = min(tokens, self.capacity)
            kv[:, :, : self.count, :, :kept] = self.kv[:, :, : self.count, :, :kept]
            self.kv = kv
            self.bindings.clear()
        self._fit_sources()

    def append(self) -> None:
        """Write `new` of the rows in use behind what is in their caches."""
        count, width = self.count, self.kv.shape[5]
        places = self._heads[:, :count] * self.capacity + self.positions[:count, None]
        self.kv.view(-1, width).index_copy_(0, places.flatten(), self.new[:, :, :count].reshape(-1, width))
        self.advance()

    def advance(self) -> None:
        """Count one more token for the rows in use, whose K and V are in their places."""
        self.positions[: self.count] += 1
        for row in range(self.count):
            self._lengths[row] += 1

    def _fit_sources(self) -> None:
        source = bucket_length(max(self._sources[: self.count], default=0), SMALLEST_SOURCE)
        if source == self.source_capacity:
            return
        kept, used = min(source, self.source_capacity), slice(self.count)
        cross = self.cross.new_zeros((*self.cross.shape[:4], source, self.cross.shape[5]))
        cross[:, :, used, :, :kept] = self.cross[:, :, used, :, :kept]
        bias = self.cross_bias.new_full((self.rows, 1, 1, source), self.hidden)
        bias[used, ..., :kept] = self.cross_bias[used, ..., :kept]
        self.cross, self.cross_bias = cross, bias
        self.bindings.clear()


@runtime_checkable
class RowSession(Session, Protocol):
    """A session that decodes rows at positions of their own; see `t5_trt.runtime.session.Session` for the rest."""

    def row_buffers(self, rows: int) -> RowBuffers:
        """New buffers for up to so many rows."""
        ...

    def step_rows(self, rows: RowBuffers) -> torch.Tensor:
        """Decode one token of each row in use, and write its K and V into the row's cache.

        Args:
            rows: with the `tokens` to decode, and room for them (`RowBuffers.fit`).

        Returns:
            Logits, float32 [count, V], good until the next step.
        """
        ...
