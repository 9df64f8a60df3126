"""The decoder kernels against their torch references in float64, on fresh random inputs with poisoned buffers. No TensorRT is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.decode_step import DecodeStep
from tests.gpu.step_cases import SMALL, TOLERANCES, Case, buffers_of, check, kernels, make, run


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("arch", "positions", "lengths", "beams"),
    [
        (SMALL, [5], [32], 1),
        (replace(SMALL, d_model=768, num_heads=12, d_ff=3072), [0, 63, 64, 7], [9], 4),
        (replace(SMALL, d_model=72, num_heads=1, d_kv=40, d_ff=200, vocab_size=211, activation="silu", gated=True), [3] * 5, [7], 5),
        (replace(SMALL, num_heads=3, d_kv=24, activation="gelu_new", gated=True), [11] * 12, [40, 1, 17], 4),
        (SMALL, [(i * 97) % 1500 for i in range(40)], [1 + (i * 53) % 600 for i in range(20)], 2),
        (replace(SMALL, d_model=1024, num_heads=8, d_kv=128, d_ff=4096, activation="gelu"), [255, 256, 257] * 11, [32] * 33, 1),
        (replace(SMALL, d_ff=16384), [2] * 128, [5] * 128, 1),
    ],
)  # fmt: skip
def test_step_equals_references(
    dtype: torch.dtype, arch: Architecture, positions: list[int], lengths: list[int], beams: int
) -> None:
    check(make(arch, dtype, positions, lengths, beams), dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_requests(data: st.DataObject) -> None:
    beams, sources = data.draw(st.integers(1, 5), "beams"), data.draw(st.integers(1, 12), "sources")
    positions = data.draw(
        st.lists(st.integers(0, 700), min_size=beams * sources, max_size=beams * sources), "positions"
    )
    lengths = data.draw(st.lists(st.integers(1, 700), min_size=sources, max_size=sources), "lengths")
    dtype = data.draw(st.sampled_from(sorted(TOLERANCES, key=str)), "dtype")
    check(make(SMALL, dtype, positions, lengths, beams, seed=data.draw(st.integers(0, 1000), "seed")), dtype)


def test_same_bits_in_every_run_and_without_early_start() -> None:
    cases = [make(SMALL, torch.float16, [9, 300, 0] * 4, [20] * 12, 1, early=early) for early in (True, True, False)]
    results = [run(case) for case in cases for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_row_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    case = make(SMALL, dtype, [(i * 37) % 600 for i in range(130)], [1 + (i * 29) % 500 for i in range(130)], 1)
    whole = run(case)
    for rows in (1, 2, 8, 9, 17, 32, 33, 64, 65):
        given = case.step.inputs
        given = replace(
            given, tokens=given.tokens[:rows].clone(), position=given.position[:rows].clone(),
            kv=given.kv[:, :, :rows].contiguous(), cross=given.cross[:, :, :rows].contiguous(), mask=given.mask[:rows].contiguous(),
            lengths=given.lengths[:rows].clone(), logits=torch.zeros(rows, SMALL.vocab_size, device="cuda"),
        )  # fmt: skip
        chunks = case.step.buffers.parts.shape[2]
        buffers = buffers_of(SMALL, dtype, rows, chunks)
        few = DecodeStep(SMALL, kernels(SMALL, dtype, rows), case.step.weights, buffers, given, SMALL.epsilon, 0.5)
        assert torch.equal(run(Case(few, case.matrices, case.head)), whole[:rows])


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_bits_do_not_depend_on_the_warps_of_attention(dtype: torch.dtype, beams: int) -> None:
    positions = [0, 1, 3, 4, 31, 32, 33, 49, 126, 127, 128, 129, 300, 301, 302, 303]
    case = make(
        SMALL, dtype, positions, [1, 2, 32, 33, 50, 128, 129, 300] * 2 if beams == 1 else [1, 33, 50, 300], beams
    )
    results = []
    for warps in (1, 2, 4, 8):
        case.step = replace(case.step, kernels=kernels(SMALL, dtype, len(positions), ATTENTION_WARPS=warps))
        results.append(run(case))
    assert results[0].isfinite().all() and all(torch.equal(result, results[0]) for result in results)
