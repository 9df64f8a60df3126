"""What a decoder step reads and writes: weights in the kernels' order, intermediate results, and the memory of a request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from t5_trt.graph.architecture import Architecture


def tiles(size: int) -> int:
    """The number of tiles of 16 that cover a size."""
    return -(-size // 16)


def padded(size: int, *, int8: bool) -> int:
    """A size of products' inputs and outputs with the zeros behind it: whole k tiles (``K_TILE`` in ``common.cuh``)."""
    return tiles(size) * 16 if not int8 else -(-size // 32) * 32


@dataclass(frozen=True)
class LayerWeights:
    """Packed matrices of one decoder layer (`t5_trt.kernels.weights`), its bias table, and what undoes fp16 scaling.

    Attributes:
        qkv, self_out, query, cross_out, wi, wo: packed.
        bias: float32 [H, distances].
        self_scale, cross_scale, wo_scale: factors on the products that are added to the stream.
    """

    qkv: torch.Tensor
    self_out: torch.Tensor
    query: torch.Tensor
    cross_out: torch.Tensor
    wi: torch.Tensor
    wo: torch.Tensor
    bias: torch.Tensor
    self_scale: float = 1.0
    cross_scale: float = 1.0
    wo_scale: float = 1.0


@dataclass(frozen=True)
class StepWeights:
    """The weights of a step: embedding [V, E], layers, packed output matrix and the inverse of its fp16 factor.

    Packed matrices are all of the embedding's type, or all in 8 bits.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    head: torch.Tensor
    head_scale: float = 1.0

    @property
    def int8(self) -> bool:
        """Whether matrices are in 8 bits."""
        return self.head.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """GPU memory in bytes without the embedding, which the encoder shares."""
        fields = (field for layer in self.layers for field in vars(layer).values())
        return self.head.nbytes + sum(tensor.nbytes for tensor in fields if isinstance(tensor, torch.Tensor))


@dataclass
class StepBuffers:
    """Intermediate results between the kernels of a step, for R rows. Padding rows are always zero."""

    stream: torch.Tensor  # float32 [rows, E_PAD]
    copy: torch.Tensor  # the stream as products read it: [rows, E_PAD] in the weights' type
    squares: torch.Tensor  # float32 [rows, PARTIALS]
    scales: torch.Tensor  # float32 [2, rows], powers of two; kernels that norm change from one half to the other
    query: torch.Tensor  # float32 [rows, HD_PAD], as `put_query` in common.cuh stores it
    attended: torch.Tensor
    inner: torch.Tensor
    parts: torch.Tensor
    arrived: torch.Tensor
    best: torch.Tensor  # int64 [rows]

    @classmethod
    def allocate(
        cls,
        arch: Architecture,
        dtype: torch.dtype,
        rows: int,
        chunks: int,
        device: torch.device,
        *,
        int8: bool = False,
    ) -> StepBuffers:
        """Zeros for R rows, and for keys in up to `chunks` chunks; `int8` says that weights are in 8 bits."""
        count = -(-rows // 32) * 32
        width, inner, hidden = (
            padded(size, int8=int8) for size in (arch.d_model, arch.num_heads * arch.d_kv, arch.d_ff)
        )

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        stream = zeros(count, width)
        return cls(
            stream=stream,
            copy=stream if dtype == torch.float32 else zeros(count, width, dtype=dtype),
            scales=torch.ones((2, count), device=device),
            squares=zeros(count, tiles(width // 16) * 16),
            query=zeros(count, inner),
            attended=zeros(count, inner, dtype=dtype),
            inner=zeros(count, hidden, dtype=dtype),
            parts=zeros(rows, arch.num_heads, chunks, arch.d_kv + 2),
            arrived=zeros(rows, arch.num_heads, dtype=torch.int32),
            best=zeros(rows, dtype=torch.int64),
        )


@dataclass
class StepInputs:
    """The memory of a request that a step reads and writes.

    Attributes:
        tokens: int32 [R]. position: int32 [R], of those tokens.
        kv: [L, 2, R, H, T, D]. cross: [L, 2, B, H, S, D]. mask: float32 [B, S], additive. lengths: int32 [B], keys of each source.
        beams: rows that share a source.
        logits: float32 [R, V].
        ancestors: uint8 [R, T + 1], the beam in whose cache a token's key and value lie, for each token of a row; None: the row's own.
        places: int32 [R], where a row's new key and value go: the place in its sequence's cache, counted from the row's own cache in units of D,
            so that several rows may be positions of one sequence (`t5_trt.runtime.kernel_positions`). None: `position`, in the row's own cache.
        neighbours: rows from whose first one `ancestors` count; 0: `beams`.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    kv: torch.Tensor
    cross: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    beams: int
    logits: torch.Tensor
    ancestors: torch.Tensor | None = None
    places: torch.Tensor | None = None
    neighbours: int = 0
