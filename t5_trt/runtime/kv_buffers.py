"""The memory of one decoding request: cross-attention K/V and the static self-attention cache, each with one owner.

Only torch is used here; which engine reads the buffers is the session's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from t5_trt.engine.profiles import power_of_two
from t5_trt.errors import InputError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.signature import layered

SMALLEST_BUCKET = 64
#: so many entries are moved by NumPy: torch's threads, once woken up, spin for a while and take the processor from ONNX Runtime's
_SMALL_COPY = 1 << 20
#: beams that `DecoderState.ancestors` can number
_MOST_BEAMS = 256
#: bytes
_CACHE_LINE = 64


def bucket_length(tokens: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The allocated cache length for a number of tokens, see `t5_trt.engine.profiles.power_of_two`."""
    return power_of_two(tokens, smallest)


def layer_views(prefix: str, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The K and V slices of a [L, 2, ...] buffer under the names of `t5_trt.graph.signature.layered`."""
    pairs = (buffer[layer, kind] for layer in range(len(buffer)) for kind in (0, 1))
    return dict(zip(layered(prefix, len(buffer)), pairs, strict=True))


@dataclass
class CrossStates:
    """Cross-attention K and V of every decoder layer for one batch of sources.

    Attributes:
        kv: [L, 2, B, H, S, D], K at index 0 and V at index 1 of the second axis.
        beams: N, the decoder rows that share each batch entry; rows of one entry are neighbours.
        used: (B, S) of the request where the buffer is padded to an engine's shapes; None if it is not.
    """

    kv: torch.Tensor
    beams: int = 1
    used: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.used[0] if self.used else int(self.kv.shape[2])

    @property
    def rows(self) -> int:
        """R = B * N."""
        return self.batch * self.beams

    @property
    def source_length(self) -> int:
        """S."""
        return self.used[1] if self.used else int(self.kv.shape[4])

    def open_mask(self) -> torch.Tensor:
        """An attention mask that hides no source token: ones, int64 [B, S]."""
        return torch.ones((self.batch, self.source_length), dtype=torch.int64, device=self.kv.device)

    def for_beams(self, beams: int) -> CrossStates:
        """The same memory for `beams` times as many decoder rows."""
        return CrossStates(self.kv, self.beams * beams, self.used)

    def select(self, rows: torch.Tensor) -> CrossStates:
        """A copy in which decoder row i reads what row ``rows[i]`` read before."""
        return CrossStates(self.kv.index_select(2, rows // self.beams), used=(len(rows), self.source_length))


class Binding(Protocol):
    """What a session keeps for one `DecoderState`: bound addresses, or the buffers themselves."""

    def of(self, owner: object) -> bool:
        """Whether it is this session's; a state may outlive the session that it was made by."""
        ...


@dataclass
class DecoderState:
    """The self-attention cache of R decoder rows, and the other inputs of their next step.

    Attributes:
        kv: [L, 2, R, H, T, D]; entries from `length` on are undefined. The buffer may have more rows than the request: padding
            rows come last.
        new: [L, 2, R, H, 1, D], where the one-token step leaves its K and V.
        length: tokens in the cache.
        cross: the sources' K and V.
        cross_bias: [B, 1, 1, S], 0 or the mask value.
        smallest_bucket: the least T that is allocated.
        ancestors: uint8 [R, T + 1], where a session's beams have moved in it and not in `kv`: token t of row i lies in row
            ``ancestors[i, t]`` of i's batch entry, and tokens from `length` on will lie in row i. None where every row has its
            own; see `materialize` and `use_ancestors`.
        binding: what a session keeps for these buffers; reset to None when an address or a shape changes.
    """

    kv: torch.Tensor
    new: torch.Tensor
    cross: CrossStates
    cross_bias: torch.Tensor
    length: int = 0
    smallest_bucket: int = SMALLEST_BUCKET
    binding: Binding | None = None
    ancestors: torch.Tensor | None = None
    _scratch: torch.Tensor | None = None
    _makers: np.ndarray[Any, np.dtype[np.int64]] | None = (
        None  # [R, T]: the row that made each entry, for `reorder` on a CPU
    )

    @classmethod
    def allocate(
        cls, arch: Architecture, cross: CrossStates, cross_bias: torch.Tensor, capacity_tokens: int
    ) -> DecoderState:
        """A new, empty cache with room for `capacity_tokens` (rounded up to a bucket)."""
        shape = (arch.decoder_layers, 2, cross.kv.shape[2] * cross.beams, arch.num_heads)
        # zeros: masked entries are multiplied by probability 0, and 0 * NaN would be NaN
        kv = _zeros(cross.kv, (*shape, bucket_length(capacity_tokens), arch.d_kv))
        return cls(kv, cross.kv.new_zeros((*shape, 1, arch.d_kv)), cross, cross_bias)

    @property
    def rows(self) -> int:
        """R, without padding."""
        return self.cross.rows

    @property
    def capacity(self) -> int:
        """T, the tokens that fit without growing."""
        return int(self.kv.shape[4])

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; the contents are kept, the buffer doubles as often as needed."""
        if self.length + tokens <= self.capacity:
            return
        capacity = bucket_length(self.length + tokens, self.smallest_bucket)
        grown = _zeros(self.kv, (*self.kv.shape[:4], capacity, self.kv.shape[5]))
        grown[..., : self.length, :] = self.kv[..., : self.length, :]
        self.kv, self._scratch, self._makers, self.binding = grown, None, None, None
        if self.ancestors is not None:
            moved = self.ancestors[:, : self.length]
            self.ancestors = self._own_ancestors()
            self.ancestors[:, : self.length] = moved

    def materialize(self) -> None:
        """Copy every token's K and V into its own row; call this before reading `kv` without `ancestors`."""
        if self.ancestors is None:
            return
        beams, length = self.cross.beams, self.length
        first = torch.arange(self.rows, device=self.kv.device) // beams * beams
        rows = first[:, None] + self.ancestors[: self.rows, :length]
        tokens = torch.arange(length, device=self.kv.device)
        for layer in self.kv:
            ordered = layer.permute(1, 3, 0, 2, 4)[rows, tokens]  # [R, length, 2, H, D]
            layer[:, : self.rows, :, :length].copy_(ordered.permute(2, 0, 3, 1, 4))
        own_beams(self.ancestors, beams)
        self.ancestors = self._makers = None

    def use_ancestors(self) -> None:
        """Let `reorder` on a CPU move `ancestors` in place of K and V; for a session whose next step reads them.

        It does nothing if they are in use, and where they cannot be: rows without beams, or beams that a byte cannot number. They
        are in use until `materialize`, so a session calls this before each step.
        """
        if self.ancestors is None and 1 < self.cross.beams <= _MOST_BEAMS:
            self.ancestors = self._own_ancestors()

    def _own_ancestors(self) -> torch.Tensor:
        ancestors = torch.empty((self.kv.shape[2], self.capacity + 1), dtype=torch.uint8, device=self.kv.device)
        own_beams(ancestors, self.cross.beams)
        return ancestors

    def append(self, new: torch.Tensor) -> None:
        """Append K/V of Q new tokens, [L, 2, R, H, Q, D]; room must be reserved."""
        count = new.shape[4]
        self.kv[:, :, : new.shape[2]].narrow(4, self.length, count).copy_(new)
        self.length += count

    def crop(self, length: int) -> None:
        """Drop all tokens from `length` on.

        Raises:
            InputError: `length` is negative or larger than what the cache holds.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"cannot crop a cache of {self.length} tokens to {length}; expected 0 to {self.length}.")
        self.length, self._makers = length, None
        if self.ancestors is not None:
            own_beams(self.ancestors[:, length:], self.cross.beams)

    def reorder(self, rows: torch.Tensor) -> None:
        """Reorder rows: row i continues row ``rows[i]``, as beam search needs after every token.

        Args:
            rows: int64 [R] on the buffer's device.
        """
        if self._reorder_ancestors(rows):
            return
        self.materialize()
        rows = rows.to(self.kv.device)
        parents = torch.arange(self.rows, device=rows.device) // self.cross.beams
        if not torch.equal(rows // self.cross.beams, parents):  # rows change their source: give each its own
            self._rearrange(rows)
            return
        start = 0
        if self.kv.device.type == "cpu":
            start = self._common_tokens(rows.numpy())
            recent = self.kv[:, :, : self.rows, :, start : self.length].numpy()
            if recent.size <= _SMALL_COPY:
                recent[:] = recent[:, :, rows.numpy()]
                return
        padding = torch.arange(len(rows), self.kv.shape[2], device=rows.device)
        rows = torch.cat((rows, padding))
        if self._scratch is None:
            self._scratch = self.kv.new_empty(self.kv[0].numel())
        # one layer's scratch memory serves all layers: it stays in the CPU cache and is not reallocated
        for layer in self.kv:
            filled = layer[..., start : self.length, :]
            moved = self._scratch[: filled.numel()].view(filled.shape)
            torch.index_select(filled, 1, rows, out=moved)
            filled.copy_(moved)

    def _reorder_ancestors(self, rows: torch.Tensor) -> bool:
        """Reorder `ancestors` alone; False if they are not in use on a CPU, or if a row changes its source."""
        if self.ancestors is None or self.kv.device.type != "cpu":
            return False
        parents, beams = rows.numpy(), self.cross.beams
        if (parents // beams != np.arange(len(parents)) // beams).any():
            return False
        moved = self.ancestors.numpy()[: len(parents), : self.length]
        moved[:] = moved[parents]
        return True

    def _common_tokens(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        """How many tokens of the cache are where they belong already, when row i becomes row ``rows[i]``; takes note of the change.

        Beams of one source soon have a common past: what they share was computed by one row and copied to all of them.
        """
        if self._makers is None:
            self._makers = np.repeat(np.arange(len(rows))[:, None], self.capacity, axis=1)
        makers = self._makers[:, : self.length]
        moved = makers[rows]
        differs = (moved != makers).any(0)
        makers[:] = moved
        return int(differs.argmax()) if differs.any() else self.length

    def select(self, rows: torch.Tensor) -> DecoderState:
        """A copy whose row i is row ``rows[i]`` of this state; the number of rows may change."""
        self.materialize()
        rows = rows.to(self.kv.device)
        kv = self.kv.index_select(2, rows)
        bias = self.cross_bias.index_select(0, rows // self.cross.beams)
        new = self.new.index_select(2, rows)
        return DecoderState(kv, new, self.cross.select(rows), bias, self.length, self.smallest_bucket)

    def select_entries(self, entries: torch.Tensor) -> DecoderState:
        """A copy with some of the batch entries, in the order of `entries`, each with all of its beams."""
        beams = self.cross.beams
        rows = (entries[:, None] * beams + torch.arange(beams, device=entries.device)).flatten()
        used = (len(entries), self.cross.source_length)
        cross = CrossStates(self.cross.kv.index_select(2, entries), beams, used)
        kv, new = self.kv.index_select(2, rows), self.new.index_select(2, rows)
        bias = self.cross_bias.index_select(0, entries)
        ancestors = None if self.ancestors is None else self.ancestors.index_select(0, rows)
        return DecoderState(kv, new, cross, bias, self.length, self.smallest_bucket, ancestors=ancestors)

    def hide_keys(self, cross_bias: torch.Tensor) -> None:
        """Replace the cross bias; in place if the shape allows it, so that the binding stays valid."""
        if cross_bias.shape == self.cross_bias.shape:
            self.cross_bias.copy_(cross_bias)
        else:
            self.cross_bias = cross_bias
            self.binding = None

    def separate_sources(self) -> None:
        """Give every row its own copy of its source's K/V, so that rows of one source may have different masks."""
        self._rearrange(torch.arange(self.rows, device=self.kv.device))

    def _rearrange(self, rows: torch.Tensor) -> None:
        """Become the copy that `select` makes: every row has its own source."""
        own = self.select(rows)
        self.kv, self.new, self.cross, self.cross_bias = own.kv, own.new, own.cross, own.cross_bias
        self.ancestors = self._scratch = self._makers = None
        self.binding = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderState:
        """An independent copy, without the binding to this object's memory."""
        return self.select(torch.arange(self.rows, device=self.kv.device))


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of a tensor's type and device.

    On a CPU in memory of NumPy, which asks for huge pages and does not write to them: 37 MB and a copy into half of them take 2 ms
    instead of 13.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return like.new_zeros(shape)
    count = math.prod(shape)
    memory = np.zeros(count + _CACHE_LINE // 4, np.float32)
    first = -memory.ctypes.data % _CACHE_LINE // 4
    return torch.from_numpy(memory[first : first + count].reshape(shape))


def own_beams(ancestors: torch.Tensor, beams: int) -> None:
    """Make every row of `DecoderState.ancestors` its own ancestor."""
    ancestors.copy_((torch.arange(len(ancestors), device=ancestors.device) % beams)[:, None])


def move_ancestors(ancestors: torch.Tensor, parents: torch.Tensor, position: torch.Tensor, beams: int) -> None:
    """Reorder ancestors: row i continues row ``parents[i]`` up to a position, then its own next token.

    Args:
        ancestors: uint8 [R, T + 1].
        parents: int64 [r], of the first r rows; each names a row of its own batch entry.
        position: int64 [1].
        beams: N.
    """
    moved = ancestors[: len(parents)]
    moved.copy_(moved.index_select(0, parents))
    own = torch.arange(len(parents), device=ancestors.device) % beams
    moved.index_copy_(1, position + 1, own[:, None].to(ancestors.dtype))
