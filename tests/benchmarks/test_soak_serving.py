"""The soak of serving: a few rounds of it, and that it notices what it is there to notice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import soak_serving
from benchmarks.soak_clients import ENDINGS
from t5_trt.serving import Engine
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.service import Service
from tests.conftest import ROOT

REQUESTS = int(os.environ.get("T5_TRT_SERVING_REQUESTS", "150"))
LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]


@pytest.fixture
def service(shipped: tuple[Any, Any, Any]) -> Service:
    tokenizer, _, ours = shipped
    return Service(ours, tokenizer, "soak", Limits(), max_rows=soak_serving.ROWS, max_waiting=soak_serving.WAITING)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """As in the benchmark: with more, torch starts others for each thread that first has enough to do, some after the short warm-up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(300 + REQUESTS)
@pytest.mark.usefixtures("one_torch_thread")
def test_requests_with_clients_of_every_kind_get_the_tokens_of_generate_alone(
    service: Service, shipped: tuple[Any, Any, Any]
) -> None:
    seen = soak_serving.run(service, shipped[0], LINES, requests=REQUESTS, seed=3)
    kinds = {f"{way}, client {ending}" for way, endings in ENDINGS.items() for ending in endings}
    assert set(seen.answered) | set(seen.disturbed) == kinds
    assert seen.different == [] and seen.compared > REQUESTS / 2 and sum(seen.disturbed.values()) > REQUESTS / 10
    assert seen.ended["failed"] == 0 and seen.ended["cancelled"] > 0 and seen.ended["timed_out"] > 0
    assert not [problem for problem in seen.broken() if "grew" in problem or "differ" in problem]


def test_wrong_tokens_are_noticed(
    service: Service, shipped: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = service.model.session
    real = session.step_rows

    def wrong(*args: Any, **how: Any) -> torch.Tensor:
        made: torch.Tensor = real(*args, **how).clone()
        made[0] = made[0].roll(1) if made.dim() > 1 else 5
        return made

    monkeypatch.setattr(session, "step_rows", wrong)
    seen = soak_serving.run(service, shipped[0], LINES, requests=20, seed=1)
    assert any("differ" in problem for problem in seen.broken())


def test_a_row_that_stays_in_use_is_noticed(
    service: Service, shipped: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = Engine.stats
    monkeypatch.setattr(Engine, "stats", lambda engine: replace(seen := stats(engine), running=seen.running + 1))
    monkeypatch.setattr("tests.serving_requests.PATIENCE_S", 0.5)
    with pytest.raises(AssertionError):
        soak_serving.run(service, shipped[0], LINES, requests=4, seed=1)
