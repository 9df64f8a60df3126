"""What tests of the engine share: sources, long requests, the comparison with `generate()` alone."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from tests.tiny_models import VOCAB

PATIENCE_S = 60
#: seeds of settings that several requests have: sampling with top-k, with top-p, processors, beams
SHARED = (0, 9, 5, 26, 27)
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


def drawn_settings(chance: random.Random, vocabulary: int = VOCAB) -> dict[str, Any]:
    """Settings of one request: its own, or as often some that others have, too, so that they choose tokens or run together."""
    if chance.random() < 0.5:
        return _drawn_settings(chance, vocabulary)
    settings = _drawn_settings(random.Random(chance.choice(SHARED)), vocabulary)
    return settings | ({"seed": chance.randrange(10**6)} if "seed" in settings else {})


def _drawn_settings(chance: random.Random, vocabulary: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_new_tokens": chance.choice((1, 2, 8, 30, 70))}
    kind = chance.choice(("greedy", "greedy", "processed", "sampled", "sampled", "beams"))
    if kind == "processed":
        settings |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": chance.choice((0, 2))}
        settings["min_new_tokens"] = chance.randint(0, settings["max_new_tokens"])
    if kind == "sampled":
        settings |= {"do_sample": True, "temperature": chance.choice((0.7, 1.0, 1.4)), "seed": chance.randrange(10**6)}
        settings |= {"top_k": chance.choice((0, 5, 50)), "top_p": chance.choice((0.8, 1.0))}
        settings |= {
            "repetition_penalty": chance.choice((1.0, 1.2)),
            "num_return_sequences": chance.choice((1,) * 9 + (2,)),
        }
    if kind == "beams":
        settings |= {"num_beams": 2, "num_return_sequences": chance.randint(1, 2), "max_new_tokens": 8}
    if chance.random() < 0.2:
        settings["eos_token_id"] = [1, chance.randrange(2, vocabulary)]
    return settings
