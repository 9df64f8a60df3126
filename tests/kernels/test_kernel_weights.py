"""The order of weights and activations that the kernels read."""

from __future__ import annotations

import pytest
import torch

from t5_trt.kernels.weights import (
    SCALE_BYTES,
    pack_gated,
    pack_head,
    pack_int8,
    pack_matrix,
    unpack_activations,
    unpack_matrix,
)

TYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(16, 16), (40, 72), (1, 5), (96, 33)])
def test_unpacking_reverses_packing(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape).to(dtype)
    packed = pack_matrix(matrix, dtype)
    assert packed.shape == (-(-shape[0] // 16), -(-shape[1] // 16), 256) and packed.is_contiguous()
    assert torch.equal(unpack_matrix(packed, *shape), matrix)
    assert packed.float().abs().sum().isclose(matrix.float().abs().sum(), rtol=1e-4), "the padding is zeros"


def test_half_precision_tiles_are_fragments_of_the_tensor_cores() -> None:
    """Lane g * 4 + c: rows g and g + 8 of columns 4c and 4c + 1, then of columns 4c + 2 and 4c + 3."""
    tile = torch.arange(256.0).view(16, 16)
    lane = pack_matrix(tile, torch.float16)[0, 0].view(32, 8)[2 * 4 + 3]
    rows, columns = [2, 2, 10, 10, 2, 2, 10, 10], [12, 13, 12, 13, 14, 15, 14, 15]
    assert torch.equal(lane, tile[rows, columns].half())


def test_gated_tiles_alternate() -> None:
    gate, up = torch.randn(32, 16), torch.randn(32, 16)
    packed = pack_gated(gate, up, torch.float32)
    assert torch.equal(packed[0::2], pack_matrix(gate, torch.float32))
    assert torch.equal(packed[1::2], pack_matrix(up, torch.float32))


def test_output_matrix_has_an_even_number_of_tiles() -> None:
    assert len(pack_head(torch.randn(33, 16), torch.float16)) == 4


def test_activations_of_rows_of_8() -> None:
    rows = torch.arange(9 * 32.0).view(9, 32)
    stored = torch.zeros(16, 32)
    stored[:9] = rows
    stored = stored.half().view(2, 8, 2, 16).transpose(1, 2).contiguous()
    assert torch.equal(unpack_activations(stored, 9, 32), rows.half())


@pytest.mark.parametrize("shape", [(16, 16), (40, 72), (1, 5), (96, 33)])
def test_rounding_to_8_bits_is_off_by_half_a_step_of_each_output(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    packed = pack_matrix(matrix, torch.int8)
    tiles = (-(-shape[0] // 32) * 2, -(-shape[1] // 32))
    assert packed.shape == (tiles[0], tiles[1] * 512 + SCALE_BYTES) and packed.is_contiguous()
    steps = matrix.abs().amax(1, keepdim=True) / 127
    found = unpack_matrix(packed, *shape)
    assert found.dtype == torch.float16
    assert ((found.float() - matrix).abs() <= steps * (0.5 + 127 * 2**-11)).all(), "and by float16's rounding"
    zeros = unpack_matrix(packed, tiles[0] * 16, tiles[1] * 32).clone()
    zeros[: shape[0], : shape[1]] = 0
    assert not zeros.any(), "the padding is zeros"


def test_8_bit_tiles_have_two_rows_in_turns_and_scales_behind_them() -> None:
    """Lane g * 4 + c: 8 columns from 8c on, each of rows g and g + 8, plus 128; then the scales of the 16 rows."""
    tile = torch.randint(-127, 128, (32, 32)).float()
    tile[:, 0] = 127  # so that each row's scale is its factor
    factors = torch.logspace(-2, 2, 32)
    packed = pack_int8(tile * factors[:, None])
    lane = packed[1, :512].view(32, 16)[2 * 4 + 3]
    assert torch.equal(lane.long() - 128, torch.stack((tile[18, 24:], tile[26, 24:]), 1).flatten().long())
    assert torch.allclose(packed[1, 512 : 512 + 64].view(torch.float32), factors[16:])


def test_parts_of_8_bit_matrices_can_be_written_in_place() -> None:
    gate, up = torch.randn(32, 40), torch.randn(32, 40)
    packed = pack_gated(gate, up, torch.int8)
    packed.view(-1, 2, packed.shape[1])[:, 1].copy_(pack_matrix(gate, torch.int8))
    assert torch.equal(packed, pack_gated(gate, gate, torch.int8))
    assert len(pack_head(torch.randn(33, 16), torch.int8)) == 4
