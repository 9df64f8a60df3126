"""Rows whose tokens kernels choose, as on a GPU: any settings together, steps ahead of the host. Torch stands in for the kernels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt.serving import ruled_choice, running
from tests.serving.test_serving_by_kernels import engine_as_on_a_gpu
from tests.serving_requests import PATIENCE_S, alone, drawn_settings, source, until
from tests.stand_in_choice import use_stand_ins
from tests.stand_in_kernels import kernels_pair

KINDS: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 12},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "temperature": 0.7, "top_k": 30, "top_p": 0.9},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": True, "repetition_penalty": 1.2, "min_new_tokens": 5, "eos_token_id": [1, 7]},
]
#: which the kernels do not know
OTHERS: list[dict[str, Any]] = [{"exponential_decay_length_penalty": (3, 1.2)}, {"do_sample": True, "min_p": 0.1}]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return kernels_pair(monkeypatch, tmp_path, packs=True)[1]


@pytest.fixture
def together(ours: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return use_stand_ins(monkeypatch)


@pytest.mark.parametrize("many", [running.MANY_ROWS, 1], ids=["a step at once", "two steps at once"])
@pytest.mark.parametrize("kinds", [KINDS, KINDS + OTHERS], ids=["known", "with others"])
def test_rows_of_all_settings_choose_together(
    ours: Any, together: list[int], monkeypatch: pytest.MonkeyPatch, kinds: list[dict[str, Any]], many: int
) -> None:
    monkeypatch.setattr(running, "MANY_ROWS", many)
    chance = random.Random(len(kinds))
    requests = [
        (source(place, chance.randint(1, 40)), {**kinds[place % len(kinds)], "max_new_tokens": chance.randint(12, 50)})
        for place in range(40)
    ]
    with engine_as_on_a_gpu(ours, max_rows=8) as engine:
        handles = [engine.submit(ids, seed=place, **own) for place, (ids, own) in enumerate(requests)]
        found = [handle.result(PATIENCE_S) for handle in handles]
        until(lambda: engine.stats().running == 0)
        assert sorted(engine._scheduler._running._choice._ruled._free) == list(range(8))
    assert max(together) == 8
    for place, ((ids, own), tokens) in enumerate(zip(requests, found, strict=True)):
        assert torch.equal(tokens, alone(ours, ids, place, **own)), own


def test_random_requests_get_the_tokens_of_generate_alone(ours: Any, together: list[int]) -> None:
    chance = random.Random(4)
    requests = [(source(place, chance.randint(1, 40)), drawn_settings(chance)) for place in range(40)]
    with engine_as_on_a_gpu(ours, max_rows=8) as engine:
        handles = [engine.submit(ids, **settings) for ids, settings in requests]
        results = [handle.result(PATIENCE_S) for handle in handles]
    for (ids, settings), result in zip(requests, results, strict=True):
        assert torch.equal(result, alone(ours, ids, **settings)), settings
    assert together


@pytest.mark.parametrize("settings", KINDS[1:], ids=lambda settings: "-".join(settings))
def test_such_rows_do_not_wait_for_the_host(ours: Any, together: list[int], settings: dict[str, Any]) -> None:
    """A step is started before the tokens of the one before are known."""
    ahead: list[int] = []
    with engine_as_on_a_gpu(ours, max_rows=2) as engine:
        rows = engine._scheduler._running
        start = rows._start
        rows._start = lambda *given: ahead.append(len(rows._started)) or start(*given)
        engine.submit(source(), seed=1, **{"min_new_tokens": 20, **settings, "max_new_tokens": 20}).result(PATIENCE_S)
    assert max(ahead) > 0


def test_histories_grow_with_the_longest_row_that_needs_one(ours: Any, together: list[int]) -> None:
    settings = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    with engine_as_on_a_gpu(ours, max_rows=3) as engine:
        ruled = engine._scheduler._running._choice._ruled
        engine.submit(source(), do_sample=True, max_new_tokens=90).result(PATIENCE_S)
        assert ruled._tokens.shape == (3, 0)
        short = engine.submit(source(1), **settings, max_new_tokens=30, min_new_tokens=30)
        until(lambda: len(short.tokens) > 2)
        long = engine.submit(source(2), **settings, max_new_tokens=200, min_new_tokens=200)
        found = [handle.result(PATIENCE_S) for handle in (short, long)]
        assert 200 < ruled._tokens.shape[1] <= 256
    assert torch.equal(found[0], alone(ours, source(1), **settings, max_new_tokens=30, min_new_tokens=30))
    assert torch.equal(found[1], alone(ours, source(2), **settings, max_new_tokens=200, min_new_tokens=200))


def test_few_settings_are_kept(ours: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruled_choice, "KEPT", 3)
    with engine_as_on_a_gpu(ours) as engine:
        for penalty in (1.1, 1.2, 1.3, 1.4, 1.5):
            engine.submit(source(), repetition_penalty=penalty, max_new_tokens=3).result(PATIENCE_S)
        assert len(engine._scheduler._running._choice._ruled._kept) == 3
