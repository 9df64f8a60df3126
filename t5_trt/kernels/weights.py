"""Packing weights in the order in which the kernels read them, see ``product.cuh``."""

from __future__ import annotations

import torch

from t5_trt.graph.int8 import round_columns

#: inputs of a tile of 8-bit weights; outputs are padded to multiples of it, too
LARGE_TILE = 32
#: behind the weights of each tile of 16 outputs
SCALE_BYTES = 128


def pack_matrix(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Put a matrix into tiles of 16 x 16, each in the order of mma.m16n8k16's A fragments.

    Args:
        matrix: [outputs, inputs], any floating type; both are padded to multiples of 16 by zeros.
        dtype: float16, bfloat16 or float32, of the result; int8: see `pack_int8`.

    Returns:
        [output tiles, input tiles, 256] on the same device. Element order in a tile, with g = lane // 4 and c = lane % 4: lane, then
        rows g and g + 8 of columns 4c and 4c + 1, then of columns 4c + 2 and 4c + 3. These are mma's fragments (PTX ISA, "Matrix
        Fragments for mma.m16n8k16") with the columns in another order, the same on both sides, so that a lane reads four neighbouring
        values of a row at once. In float32: half, then lane: row lane % 16, columns lane // 16 * 8 + half * 4 and the three after it.
    """
    if dtype == torch.int8:
        return pack_int8(matrix)
    padded = _padded(matrix.to(dtype), 16)
    rows, columns = (size // 16 for size in padded.shape)
    if dtype == torch.float32:
        parts = padded.reshape(rows, 16, columns, 2, 2, 4).permute(0, 2, 4, 3, 1, 5)
    else:
        parts = padded.reshape(rows, 2, 8, columns, 4, 2, 2).permute(0, 3, 2, 4, 5, 1, 6)
    return parts.reshape(rows, columns, 256).contiguous()


def unpack_matrix(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The inverse of `pack_matrix`: the matrix [outputs, inputs]; of 8-bit weights in float16."""
    if packed.dtype == torch.uint8:
        return unpack_int8(packed, outputs, inputs).half()
    rows, columns = packed.shape[:2]
    if packed.dtype == torch.float32:
        parts = packed.view(rows, columns, 2, 2, 16, 4).permute(0, 4, 1, 3, 2, 5)
    else:
        parts = packed.view(rows, columns, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 3, 4, 6)
    return parts.reshape(rows * 16, columns * 16)[:outputs, :inputs]


def _padded(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    """The matrix, or a copy of it with zeros behind both axes up to multiples."""
    outputs, inputs = (-(-size // multiple) * multiple for size in matrix.shape)
    if matrix.shape == (outputs, inputs):
        return matrix
    made = matrix.new_zeros((outputs, inputs))
    made[: matrix.shape[0], : matrix.shape[1]] = matrix
    return made


def pack_int8(matrix: torch.Tensor) -> torch.Tensor:
    """Round a matrix to 8 bits, symmetrically with a scale of each output, and put it into tiles as ``int8_weights.cuh`` describes.

    Args:
        matrix: [outputs, inputs], any floating type; both are padded to multiples of 32 by zeros.

    Returns:
        uint8 [output tiles of 16, input tiles of 32 * 512 + `SCALE_BYTES`] on the same device: of each tile of outputs the numbers plus 128,
        then 16 float32 scales.
    """
    values = _padded(matrix.float(), LARGE_TILE)
    rounded, scales = round_columns(values.t())
    rows, columns = values.shape[0] // 16, values.shape[1] // LARGE_TILE
    numbers = rounded.t().to(torch.uint8) + 128  # uint8 wraps around: -1 is 255, and 127 is left of it
    made = torch.zeros((rows, columns * 512 + SCALE_BYTES), dtype=torch.uint8, device=matrix.device)
    made[:, : columns * 512] = numbers.reshape(rows, 2, 8, columns, 4, 8).permute(0, 3, 2, 4, 5, 1).reshape(rows, -1)
    made[:, columns * 512 :][:, :64] = scales.view(rows, 16).view(torch.uint8)
    return made


def unpack_int8(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """What `pack_int8` has rounded, in float32 [outputs, inputs]."""
    rows, columns = len(packed), -(-inputs // LARGE_TILE)
    numbers = (
        packed[:, : columns * 512].view(rows, columns, 8, 4, 8, 2).permute(0, 5, 2, 1, 3, 4).reshape(rows * 16, -1)
    )
    scales = packed[:, columns * 512 :][:, :64].contiguous().view(torch.float32).view(-1, 1)
    return ((numbers.float() - 128) * scales)[:outputs, :inputs]


def pack_stack(matrices: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Pack matrices [outputs, inputs] one after the other, each padded to whole tiles."""
    return torch.cat([pack_matrix(matrix, dtype) for matrix in matrices])


def pack_gated(gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack the two input matrices of a gated feed-forward layer with alternating tiles."""
    both = torch.stack((pack_matrix(gate, dtype), pack_matrix(up, dtype)), 1)
    return both.flatten(0, 1)


def pack_head(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack the output matrix, padded to an even number of tiles."""
    packed = pack_matrix(matrix, dtype)
    return torch.cat((packed, packed.new_zeros((len(packed) % 2, *packed.shape[1:]))))


def unpack_activations(
    stored: torch.Tensor, rows: int, columns: int, tile: int = 16, *, halves: bool = False
) -> torch.Tensor:
    """Convert activations between kernels to [rows, columns].

    Args:
        stored: as ``activation_index`` in ``common.cuh`` puts them.
        rows: to return.
        columns: likewise.
        tile: columns of a k tile.
        halves: the kernels have ``WARPGROUPS``.
    """
    tiles = -(-columns // tile)
    if stored.dtype == torch.float32:
        return stored.view(-1, tiles * tile)[:rows, :columns]
    if halves:
        parts = stored.view(-1, tiles, 2, 8, 4, 2).permute(0, 3, 1, 4, 2, 5)
    else:
        parts = stored.view(-1, tiles, 8, tile).transpose(1, 2)
    return parts.reshape(-1, tiles * tile)[:rows, :columns]
