"""What tests of the engine share: sources, long requests, the comparison with `generate()` alone."""

from __future__ import annotations

import time
from typing import Any

import torch

from tests.tiny_models import VOCAB

PATIENCE_S = 60
LONG = {"max_new_tokens": 5000, "min_new_tokens": 5000}


def source(seed: int = 0, length: int = 7) -> list[int]:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: Any, ids: list[int], seed: int | None = None, **settings: Any) -> torch.Tensor:
    """What the request gives without the engine; the state of torch's generator stays as it is."""
    with torch.random.fork_rng([]):
        if seed is not None:
            torch.manual_seed(seed)
        made: torch.Tensor = model.generate(torch.tensor([ids]), **settings)
    return made


def until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
