"""The largest scores of a row: equal to torch's."""

from __future__ import annotations

import pytest
import torch

from t5_trt.runtime.top_tokens import best, largest

INF = float("inf")


@pytest.mark.parametrize("size", [100, 256 * 9, 32128 * 4, 32128 * 3 + 77])
@pytest.mark.parametrize("rows", [1, 3])
def test_largest_scores_are_those_of_topk(rows: int, size: int) -> None:
    scores = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    scores[:, -1] = 50.0  # behind the last whole group
    scores[0, :4] = torch.arange(60.0, 64.0)  # several in one group
    expected = scores.topk(8)
    values, places = largest(scores, 8, below=-5e8)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


@pytest.mark.parametrize("hidden", [-INF, -1e9, float("nan")])
def test_masked_scores_among_the_largest_are_chosen_as_topk_does(hidden: float) -> None:
    scores = torch.full((2, 256 * 20), hidden)
    scores[:, 700:705] = torch.arange(5.0)
    expected = scores.topk(8)
    values, places = largest(scores, 8, below=-5e8)
    torch.testing.assert_close(values, expected.values, equal_nan=True)
    assert torch.equal(places, expected.indices)


def test_best_is_the_first_of_equal_scores() -> None:
    scores = torch.zeros(4, 5000)
    scores[1, 30] = scores[1, 4000] = 1.0
    scores[2, 77] = scores[2, 78] = float("nan")
    scores[3] = -INF
    assert torch.equal(best(scores), scores.argmax(-1)) and best(scores).tolist() == [0, 30, 77, 0]
    parameter = torch.ones(1, 3, requires_grad=True)
    assert best(parameter).tolist() == [0]
