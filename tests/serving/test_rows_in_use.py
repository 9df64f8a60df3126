"""Rows between requests: places that stay, and how clients learn of what a step made."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.serving import Engine, running
from t5_trt.serving.handle import Job, Wakes
from tests.serving_requests import LONG, PATIENCE_S, alone, source, until


def test_a_request_takes_a_place_that_has_stayed(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "VACANT_STEPS", 10**6)  # however long clients take to ask again
    moves: list[tuple[int, int]] = []
    move = RowBuffers._move
    monkeypatch.setattr(RowBuffers, "_move", lambda rows, last, row: moves.append((last, row)) or move(rows, last, row))
    with Engine(v11[1], max_rows=4) as engine:
        first = [engine.submit(source(seed), max_new_tokens=6 + 3 * seed) for seed in range(3)]
        long = engine.submit(source(9), **LONG)
        for turn in range(4):
            for seed, handle in enumerate(first):
                assert torch.equal(handle.result(PATIENCE_S), alone(v11[1], source(seed), max_new_tokens=6 + 3 * seed))
                first[seed] = engine.submit(source(seed), max_new_tokens=6 + 3 * seed)
            assert len(long.tokens) > turn and not long.done
        long.cancel()
    assert not moves


def test_places_that_nobody_takes_are_closed(v11: tuple[Any, Any]) -> None:
    with Engine(v11[1], max_rows=4) as engine:
        first = engine.submit(source(1), max_new_tokens=5)
        long = [engine.submit(source(seed), **LONG) for seed in range(2)]
        assert torch.equal(first.result(PATIENCE_S), alone(v11[1], source(1), max_new_tokens=5))
        rows = engine._scheduler._running
        until(lambda: len(rows.rows) == 2)
        assert not any(row.vacant for row in rows.rows)
        for handle in long:
            handle.cancel()


def test_an_event_loop_is_woken_once_for_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def woken() -> int:
        loop, calls, wakes = asyncio.get_running_loop(), [], Wakes()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: calls.append(given) or call(*given))
        jobs = [Job(torch.ones(1, 1), torch.ones(1, 1), None, None, None) for _ in range(5)]  # type: ignore[arg-type]
        waiting = [asyncio.ensure_future(job.wait_async(None, None)) for job in jobs]
        await asyncio.sleep(0)
        for job in jobs:
            job.finish(torch.ones(1, 1), wakes=wakes)
        assert not calls
        wakes.send()
        assert await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE_S) == [True] * 5
        return len(calls)

    assert asyncio.run(woken()) == 1
