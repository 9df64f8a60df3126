"""The decoder kernels' launches on a CPU: each does what its torch reference does, on the memory that it is given."""

from __future__ import annotations

from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels import reference
from t5_trt.kernels.decode_step import PRODUCTS, Geometry
from t5_trt.kernels.weights import unpack_matrix


class LaunchedKernels:
    """In place of `t5_trt.kernels.decode_step.DecodeKernels`, with the hazard of an early start.

    A kernel that starts early reads keys as they were before the kernel in front of it ran, but for its row's newest one. Products read
    the stream itself, and hand on what they make row by row.
    """

    geometry = {name: Geometry(1, 8, 0, 1) for name in PRODUCTS}
    sharers = 1

    def __init__(self, arch: Architecture) -> None:
        self._arch, self._inner = arch, arch.num_heads * arch.d_kv
        self._streams: dict[int, torch.Tensor] = {}  # by the address of their copy
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def launch(self, name: str, grid: tuple[int, ...], stream: int, *arguments: Any, early: bool = True) -> None:
        """See `DecodeKernels.launch`."""
        if name in ("attend_self", "attend_moved"):
            self.attend_self(grid[1], early, *arguments)
        elif name == "attend_cross":
            self.attend_cross(grid[1], *arguments)
        else:
            getattr(self, name)(*arguments)

    def embed(self, table: Any, tokens: Any, stream: Any, copy: Any, squares: Any, scales: Any, factor: float) -> None:
        stream[: len(tokens), : self._arch.d_model] = reference.embed(table.float(), tokens, factor)
        self._streams[copy.data_ptr()] = stream

    def project_qkv(self, weights: Any, copy: Any, squares: Any, scales: Any, other: Any, query: Any, keys: Any, values: Any, places: Any,
                    rows: int, room: int, epsilon: float) -> None:  # fmt: skip
        heads, width = self._arch.num_heads, self._arch.d_kv
        stack = torch.cat([self._unpacked(part, self._inner, self._arch.d_model) for part in weights.chunk(3)])
        query[:rows, : self._inner], *new = reference.project_qkv(stack, self._stream(copy, rows), epsilon)
        self._before = keys.clone(), values.clone()
        heads_of = torch.arange(rows * heads).view(rows, heads) * room + places[:rows, None]
        for cache, made in zip((keys, values), new, strict=True):
            cache.view(-1, width)[heads_of.flatten().long()] = made.reshape(-1, width).to(cache.dtype)

    def attend_self(self, rows: int, early: bool, query: Any, keys: Any, values: Any, bias: Any, position: Any, attended: Any, parts: Any,
                    arrived: Any, room: int, distances: int, ancestors: Any = None, beams: int = 1, stride: int = 0) -> None:  # fmt: skip
        holders = torch.arange(rows)[:, None].expand(rows, room)
        if ancestors is not None:
            holders = holders // beams * beams + ancestors[:rows, :room]
        read = [_gathered(part, holders) for part in (keys, values)]
        if early:
            assert self._before is not None
            old, own = [_gathered(part, holders) for part in self._before], torch.arange(rows)
            for new, part in zip(read, old, strict=True):
                part[own, :, position[:rows].long()] = new[own, :, position[:rows].long()]
            read = old
        attended[:rows, : self._inner] = reference.attend_self(self._heads(query, rows), *read, bias, position[:rows])

    def attend_cross(self, rows: int, query: Any, keys: Any, values: Any, mask: Any, lengths: Any, attended: Any, parts: Any, arrived: Any,
                     room: int, width: int, beams: int) -> None:  # fmt: skip
        given = self._heads(query, rows), keys.float(), values.float(), mask, lengths, beams
        attended[:rows, : self._inner] = reference.attend_cross(*given)

    def add_attention(
        self, weights: Any, attended: Any, stream: Any, copy: Any, squares: Any, scales: Any, rows: int, factor: float
    ) -> None:
        own, matrix = self._stream(copy, rows), self._unpacked(weights, self._arch.d_model, self._inner)
        own.copy_(reference.add_attention(matrix, attended[:rows, : self._inner].float(), own, factor))

    def project_query(
        self, weights: Any, copy: Any, squares: Any, scales: Any, other: Any, query: Any, rows: int, epsilon: float
    ) -> None:
        matrix = self._unpacked(weights, self._inner, self._arch.d_model)
        query[:rows, : self._inner] = reference.project_query(matrix, self._stream(copy, rows), epsilon)

    def feed_forward_in(
        self, weights: Any, copy: Any, squares: Any, scales: Any, other: Any, inner: Any, rows: int, epsilon: float
    ) -> None:
        arch = self._arch
        parts = weights.view(-1, 1 + arch.gated, *weights.shape[1:]).unbind(1)
        matrix = torch.cat([self._unpacked(part.contiguous(), arch.d_ff, arch.d_model) for part in parts])
        made = reference.feed_forward_in(matrix, self._stream(copy, rows), epsilon, arch.activation, gated=arch.gated)
        inner[:rows, : arch.d_ff] = made

    def feed_forward_out(
        self, weights: Any, inner: Any, stream: Any, copy: Any, squares: Any, scales: Any, rows: int, factor: float
    ) -> None:
        own, matrix = self._stream(copy, rows), self._unpacked(weights, self._arch.d_model, self._arch.d_ff)
        own.copy_(reference.feed_forward_out(matrix, inner[:rows, : self._arch.d_ff].float(), own, factor))

    def output_head(self, weights: Any, copy: Any, squares: Any, scales: Any, logits: Any, best: Any, hidden: Any, until: Any, position: Any,
                    rows: int, epsilon: float, scale: float) -> None:  # fmt: skip
        assert best is None and logits.is_contiguous()
        matrix = self._unpacked(weights, self._arch.vocab_size, self._arch.d_model)
        made = reference.output_head(matrix, self._stream(copy, rows), epsilon, scale)
        logits.view(-1, self._arch.vocab_size)[:rows] = made

    def _stream(self, copy: torch.Tensor, rows: int) -> torch.Tensor:
        return self._streams[copy.data_ptr()][:rows, : self._arch.d_model]

    def _heads(self, query: torch.Tensor, rows: int) -> torch.Tensor:
        return query[:rows, : self._inner].view(rows, self._arch.num_heads, self._arch.d_kv)

    @staticmethod
    def _unpacked(weights: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
        return unpack_matrix(weights, outputs, inputs).float()


def _gathered(cache: torch.Tensor, holders: torch.Tensor) -> torch.Tensor:
    """[rows, H, T, D] out of a cache [R, H, T, D], where `holders` [rows, T] name a row for each token."""
    return cache.transpose(1, 2)[holders, torch.arange(holders.shape[1])].transpose(1, 2).float()
