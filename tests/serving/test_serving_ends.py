"""How requests of the engine end other than with a result: cancelled, too late, refused, failed, or because the engine is closed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from t5_trt.errors import (
    BackendError,
    EngineClosedError,
    InputError,
    QueueFullError,
    RequestTimeoutError,
)
from t5_trt.serving import Engine, Handle
from t5_trt.serving.choice import TokenChoice
from t5_trt.serving.rows import Row
from tests.conftest import ROOT
from tests.serving_requests import LONG, PATIENCE_S, alone, source, until


@pytest.fixture
def engine(v11: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(v11[1], max_rows=4, max_waiting=8) as made:
        yield made


def steps_until_rows_are_free(engine: Engine, begin: int) -> int:
    until(lambda: engine.stats().running == 0)
    return engine.stats().steps - begin


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
    until(lambda: engine.stats().running == 4 or ("num_beams" in settings and engine.stats().running > 0))
    room = 8 - engine.stats().waiting
    waiting = [engine.submit(source(), **settings) for _ in range(room)]
    begin = time.monotonic()
    with pytest.raises(QueueFullError, match="8 requests wait"):
        engine.submit(source(), **settings)
    assert time.monotonic() - begin < 1.0 and engine.stats().refused == 1  # at once, on a machine with other work too
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
    assert not any(handle.done for handle in running)
    until(lambda: engine.stats().timed_out == 2)


def test_beams_that_wait_can_time_out_while_no_row_is_in_use(engine: Engine) -> None:
    running = engine.submit(source(), num_beams=2, **LONG)
    with pytest.raises(RequestTimeoutError):
        engine.submit(source(), timeout=0.05, num_beams=2, **LONG).result(PATIENCE_S)
    assert not running.done


def test_an_error_in_one_request_leaves_the_others_alone(
    engine: Engine, v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = TokenChoice._choose

    def failing(self: TokenChoice, logits: torch.Tensor, rows: list[Row], *rest: Any) -> None:
        if any(len(row.job.tokens) == 3 and row.job.input_ids.shape[1] == 9 for row in rows):
            raise ZeroDivisionError("of one row")
        choose(self, logits, rows, *rest)

    monkeypatch.setattr(TokenChoice, "_choose", failing)
    plain, settings = {"max_new_tokens": 40}, {"repetition_penalty": 1.3, "min_new_tokens": 9, "max_new_tokens": 40}
    good = [engine.submit(source(), **plain), engine.submit(source(), **settings)]
    bad = engine.submit(source(0, 9), **settings)
    with pytest.raises(ZeroDivisionError, match="of one row"):
        bad.result(PATIENCE_S)
    assert len(bad.tokens) == 3
    for handle, each in zip(good, (plain, settings), strict=True):
        assert torch.equal(handle.result(PATIENCE_S), alone(v11[1], source(), **each))


@pytest.mark.parametrize("method", ["encode", "step_rows"])
def test_the_engine_survives_a_failing_backend(fresh: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fails(*args: Any, **how: Any) -> Any:
        raise BackendError("out of memory")

    with Engine(fresh) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(fresh.session, method, fails)
            for handle in [engine.submit(source(seed), max_new_tokens=5) for seed in (1, 2, 3)]:
                with pytest.raises(BackendError, match="out of memory"):
                    handle.result(PATIENCE_S)
        found = engine.submit(source(), max_new_tokens=5).result(PATIENCE_S)
        assert torch.equal(found, alone(fresh, source(), max_new_tokens=5))
        assert engine.stats().failed == 3
        until(lambda: engine.stats().running == 0)


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
