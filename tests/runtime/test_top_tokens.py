"""The best scores of rows and of beams: equal to torch's."""

from __future__ import annotations

import pytest
import torch

from t5_trt.config import default_engine_cache_dir
from t5_trt.engine.store import EngineStore
from t5_trt.kernels.cpu_compile import load_library, why_not_compiled
from t5_trt.runtime import top_tokens
from t5_trt.runtime.top_tokens import best, largest_log_sums, largest_sums, log_softmax

INF = float("inf")


@pytest.fixture(params=["torch", "C code"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, whatever other tests have loaded."""
    library = None
    if request.param == "C code":
        refusal = why_not_compiled()
        if refusal is not None:
            pytest.skip(refusal)
        library = load_library(EngineStore(default_engine_cache_dir()))
    monkeypatch.setattr(top_tokens, "loaded_library", lambda: library)
    return str(request.param)


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


@pytest.mark.parametrize("hides", [False, True])
def test_largest_sums_of_logits_are_those_of_the_log_softmax(by: str, hides: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, added = torch.randn(8, 5000, generator=generator) * 5, torch.randn(2, 4, generator=generator)
    hidden = None
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(log_softmax(logits), expected, rtol=1e-6, atol=2e-6)
    if hides:
        hidden = torch.zeros(5000, dtype=torch.uint8)
        hidden[logits[:4].argmax(-1)] = 1
        expected[:, hidden.bool()] = -INF
    found = largest_log_sums(logits, added, 8, below=-5e8, hidden=hidden)
    if by == "torch":
        assert found is None
        return
    assert found is not None
    values, places = by_topk(expected, added)
    torch.testing.assert_close(found[0], values, rtol=1e-6, atol=2e-6)
    assert torch.equal(found[1], places)


def test_masked_sums_and_other_types_are_left_to_topk() -> None:
    few = torch.full((2, 300), -INF)
    few[0, :7] = 0.0
    assert largest_log_sums(few, torch.zeros(1, 2), 8, below=-5e8, hidden=None) is None
    assert largest_log_sums(torch.zeros(2, 300).double(), torch.zeros(1, 2), 8, below=-5e8, hidden=None) is None
    assert log_softmax(torch.zeros(2, 300).double()).dtype == torch.float64


def test_best_is_the_first_of_equal_scores() -> None:
    scores = torch.zeros(4, 5000)
    scores[1, 30] = scores[1, 4000] = 1.0
    scores[2, 77] = scores[2, 78] = float("nan")
    scores[3] = -INF
    assert torch.equal(best(scores), scores.argmax(-1)) and best(scores).tolist() == [0, 30, 77, 0]
    parameter = torch.ones(1, 3, requires_grad=True)
    assert best(parameter).tolist() == [0]
