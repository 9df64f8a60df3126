"""The engine: requests share decoder steps, and each gets what `generate()` alone would give it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from t5_trt.errors import (
    BackendError,
    EngineClosedError,
    InputError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from t5_trt.serving import Engine, Handle
from t5_trt.serving.rows import Row
from tests.conftest import ROOT
from tests.tiny_models import VOCAB

REQUESTS = int(os.environ.get("T5_TRT_SERVING_REQUESTS", "300"))
PATIENCE_S = 60
LONG = {"max_new_tokens": 5000, "min_new_tokens": 5000}


@pytest.fixture
def engine(v11: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(v11[1], max_rows=4, max_waiting=8) as made:
        yield made


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


def steps_until_rows_are_free(engine: Engine, begin: int) -> int:
    until(lambda: engine.stats().running == 0)
    return engine.stats().steps - begin


def drawn_settings(chance: random.Random) -> dict[str, Any]:
    """Settings of one request."""
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
        settings["eos_token_id"] = [1, chance.randrange(2, VOCAB)]
    return settings


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
    stock, ours = pair
    with Engine(ours, max_rows=3) as engine:
        handles = [engine.submit(source(seed, 4 + 9 * seed), max_new_tokens=12) for seed in range(4)]
        for seed, handle in enumerate(handles):
            expected = stock.generate(torch.tensor([source(seed, 4 + 9 * seed)]), max_new_tokens=12)
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


@pytest.mark.parametrize("way", ["cancel", "drop", "task", "timeout"])
def test_a_request_that_nobody_waits_for_frees_its_row_within_two_steps(engine: Engine, way: str) -> None:
    timeout = 0.1 if way == "timeout" else None
    kept: list[Handle | None] = [engine.submit(source(), timeout=timeout, **LONG)]
    handle = kept[0]
    assert handle is not None
    if way == "task":
        del handle

        async def leave() -> int:
            task = asyncio.ensure_future(kept[0].result())  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.sleep(0)
            return engine.stats().steps

        begin = asyncio.run(leave())
        assert kept[0] is not None
    else:
        until(lambda: engine.stats().steps > 3)
        begin = engine.stats().steps
        if way == "cancel":
            handle.cancel()
        elif way == "timeout":
            with pytest.raises(RequestTimeoutError, match=r"timeout of 0\.1 s"):
                handle.result(PATIENCE_S)
            begin = engine.stats().steps
        del handle
        if way == "drop":
            begin = engine.stats().steps
            kept.clear()
    assert steps_until_rows_are_free(engine, begin) <= 2


@pytest.mark.parametrize("settings", [LONG, {**LONG, "num_beams": 2}])
def test_too_many_requests_are_refused_at_once(engine: Engine, settings: dict[str, Any]) -> None:
    running = [engine.submit(source(), **settings) for _ in range(4)]
    until(lambda: engine.stats().running == (1 if "num_beams" in settings else 4))
    room = 8 - engine.stats().waiting
    waiting = [engine.submit(source(), **settings) for _ in range(room)]
    begin = time.monotonic()
    with pytest.raises(QueueFullError, match="8 requests wait"):
        engine.submit(source(), **settings)
    assert time.monotonic() - begin < 0.1 and engine.stats().refused == 1
    waiting.pop().cancel()  # what was cancelled takes no place
    waiting.append(engine.submit(source(), max_new_tokens=1))
    for handle in (*running, *waiting[:-1]):
        handle.cancel()
    waiting[-1].result(PATIENCE_S)


def test_a_request_that_waits_can_time_out(engine: Engine) -> None:
    running = [engine.submit(source(), **LONG) for _ in range(4)]
    with pytest.raises(RequestTimeoutError):
        engine.submit(source(), timeout=0.05, max_new_tokens=5).result(PATIENCE_S)
    with pytest.raises(RequestTimeoutError):
        engine.submit(source(), timeout=0.05, num_beams=2, **LONG).result(PATIENCE_S)
    assert not any(handle.done for handle in running) and engine.stats().timed_out == 2


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
    monkeypatch.setattr(session, "step_rows", lambda rows: calls.append("step") or step(rows))
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


def test_an_error_in_one_request_leaves_the_others_alone(
    engine: Engine, v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Row.choose

    def failing(row: Row, logits: torch.Tensor) -> int:
        if len(row.job.tokens) == 3:
            raise ZeroDivisionError("of one row")
        return choose(row, logits)

    monkeypatch.setattr(Row, "choose", failing)
    good = engine.submit(source(), max_new_tokens=40)
    bad = engine.submit(source(), repetition_penalty=1.3, min_new_tokens=9, max_new_tokens=40)
    with pytest.raises(ZeroDivisionError, match="of one row"):
        bad.result(PATIENCE_S)
    assert len(bad.tokens) == 3
    assert torch.equal(good.result(PATIENCE_S), alone(v11[1], source(), max_new_tokens=40))


@pytest.mark.parametrize("method", ["encode", "step_rows"])
def test_the_engine_survives_a_failing_backend(fresh: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fails(*args: Any) -> Any:
        raise BackendError("out of memory")

    with Engine(fresh) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(fresh.session, method, fails)
            for handle in [engine.submit(source(), max_new_tokens=5) for _ in range(3)]:
                with pytest.raises(BackendError, match="out of memory"):
                    handle.result(PATIENCE_S)
        found = engine.submit(source(), max_new_tokens=5).result(PATIENCE_S)
        assert torch.equal(found, alone(fresh, source(), max_new_tokens=5))
        assert engine.stats().failed == 3 and engine.stats().running == 0


def test_closing_ends_what_runs_and_what_waits(v11: tuple[Any, Any]) -> None:
    engine = Engine(v11[1], max_rows=2)
    handles = [engine.submit(source(), **LONG, num_beams=beams) for beams in (1, 1, 1, 2, 2)]
    until(lambda: engine.stats().running == 3)
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError, match="closed before"):
            handle.result(PATIENCE_S)
    with pytest.raises(EngineClosedError, match="Make another"):
        engine.submit(source())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("t5_trt")]


def test_closing_with_grace_lets_requests_end(v11: tuple[Any, Any]) -> None:
    engine = Engine(v11[1], max_rows=1)
    handles = [engine.submit(source(seed), max_new_tokens=20) for seed in range(3)]
    engine.close(grace=PATIENCE_S)
    assert all(handle.done for handle in handles) and engine.stats().completed == 3
    engine.close()


def test_an_engine_that_nobody_holds_ends_its_threads(v11: tuple[Any, Any]) -> None:
    engine = Engine(v11[1])
    handle = engine.submit(source(), **LONG)
    del engine
    with pytest.raises(EngineClosedError):
        handle.result(PATIENCE_S)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("t5_trt")])


def test_draws_leave_the_global_generator_alone(engine: Engine) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for settings in ({}, {"num_beams": 2}):
        engine.submit(source(), do_sample=True, seed=3, max_new_tokens=5, **settings).result(PATIENCE_S)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_longer_targets_than_the_model_takes_fail_alone(v11: tuple[Any, Any]) -> None:
    from t5_trt import TRTT5ForConditionalGeneration

    limited = TRTT5ForConditionalGeneration.from_model(v11[0], max_target_tokens=6, max_source_tokens=20, num_threads=1)
    with Engine(limited) as engine:
        good, bad = engine.submit(source(), max_new_tokens=6), engine.submit(source(), **LONG)
        assert good.result(PATIENCE_S).shape[1] <= 7
        with pytest.raises(InputError, match="max_target_tokens"):
            bad.result(PATIENCE_S)
        with pytest.raises(InputError, match="max_source_tokens"):
            engine.submit(source(0, 21))


def test_a_forked_process_is_told_to_make_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(EngineClosedError, match="another process"):
            engine.submit(source())


def test_a_process_can_end_while_requests_run() -> None:
    code = (
        "from tests.conftest import pair_of\n"
        "from t5_trt.serving import Engine\n"
        "engine, long = Engine(pair_of('t5-v1.1')[1]), {'max_new_tokens': 5000, 'min_new_tokens': 5000}\n"
        "handles = [engine.submit([5, 6, 7], num_beams=beams, **long) for beams in (1, 1, 2)]\n"
        "print(next(iter(handles[0])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0 and ran.stdout.strip().isdigit(), ran.stderr
