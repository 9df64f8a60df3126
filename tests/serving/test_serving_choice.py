"""Rows that choose alike do it together, and each gets the tokens of `generate()` alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt.generation import sampling
from t5_trt.serving import Engine, choice
from t5_trt.serving.choice import TokenChoice
from t5_trt.serving.handle import Job
from t5_trt.serving.rows import Row
from t5_trt.serving.settings import SettingsReader
from tests.serving_requests import LONG, PATIENCE_S, alone, source, until
from tests.tiny_models import VOCAB


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows have chosen together, each time."""
    seen: list[int] = []
    choose = TokenChoice._choose

    def counted(self: TokenChoice, logits: torch.Tensor, rows: list[Row], *rest: Any) -> None:
        seen.append(len(rows))
        choose(self, logits, rows, *rest)

    monkeypatch.setattr(TokenChoice, "_choose", counted)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.4, "min_p": 0.02},
        {"do_sample": True, "typical_p": 0.7, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"sequence_bias": [[[10], 5.0], [[3, 9], 2.0]], "bad_words_ids": [[7], [8, 9]], "do_sample": True},
        {"exponential_decay_length_penalty": (3, 1.2), "do_sample": True, "epsilon_cutoff": 0.001},
        {"forced_bos_token_id": 17, "suppress_tokens": [3, 4, 5], "forced_eos_token_id": 1},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_rows_that_choose_alike_do_it_together(
    v11: tuple[Any, Any], sizes: list[int], settings: dict[str, Any]
) -> None:
    """They have joined one after the other, so their histories have other lengths."""
    settings = {"min_new_tokens": 50, **settings}
    with Engine(v11[1], max_rows=6) as engine:
        handles = []
        asked = [settings | {"max_new_tokens": 80 - place % 2} for place in range(6)]
        for place, each in enumerate(asked):
            handles.append(engine.submit(source(place, 3 + 4 * place), seed=place, **each))
            until(lambda: len(handles[-1].tokens) > 2 or handles[-1].done)
        found = [handle.result(PATIENCE_S) for handle in handles]
    assert max(sizes) > 1
    wanted = [alone(v11[1], source(place, 3 + 4 * place), place, **each) for place, each in enumerate(asked)]
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in wanted]


def test_others_are_beside_them(v11: tuple[Any, Any], sizes: list[int]) -> None:
    each: list[dict[str, Any]] = [
        {"do_sample": True, "top_k": 9},
        {},
        {"do_sample": True, "top_k": 9},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 30},
        {"min_new_tokens": 40},
    ]
    with Engine(v11[1], max_rows=7) as engine:
        long = engine.submit(source(), **LONG)
        handles = [engine.submit(source(n), seed=n, max_new_tokens=60, **own) for n, own in enumerate(each)]
        found = [handle.result(PATIENCE_S) for handle in handles]
        assert not long.done
        del long
    wanted = [alone(v11[1], source(n), n, max_new_tokens=60, **own) for n, own in enumerate(each)]
    assert all(map(torch.equal, found, wanted)) and set(sizes) == {1, 2}


def test_histories_are_as_wide_as_their_rows_need(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    forms = choice.capturable_processors
    monkeypatch.setattr(choice, "capturable_processors", lambda *given: widths.append(given[2]) or forms(*given))
    settings = {"repetition_penalty": 1.2, "max_new_tokens": 300, "min_new_tokens": 300}
    with Engine(v11[1]) as engine:
        found = engine.submit(source(), **settings).result(PATIENCE_S)
    assert torch.equal(found, alone(v11[1], source(), **settings))
    assert len(widths) > 2 and widths == sorted(set(widths)) and widths[0] < 300 < widths[-1]


def test_sums_along_rows_keep_them_apart_on_a_gpu(v11: tuple[Any, Any]) -> None:
    """There the order of `torch.cumsum`'s additions depends on the number of rows."""
    reader, ids = SettingsReader(v11[1]), torch.tensor([source()])
    groups = []
    for device in ("cpu", "cuda"):
        choosing = TokenChoice(VOCAB, 8, torch.device(device))
        for settings in ({"top_k": 5}, {"top_p": 0.5}, {"typical_p": 0.5}, {"temperature": 0.5}):
            prepared = reader.read(None, {"do_sample": True, **settings})
            rows = [Row(Job(ids, torch.ones_like(ids), prepared, None, None)) for _ in range(3)]
            groups.append(len(choosing._groups([0, 1, 2], rows)))
    assert groups == [1, 1, 1, 1, 1, 3, 3, 1]


def test_lengths_keep_no_rows_apart_but_values_do(v11: tuple[Any, Any]) -> None:
    reader, ids = SettingsReader(v11[1]), torch.tensor([source()])
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 5, "temperature": 0.5},
        {"max_new_tokens": 300, "temperature": 0.5, "eos_token_id": [1, 7]},
        {"max_new_tokens": 5, "temperature": 0.6},
        {"max_new_tokens": 5, "temperature": 0.5, "top_k": 0},
        {"max_new_tokens": 5, "temperature": 0.5, "min_new_tokens": 2},
        {"max_new_tokens": 5, "temperature": 0.5, "decoder_start_token_id": 9},
    ]
    rows = [
        Row(Job(ids, torch.ones_like(ids), reader.read(None, {"do_sample": True, **each}), None, None))
        for each in settings
    ]
    groups = TokenChoice(VOCAB, 8, torch.device("cpu"))._groups(list(range(len(rows))), rows)
    assert sorted(groups) == [[0, 1, 5], [2], [3], [4]]


def test_few_forms_of_processors_are_kept(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "KEPT", 3)
    with Engine(v11[1]) as engine:
        for penalty in (1.1, 1.2, 1.3, 1.4, 1.5):
            engine.submit(source(), repetition_penalty=penalty, max_new_tokens=3).result(PATIENCE_S)
        assert len(engine._scheduler._running._choice._forms) == 3


@pytest.mark.parametrize("size", [7, 211, 32128])
def test_draws_of_many_rows_are_those_of_one(size: int) -> None:
    scores = 4 * torch.randn((5, size), generator=torch.Generator().manual_seed(1))
    for turn in range(20):
        found = sampling.draw_each(scores, [torch.Generator().manual_seed(100 * turn + row) for row in range(5)])
        for row in range(5):
            torch.manual_seed(100 * turn + row)
            assert int(found[row]) == int(torch.multinomial(scores[row].softmax(-1), 1))
