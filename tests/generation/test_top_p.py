"""Top-p on a CPU without a sort of all scores: the tokens of Transformers' class."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from t5_trt.generation import processor_forms
from t5_trt.generation.processor_forms import CAPTURABLE, likely
from t5_trt.generation.processors import capturable_processors

CPU = torch.device("cpu")
NO_IDS, POSITION = torch.zeros((1, 1), dtype=torch.long), torch.zeros(1, dtype=torch.long)


def scores_of(vocabulary: int, scale: float, rows: int = 5) -> torch.Tensor:
    return scale * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(vocabulary))


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("top_k", [None, 5, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("vocabulary", [40, 512, 700, 32128])
def test_few_likely_tokens_stay_without_a_sort(vocabulary: int, top_p: float, top_k: int | None, least: int) -> None:
    scores = scores_of(vocabulary, 5.0)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(NO_IDS, scores)
    found = likely(scores, torch.tensor(top_p, dtype=torch.float64), least, -torch.inf)
    if found is None:  # more than the best 512
        assert top_p > 0.99 and top_k is None and vocabulary > 512
        return
    assert torch.equal(found, TopPLogitsWarper(top_p, min_tokens_to_keep=least)(NO_IDS, scores))


def test_the_form_of_a_cpu_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a GPU the class itself; with other fillings, and values that are loaded later."""
    warper = TopPLogitsWarper(0.8, filter_value=-7.0)
    seen: list[int] = []
    monkeypatch.setattr(TopPLogitsWarper, "__call__", lambda self, ids, scores: seen.append(1) or scores, raising=True)
    (form,) = capturable_processors([warper], 32128, 8, CPU) or []
    scores = scores_of(32128, 5.0)
    made = form.apply(NO_IDS, POSITION, scores)
    assert not seen and set(made[made != scores].tolist()) == {-7.0}
    form.load(TopPLogitsWarper(0.2))
    assert (form.apply(NO_IDS, POSITION, scores) == scores).sum() < (made == scores).sum()
    on_gpu = CAPTURABLE[TopPLogitsWarper].make(warper, 32128, 8, torch.device("cuda"))
    assert on_gpu(NO_IDS, POSITION, scores) is scores and seen == [1]


@pytest.mark.parametrize(
    "case", ["flat", "equal at the edge", "all equal", "not a number", "infinite", "everything hidden"]
)
def test_what_the_best_tokens_do_not_say_is_left_to_a_sort(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_forms, "LIKELY", 64)
    scores = scores_of(1000, 0.01 if case == "flat" else 5.0)
    if case == "equal at the edge":
        scores = torch.full((1, 1000), -50.0)
        scores[0, :10] = 0.0
    elif case == "all equal":
        scores = torch.zeros((2, 1000))
    elif case in ("not a number", "infinite"):
        scores[2, 3] = torch.nan if case == "not a number" else torch.inf
    elif case == "everything hidden":
        scores[1] = -torch.inf
    assert likely(scores, torch.tensor(0.75, dtype=torch.float64), 1, -torch.inf) is None
    (form,) = capturable_processors([TopPLogitsWarper(0.75)], 1000, 8, CPU) or []
    made, expected = form.apply(NO_IDS, POSITION, scores), TopPLogitsWarper(0.75)(NO_IDS, scores)
    assert torch.equal(made.nan_to_num(3.0), expected.nan_to_num(3.0))
