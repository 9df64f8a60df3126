"""The best scores of rows and of beams: equal to torch's."""

from __future__ import annotations

import pytest
import torch

from t5_trt.runtime.top_tokens import best, largest_sums

INF = float("inf")


def by_topk(scores: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = (scores.view(*added.shape, -1) + added[..., None]).flatten(1).topk(8)
    return values, places


@pytest.mark.parametrize("size", [100, 256 * 9, 32128])
@pytest.mark.parametrize("batch", [1, 3])
def test_largest_sums_are_those_of_topk(batch: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores, added = torch.randn(batch * 4, size, generator=generator), torch.randn(batch, 4, generator=generator)
    scores[1, -1] = 50.0  # behind the last whole group
    scores[0, :4] = torch.arange(60.0, 64.0)  # several in one group
    for got, expected in zip(largest_sums(scores, added, 8, below=-5e8), by_topk(scores, added), strict=True):
        assert torch.equal(got, expected)


def test_first_step_continues_one_beam() -> None:
    scores, added = torch.randn(4, 5000), torch.tensor([[0.0, -1e9, -1e9, -1e9]])
    for got, expected in zip(largest_sums(scores, added, 8, below=-5e8), by_topk(scores, added), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("hidden", [-INF, -1e9, float("nan")])
def test_masked_scores_among_the_largest_are_chosen_as_topk_does(hidden: float) -> None:
    scores, added = torch.full((4, 256 * 20), hidden), torch.zeros(2, 2)
    scores[:, 700:703] = torch.arange(12.0).view(4, 3)
    values, places = largest_sums(scores, added, 8, below=-5e8)
    torch.testing.assert_close(values, by_topk(scores, added)[0], equal_nan=True)
    assert torch.equal(places, by_topk(scores, added)[1])


def test_best_is_the_first_of_equal_scores() -> None:
    scores = torch.zeros(4, 5000)
    scores[1, 30] = scores[1, 4000] = 1.0
    scores[2, 77] = scores[2, 78] = float("nan")
    scores[3] = -INF
    assert torch.equal(best(scores), scores.argmax(-1)) and best(scores).tolist() == [0, 30, 77, 0]
    parameter = torch.ones(1, 3, requires_grad=True)
    assert best(parameter).tolist() == [0]
