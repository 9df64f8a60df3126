"""A server of the shipped model for all tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.service import Service
from tests.http_server import Client, serving

Alone = Callable[..., list[str]]


@pytest.fixture(scope="module")
def service(shipped: tuple[Any, Any, Any]) -> Service:
    tokenizer, _, ours = shipped
    return Service(ours, tokenizer, "kana", Limits(body_bytes=20_000, source_tokens=90, new_tokens=5000), max_rows=8)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with serving(service) as (made, _):
        yield made


@pytest.fixture
def alone(shipped: tuple[Any, Any, Any]) -> Alone:
    """The texts that `generate()` alone gives for one text."""
    tokenizer, _, ours = shipped

    def texts(source: str | list[int], seed: int | None = None, **settings: Any) -> list[str]:
        ids = tokenizer(source)["input_ids"] if isinstance(source, str) else source
        with torch.random.fork_rng([]):
            if seed is not None:
                torch.manual_seed(seed)
            rows = ours.generate(torch.tensor([ids]), **settings)
        return list(tokenizer.batch_decode(rows, skip_special_tokens=True))

    return texts
