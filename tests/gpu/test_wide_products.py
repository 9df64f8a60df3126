"""The wide products of large models, of which a CTA makes several tiles of outputs one after the other. No TensorRT is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.step_cases import SMALL, TOLERANCES, check, kernels, make, run


@pytest.mark.parametrize("rows", [1, 9, 32])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("gated", [False, True])
def test_wide_products_have_the_same_bits_tile_after_tile(dtype: torch.dtype, rows: int, gated: bool) -> None:
    """A CTA makes several tiles of outputs one after the other, or one."""
    arch = replace(SMALL, d_model=1024, num_heads=12, d_kv=128, d_ff=4400, gated=gated)
    case = make(arch, dtype, [(i * 37) % 60 for i in range(rows)], [1 + i % 20 for i in range(rows)], 1)
    assert case.step.kernels.constants["STREAMED"] == (dtype != torch.float32)
    check(case, dtype)
    results = [run(case)]
    case.step = replace(case.step, kernels=kernels(arch, dtype, rows, STREAMED=0, QKV_TILES=1, IN_TILES=1))
    results.append(run(case))
    assert torch.equal(*results)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="warp groups are instructions of compute capability 9.0",
)
@pytest.mark.parametrize("rows", [33, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "gated"), [(256, False), (768, False), (768, True), (2048, True)])
def test_warp_groups_make_the_same_bits(dtype: torch.dtype, rows: int, size: int, gated: bool) -> None:
    """As the tensor cores of single warps, in layers and in the output matrix."""
    arch = replace(SMALL, d_model=size, num_heads=3, d_kv=64, d_ff=584, gated=gated)
    case = make(arch, dtype, [(i * 37) % 60 for i in range(rows)], [1 + i % 20 for i in range(rows)], 1)
    assert case.step.kernels.constants["WARPGROUPS"] == (4 if rows <= 64 else 8)
    check(case, dtype)
    results = [run(case)]
    tiles = {"QKV_TILES": 2, "IN_TILES": 1 if gated else 2}
    case.step = replace(case.step, kernels=kernels(arch, dtype, rows, WARPGROUPS=0, **tiles))
    results.append(run(case))
    assert torch.equal(*results)
