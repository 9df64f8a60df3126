"""Log-softmax and the best sums of beams in C: equal to torch's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from t5_trt.engine.store import EngineStore
from t5_trt.kernels.cpu_compile import load_library, why_not_compiled
from t5_trt.kernels.cpu_tokens import best_sums, log_softmax, reads

INF, NAN = float("inf"), float("nan")
#: of vectors and blocks of any processor: below one, a multiple, and remainders
SIZES = (1, 3, 100, 128, 1024, 1061, 32128)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    refusal = why_not_compiled()
    if refusal is not None:
        pytest.skip(refusal)
    root: Path = tmp_path_factory.mktemp("store")
    return load_library(EngineStore(root))


def logits_of(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 8


def sums_of(scores: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return (scores.view(*added.shape, -1) + added[..., None]).flatten(1)


def first_best(sums: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = sums.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


@pytest.mark.parametrize("size", SIZES)
def test_log_softmax_is_as_exact_as_float32(library: ctypes.CDLL, size: int) -> None:
    logits = logits_of(5, size)
    logits[1] += 1e4
    logits[2] *= 1e-3
    logits[3, : size // 2] = -INF
    logits[4, 1:] = -INF
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(log_softmax(library, logits).double(), exact, rtol=1e-6, atol=1e-6)
    assert log_softmax(library, logits)[4, 0] == 0


@pytest.mark.parametrize("place", [0, 700, 1023, 1060])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_row_without_probabilities_is_nan(library: ctypes.CDLL, value: float, place: int) -> None:
    logits = logits_of(3, 1061)
    logits[0] = -INF
    logits[1, place] = value
    got = log_softmax(library, logits)
    assert got[:2].isnan().all() and torch.log_softmax(logits, -1)[:2].isnan().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("batch", "beams", "count"), [(1, 4, 8), (3, 2, 1), (2, 5, 5), (1, 1, 1)])
def test_best_sums_are_those_of_topk(library: ctypes.CDLL, batch: int, beams: int, count: int, size: int) -> None:
    count = min(count, beams * size)
    scores, added = logits_of(batch * beams, size), logits_of(batch, beams, seed=1)
    scores[0, size // 2 :] -= torch.arange(size - size // 2) * 0.01  # the best ones are replaced rarely
    scores[-1] += torch.arange(size) * 0.01  # and often
    values, places = best_sums(library, scores, added, count)
    expected = sums_of(scores, added).topk(count)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


@pytest.mark.parametrize("size", SIZES)
def test_first_of_equal_sums_are_taken(library: ctypes.CDLL, size: int) -> None:
    scores = logits_of(8, size).clamp(-2, 2).round()
    scores[4:] = 1.0
    added = torch.tensor([[0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    count = min(6, 4 * size)
    values, places = best_sums(library, scores, added, count)
    expected = first_best(sums_of(scores, added), count)
    assert torch.equal(values, expected[0]) and torch.equal(places, expected[1])


@pytest.mark.parametrize("finite", [0, 1, 5])
def test_hidden_scores_fill_up_the_best(library: ctypes.CDLL, finite: int) -> None:
    scores, added = torch.full((4, 1061), -INF), torch.zeros(2, 2)
    scores[1, 500 : 500 + finite] = torch.arange(float(finite))
    scores[3, 1060] = -1e30
    values, places = best_sums(library, scores, added, 8)
    expected = first_best(sums_of(scores, added), 8)
    assert torch.equal(values, expected[0]) and torch.equal(places, expected[1])
    assert values[0].isfinite().sum() == finite and all(len(set(row)) == 8 for row in places.tolist())


@pytest.mark.parametrize("place", [0, 700, 1060])
def test_nan_is_shown_in_all_sums_of_its_entry(library: ctypes.CDLL, place: int) -> None:
    scores, added = logits_of(6, 1061), torch.zeros(3, 2)
    scores[3, place] = NAN
    for normalizes in (False, True):
        values, places = best_sums(library, scores, added, 4, normalizes=normalizes)
        assert values.isnan().all(1).tolist() == [False, True, False]
        others = torch.log_softmax(scores, -1) if normalizes else scores
        assert torch.equal(places[2], sums_of(others, added)[2].topk(4).indices)


@pytest.mark.parametrize("size", SIZES[2:])
def test_best_sums_of_logits_are_those_of_their_log_softmax(library: ctypes.CDLL, size: int) -> None:
    logits, added = logits_of(8, size), logits_of(2, 4, seed=1)
    logits[2, size // 3 :] = -INF
    hidden = torch.zeros(size, dtype=torch.uint8)
    hidden[[1, size // 2, size - 1]] = 1
    logits[0, size // 2] = logits[5, size - 1] = 60.0
    for mask in (None, hidden):
        scores = log_softmax(library, logits)
        if mask is not None:
            scores[:, mask.bool()] = -INF
        got = best_sums(library, logits, added, 8, normalizes=True, hidden=mask)
        expected = best_sums(library, scores, added, 8)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_what_the_code_cannot_read_is_refused() -> None:
    rows = torch.zeros(4, 6)
    assert reads(rows, rows[1:], rows[:, None][:, 0])
    for other in (rows.double(), rows.t(), rows[:, 1:], rows.to("meta"), rows.clone().requires_grad_()):
        assert not reads(rows, other)
