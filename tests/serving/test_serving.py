"""The engine: requests share decoder steps, and each gets what `generate()` alone would give it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from t5_trt.errors import (
    RequestCancelledError,
    RequestTimeoutError,
)
from t5_trt.serving import Engine
from tests.serving_requests import LONG, PATIENCE_S, alone, drawn_settings, source, until

REQUESTS = int(os.environ.get("T5_TRT_SERVING_REQUESTS", "300"))


@pytest.fixture
def engine(v11: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(v11[1], max_rows=4, max_waiting=8) as made:
        yield made


def test_random_requests_get_the_tokens_of_generate_alone(v11: tuple[Any, Any]) -> None:
    """Mixed lengths and settings, from several event loops and threads; some clients cancel, leave or run out of time."""
    ours, chance = v11[1], random.Random(7)
    requests = [
        (source(place, chance.randint(1, 50)), drawn_settings(chance), chance.choice(("stay",) * 7 + ("cancel", "leave", "late")))
        for place in range(REQUESTS)
    ]  # fmt: skip
    found: list[Any] = [None] * REQUESTS
    left = iter(range(REQUESTS))
    engine = Engine(ours, max_rows=7, max_waiting=REQUESTS)

    async def client() -> None:
        for place in left:
            ids, settings, ending = requests[place]
            handle = engine.submit(ids, timeout=0.003 if ending == "late" else None, **settings)
            if ending == "cancel":
                await asyncio.sleep(0.005)
                handle.cancel()
            if ending == "leave":
                task = asyncio.ensure_future(handle.result())
                await asyncio.sleep(0.004)
                task.cancel()
                await asyncio.wait([task])
                found[place] = None if task.cancelled() else task.result()
                continue
            try:
                streamed = [token async for token in handle]
                found[place] = await handle.result()
                assert streamed == found[place][0, 1:].tolist()
            except (RequestCancelledError, RequestTimeoutError):
                assert ending in ("cancel", "late")

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(6)))

    threads = [threading.Thread(target=lambda: asyncio.run(clients())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S + REQUESTS)
    gc.collect()
    until(lambda: engine.stats().running == 0)
    stats = engine.stats()
    engine.close()
    assert stats.completed + stats.cancelled + stats.timed_out == REQUESTS and stats.failed == stats.waiting == 0
    assert stats.cancelled > 0 and stats.timed_out > 0
    for (ids, settings, ending), result in zip(requests, found, strict=True):
        assert result is not None or ending != "stay"
        if result is not None:
            assert torch.equal(result, alone(ours, ids, **settings)), settings


def test_every_kind_of_model_is_served(pair: tuple[Any, Any]) -> None:
    hugging_face, ours = pair
    with Engine(ours, max_rows=3) as engine:
        handles = [engine.submit(source(seed, 4 + 9 * seed), max_new_tokens=12) for seed in range(4)]
        for seed, handle in enumerate(handles):
            expected = hugging_face.generate(torch.tensor([source(seed, 4 + 9 * seed)]), max_new_tokens=12)
            assert torch.equal(handle.result(PATIENCE_S), expected)


def test_a_mask_hides_tokens(engine: Engine, v11: tuple[Any, Any]) -> None:
    inputs = {"input_ids": torch.tensor([source()]), "attention_mask": torch.tensor([[0, 1, 1, 1, 0, 1, 0]])}
    found = engine.submit(inputs, max_new_tokens=9).result(PATIENCE_S)
    assert torch.equal(found, v11[0].generate(**inputs, max_new_tokens=9))


def test_a_thread_reads_tokens_while_they_are_made(engine: Engine) -> None:
    handle = engine.submit(source(), **LONG)
    tokens = iter(handle)
    first = [next(tokens) for _ in range(3)]
    assert not handle.done and handle.tokens[:3] == first
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    handle.cancel()
    with pytest.raises(RequestCancelledError):
        list(tokens)


def test_leaving_a_stream_early_keeps_the_request(engine: Engine, v11: tuple[Any, Any]) -> None:
    async def read() -> Any:
        handle = engine.submit(source(), max_new_tokens=30)
        async for _ in handle:
            break
        with pytest.raises(TimeoutError):
            await engine.submit(source(), **LONG).result(timeout=0.01)
        return await handle.result()

    assert torch.equal(asyncio.run(read()), alone(v11[1], source(), max_new_tokens=30))


def test_short_requests_pass_a_long_one_and_beams(engine: Engine) -> None:
    long, beams = engine.submit(source(), **LONG), engine.submit(source(), num_beams=3, **LONG)
    until(lambda: engine.stats().running == 2)
    for seed in range(5):
        engine.submit(source(seed), max_new_tokens=5).result(PATIENCE_S)
    assert not long.done and not beams.done


def test_rows_do_not_wait_for_many_sources_at_once(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, calls = fresh.session, []
    encode, step = session.encode, session.step_rows
    monkeypatch.setattr(session, "encode", lambda ids, *rest: calls.append(tuple(ids.shape)) or encode(ids, *rest))
    monkeypatch.setattr(session, "step_rows", lambda rows, **how: calls.append("step") or step(rows, **how))
    monkeypatch.setattr("t5_trt.serving.scheduler.ENCODED_TOKENS", 40)
    with Engine(fresh, max_rows=8) as engine:
        first = engine.submit(source(), **LONG)
        until(lambda: "step" in calls)
        handles = [
            engine.submit(source(seed, length), max_new_tokens=9) for seed, length in enumerate((50, 20, 20, 20))
        ]
        for handle in handles:
            handle.result(PATIENCE_S)
        del first
    sizes = [call for call in calls if call != "step"]
    assert all(rows * length <= 40 or rows == 1 for rows, length in sizes) and sum(rows for rows, _ in sizes) == 5
    assert not [pair for pair in pairwise(calls) if "step" not in pair]


def test_waiting_requests_are_encoded_with_the_one_that_a_row_is_free_for(
    fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, sizes = fresh.session, []
    encode = session.encode
    monkeypatch.setattr(session, "encode", lambda ids, *rest: sizes.append(tuple(ids.shape)) or encode(ids, *rest))
    with Engine(fresh, max_rows=4) as engine:
        long = [engine.submit(source(seed), **LONG) for seed in range(4)]
        until(lambda: engine.stats().running == 4)
        handles = [engine.submit(source(seed, 9), max_new_tokens=5) for seed in range(5)]
        sizes.clear()
        long[0].cancel()
        results = [handle.result(PATIENCE_S) for handle in handles]
        assert not any(handle.done for handle in long[1:])
    assert sizes == [(3, 9), (2, 9)]  # for one row and half of four
    for seed, found in enumerate(results):
        assert torch.equal(found, alone(fresh, source(seed, 9), max_new_tokens=5))


def test_draws_leave_the_global_generators_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    seeded: list[int] = []  # all GPUs of the process
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.random.get_rng_state()
    for settings in ({}, {"num_beams": 2}):
        engine.submit(source(), do_sample=True, seed=3, max_new_tokens=5, **settings).result(PATIENCE_S)
    assert torch.equal(torch.random.get_rng_state(), before) and not seeded


def test_a_handle_knows_its_times_and_the_tokens_that_end_it(engine: Engine) -> None:
    handle = engine.submit(source(), max_new_tokens=30, min_new_tokens=30, eos_token_id=[1, 5])
    assert handle.end_tokens == {1, 5}
    handle.result(PATIENCE_S)
    times = handle.times
    assert times.first_token is not None and times.end is not None
    assert times.submitted < times.first_token < times.end


def test_tokens_after_a_number_come_together(engine: Engine) -> None:
    async def read() -> tuple[list[list[int]], list[int]]:
        handle = engine.submit(source(), max_new_tokens=30, min_new_tokens=30)
        await handle.result()
        found = [await handle.tokens_after(count) for count in (0, 12, 30)]
        return found, handle.tokens

    found, tokens = asyncio.run(read())
    assert found == [tokens, tokens[12:], []]


def test_tokens_that_came_before_an_error_are_read_first(engine: Engine) -> None:
    async def read() -> None:
        handle = engine.submit(source(), timeout=0.1, **LONG)
        while not handle.done:
            await asyncio.sleep(0.01)
        assert await handle.tokens_after(0) == handle.tokens != []
        with pytest.raises(RequestTimeoutError):
            await handle.tokens_after(len(handle.tokens))

    asyncio.run(read())
