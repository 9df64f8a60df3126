"""Requests with beams or several results: those with equal settings run in one call of ``generate()``, and end one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from t5_trt.errors import EngineClosedError, RequestCancelledError, RequestTimeoutError
from t5_trt.generation import decode_loop
from t5_trt.serving import Engine, Handle
from tests.serving_requests import LONG, PATIENCE_S, alone, source, until

#: tokens that end a sequence soon in tests' models, at other lengths for each source
ENDS = [1, *range(3, 150, 12)]
BEAMS = {"num_beams": 2, **LONG}


@pytest.fixture
def calls(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of the sources of each call of ``generate()``."""
    shapes: list[tuple[int, ...]] = []
    generate = type(v11[1]).generate

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "input_ids" in kwargs:  # the engine's; tests give the first argument
            shapes.append(tuple(kwargs["input_ids"].shape))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(v11[1]), "generate", counted)
    return shapes


@pytest.fixture
def engine(v11: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(v11[1], max_rows=8, max_waiting=64) as made:
        yield made


def busy(engine: Engine) -> Handle:
    """A request that runs until it is cancelled, so that others wait."""
    handle = engine.submit(source(), **BEAMS)
    until(lambda: engine.stats().running == 1 and not engine.stats().waiting)
    return handle


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.3},
        {"num_beams": 2, "num_return_sequences": 2, "min_new_tokens": 6, "pad_token_id": 4},
        {"num_beams": 2, "eos_token_id": None},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_each_gets_what_generate_alone_gives_it(
    engine: Engine, v11: tuple[Any, Any], calls: list[tuple[int, ...]], settings: dict[str, Any]
) -> None:
    settings = {"max_new_tokens": 20, "eos_token_id": ENDS, **settings}
    sources = [source(seed, length) for seed, length in enumerate((7, 3, 12, 1, 30, 8, 9))]
    blocking = busy(engine)
    handles = [engine.submit(ids, **settings) for ids in sources]
    calls.clear()
    blocking.cancel()
    found = [handle.result(PATIENCE_S) for handle in handles]
    together = 8 // max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    assert [rows for rows, _ in calls] == [*[together] * (7 // together), *[7 % together] * bool(7 % together)]
    wanted = [alone(v11[1], ids, **settings) for ids in sources]
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in wanted]
    assert len({rows.shape[1] for rows in wanted}) > 1 or settings["eos_token_id"] is None
    assert [handle.tokens for handle in handles] == [rows[0, 1:].tolist() for rows in wanted]


def test_other_settings_and_seeds_have_calls_of_their_own(
    engine: Engine, v11: tuple[Any, Any], calls: list[tuple[int, ...]]
) -> None:
    blocking = busy(engine)
    beams, drawn = (
        {"num_beams": 2, "max_new_tokens": 5},
        {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 6},
    )
    submitted: list[tuple[dict[str, Any], int | None]] = [
        (beams, None), (drawn, None), (drawn, 7), ({**beams, "num_beams": 3}, None), (drawn, 7), (beams, 7),
    ]  # fmt: skip
    handles = [engine.submit(source(place), seed=seed, **each) for place, (each, seed) in enumerate(submitted)]
    calls.clear()
    blocking.cancel()
    found = [handle.result(PATIENCE_S) for handle in handles]
    assert [rows for rows, _ in calls] == [2, 1, 1, 1, 1]  # beams do not draw, so a seed means nothing to them
    for place, (each, seed) in enumerate(submitted):
        if each is not drawn or seed is not None:
            assert torch.equal(found[place], alone(v11[1], source(place), seed=seed, **each))


def test_the_choice_of_tokens_is_as_fast_as_in_generate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lets a request end between steps must not put the choice of tokens into Python."""

    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tokens are chosen step by step")

    monkeypatch.setattr(decode_loop, "EagerBeamSelector", unexpected)
    assert engine.submit(source(), num_beams=2, max_new_tokens=5).result(PATIENCE_S).shape == (1, 6)


def test_one_that_leaves_gets_its_error_at_once_and_the_others_go_on(engine: Engine) -> None:
    blocking = busy(engine)
    kept = [engine.submit(source(seed), timeout=PATIENCE_S, **BEAMS) for seed in range(3)]
    blocking.cancel()
    until(lambda: engine.stats().running == 3)
    kept[0].cancel()
    with pytest.raises(RequestCancelledError):
        kept[0].result(PATIENCE_S)
    assert engine.stats().running == 2 and not kept[1].done
    kept[2]._job.deadline = 0.0
    with pytest.raises(RequestTimeoutError, match="timeout of 60 s"):
        kept[2].result(PATIENCE_S)
    assert engine.stats().running == 1 and not kept[1].done
    kept[1].cancel()
    with pytest.raises(RequestCancelledError):
        kept[1].result(PATIENCE_S)
    assert engine.submit(source(), num_beams=2, max_new_tokens=3).result(PATIENCE_S).shape == (1, 4)
    assert (engine.stats().cancelled, engine.stats().timed_out, engine.stats().completed) == (3, 1, 1)


def test_short_ones_have_their_results_before_the_longest_one_ends(engine: Engine, v11: tuple[Any, Any]) -> None:
    settings = {
        "num_beams": 2,
        "eos_token_id": ENDS,
        "early_stopping": True,
    }  # so that a limit changes nothing before it
    wanted = {seed: alone(v11[1], source(seed), max_new_tokens=60, **settings) for seed in range(30)}
    short = [seed for seed, rows in wanted.items() if rows.shape[1] < 12][:3]
    endless = 6
    assert wanted[endless].shape[1] == 61
    blocking = busy(engine)
    long = engine.submit(source(endless), max_new_tokens=5000, **settings)
    handles = [engine.submit(source(seed), max_new_tokens=5000, **settings) for seed in short]
    blocking.cancel()
    found = [handle.result(PATIENCE_S) for handle in handles]
    assert not long.done and engine.stats().running == 1
    long.cancel()
    with pytest.raises(RequestCancelledError):
        long.result(PATIENCE_S)
    assert all(torch.equal(rows, wanted[seed]) for seed, rows in zip(short, found, strict=True))


def test_an_error_ends_only_the_request_that_is_at_fault(
    engine: Engine, v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = type(v11[1]).generate

    def fails(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "input_ids" in kwargs and 149 in kwargs["input_ids"]:
            raise ZeroDivisionError("of one source")
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(v11[1]), "generate", fails)
    blocking = busy(engine)
    settings = {"num_beams": 2, "max_new_tokens": 5}
    good = [engine.submit(source(seed), **settings) for seed in range(2)]
    bad = engine.submit([5, 149], **settings)
    blocking.cancel()
    with pytest.raises(ZeroDivisionError, match="of one source"):
        bad.result(PATIENCE_S)
    found = [handle.result(PATIENCE_S) for handle in good]
    assert all(map(torch.equal, found, [alone(v11[1], source(seed), **settings) for seed in range(2)]))
    until(lambda: engine.stats().running == 0)
    assert (engine.stats().failed, engine.stats().completed) == (1, 2)


def test_closing_ends_all_that_run_together(v11: tuple[Any, Any]) -> None:
    engine = Engine(v11[1], max_rows=6)
    blocking = busy(engine)
    handles = [engine.submit(source(seed), **BEAMS) for seed in range(4)]
    blocking.cancel()
    until(lambda: engine.stats().running == 3)
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError, match="closed before"):
            handle.result(PATIENCE_S)
    assert engine.stats().failed == 4
