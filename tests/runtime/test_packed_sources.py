"""Sources packed one behind another, on a CPU: kernels' references encode them, and a recording stands in for CUDA graphs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t5_trt.runtime.packed_sources import MOST_SOURCES, packed_size
from t5_trt.runtime.row_sources import Source
from tests.stand_in_kernels import kernels_pair
from tests.tiny_models import KINDS, VOCAB


def drawn(chance: random.Random, length: int) -> Source:
    """A source; of some, tokens are hidden."""
    ids = np.array([chance.randrange(2, VOCAB) for _ in range(length)])
    hides = chance.choice((0.0, 0.3, 1.0))
    return ids, np.array([int(chance.random() >= hides) for _ in range(length)])


def check(session: Any, sources: list[Source]) -> None:
    """Each source has what it gets alone."""
    made = session.encode_rows(sources)
    assert made.done and len(made.split()) == len(sources)
    for (ids, mask), (cross, bias) in zip(sources, made.split(), strict=True):
        given = torch.from_numpy(mask)[None]
        _, alone = session.encode(torch.from_numpy(ids)[None], None, given)
        torch.testing.assert_close(cross, alone.kv[:, :, 0, :, : len(ids)], atol=2e-5, rtol=1e-4)
        assert torch.equal(bias, session.cross_bias(given, alone)[0, 0, 0, : len(ids)])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_source_has_what_it_gets_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    session, chance = kernels_pair(monkeypatch, tmp_path, kind, packs=True)[1].session, random.Random(kind)
    assert session.batch_size is None
    for lengths in ((1,), (5, 30, 16, 1), (64, 64), tuple(range(1, MOST_SOURCES + 1)), (2,) * (MOST_SOURCES + 9)):
        check(session, [drawn(chance, length) for length in lengths])


@torch.no_grad()
def test_a_size_is_captured_when_it_comes_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session, chance = kernels_pair(monkeypatch, tmp_path, packs=True)[1].session, random.Random(1)
    sizes, captured = session._encoder._sizes._sizes, []
    for lengths in ((40, 30), (3, 70), (33, 33), (80,)):
        check(session, [drawn(chance, length) for length in lengths])
        captured.append(sizes["packed", 80, 5].graph is not None)
    assert captured == [False, True, True, True] and len([size for size in sizes if size[0] == "packed"]) == 1
    kept = session.encode_rows([drawn(chance, 77)])
    before = kept.split()[0][0].clone()
    check(session, [drawn(chance, 76)])
    assert torch.equal(kept.split()[0][0], before), "results are the rows'"


@torch.no_grad()
def test_longer_sources_than_are_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session, chance = kernels_pair(monkeypatch, tmp_path, packs=True)[1].session, random.Random(2)
    monkeypatch.setattr("t5_trt.runtime.packed_sources.CAPTURED_TOKENS", 64)
    check(session, [drawn(chance, 90), drawn(chance, 3)])
    assert not [size for size in session._encoder._sizes._sizes if size[0] == "packed"]


def test_sizes_are_few_and_large_enough() -> None:
    chance, sizes = random.Random(0), set()
    for _ in range(3000):
        lengths = [chance.randint(1, 400) for _ in range(chance.randint(1, MOST_SOURCES))]
        tokens, sources = packed_size(lengths)
        assert sum(lengths) <= tokens and len(lengths) <= sources <= MOST_SOURCES and tokens % 16 == 0
        assert tokens <= 1.25 * max(sum(lengths), 16 * len(lengths)) + 16
        if tokens <= 4096:
            sizes.add((tokens, sources))
    assert len(sizes) < 32
    assert packed_size([32]) == (32, 2) and packed_size([1] * 20) == (320, 20)
