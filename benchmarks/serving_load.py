"""The engine under load on a CPU: short requests beside a long one, and more requests than it can serve.

    python -m benchmarks.serving_load examples/kana_romaji

Prints how long short requests take, alone and beside long ones (one request of the longest source after the other), and what becomes of an
open loop with Poisson arrivals at 1.5 times the rate that 64 clients reach.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import QueueFullError
from t5_trt.serving import Engine
from t5_trt.tools.environment import environment
from t5_trt.tools.records import Record

#: source and new tokens
SHORT, LONG = (12, 12), (256, 95)
#: with short requests
CLIENTS = 7
#: seconds before a load is measured: rows and queue are as full then as they stay
LOAD_S = 1.5
#: by which rates of equal runs differ
NOISE = 0.05


async def ask(engine: Engine, chance: random.Random, size: tuple[int, int], **settings: Any) -> float:
    """Seconds of one request that makes all of its tokens."""
    source = [chance.randrange(2, 500) for _ in range(size[0])]
    begin = time.perf_counter()
    await engine.submit(source, max_new_tokens=size[1], min_new_tokens=size[1], **settings).result()
    return time.perf_counter() - begin


async def short_ones(engine: Engine, clients: int, requests: int, long_settings: dict[str, Any] | None) -> list[float]:
    """Seconds of short requests, beside long ones if those have settings."""
    chance, waits = random.Random(0), []

    async def client() -> None:
        for _ in range(requests):
            waits.append(await ask(engine, chance, SHORT))

    async def long_client() -> None:
        while True:
            await ask(engine, chance, LONG, **(long_settings or {}))

    long = None if long_settings is None else asyncio.ensure_future(long_client())
    await asyncio.gather(*(client() for _ in range(clients)))
    if long is not None:
        long.cancel()
        with suppress(asyncio.CancelledError):
            await long
    return waits


class Load:
    """Requests of 4 to 64 source and new tokens, drawn beforehand, and those that end in a window.

    Args:
        engine: that serves them.
        seconds: of the window, which begins `LOAD_S` after the first request.
    """

    def __init__(self, engine: Engine, seconds: float) -> None:
        chance = random.Random(1)
        sizes = [(chance.randint(4, 64), chance.randint(4, 64)) for _ in range(2000)]
        drawn = [([chance.randrange(2, 500) for _ in range(source)], new) for source, new in sizes]
        self._engine, self._requests, self._seconds = engine, cycle(drawn), seconds
        self._begin = time.perf_counter() + LOAD_S
        self.end = self._begin + seconds
        self._done = 0
        self.refusals: list[float] = []  # seconds that they took

    async def ask(self) -> None:
        """One request."""
        (source, new), begin = next(self._requests), time.perf_counter()
        try:
            await self._engine.submit(source, max_new_tokens=new, min_new_tokens=new).result()
        except QueueFullError:
            self.refusals.append(time.perf_counter() - begin)
        else:
            self._done += self._begin <= time.perf_counter() < self.end

    @property
    def rate(self) -> float:
        """Requests per second that ended with a result in the window."""
        return self._done / self._seconds


async def arrivals(load: Load, rate: float, come: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Have clients come by a Poisson process until a load's end, and wait for all of them."""
    gaps, tasks = random.Random(2), set()
    upcoming = time.perf_counter()
    while upcoming < load.end:
        upcoming += gaps.expovariate(rate)
        await asyncio.sleep(max(upcoming - time.perf_counter(), 0))
        task = asyncio.ensure_future(come())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def closed_loop(engine: Engine, clients: int, seconds: float, idle_rate: float = 0.0) -> float:
    """Requests per second of clients that wait for their answers, beside so many arrivals per second that ask for nothing."""
    load = Load(engine, seconds)

    async def client() -> None:
        while time.perf_counter() < load.end:
            await load.ask()

    async def nothing() -> None:
        pass

    beside = [arrivals(load, idle_rate, nothing)] if idle_rate else []
    await asyncio.gather(*(client() for _ in range(clients)), *beside)
    return load.rate


async def open_loop(engine: Engine, rate: float, seconds: float) -> tuple[float, int, float]:
    """Requests per second that end, refused ones, and the longest time that a refusal took, of Poisson arrivals."""
    load = Load(engine, seconds)
    await arrivals(load, rate, load.ask)
    return load.rate, len(load.refusals), max(load.refusals, default=0.0)


async def steps_after_leaving(engine: Engine, requests: int) -> int:
    """Decoder steps that are made after all clients of running and waiting requests have left at the same time."""
    chance = random.Random(3)
    tasks = [asyncio.ensure_future(ask(engine, chance, LONG)) for _ in range(requests)]
    before = engine.stats().steps
    while engine.stats().steps < before + 5:
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    left = engine.stats().steps
    while (stats := engine.stats()).running or stats.waiting:
        await asyncio.sleep(0.001)
    return engine.stats().steps - left


@dataclass(frozen=True)
class Bound:
    """A number that was measured and the largest, or with `at_least` the smallest, that it may be."""

    what: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is within."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        word = "at least" if self.at_least else "at most"
        return f"{'yes' if self.holds else 'NO '} {self.what}: {self.found:.3g}, {word} {self.bound:g}"


def measure_waits(engine: Engine, requests: int, rounds: int) -> tuple[Record, list[Bound]]:
    """Times of short requests, alone and beside others, in turns."""
    kinds: dict[str, dict[str, Any] | None] = {
        "alone": None,
        "beside a long one": {},
        "beside 4 beams": {"num_beams": 4},
    }
    asyncio.run(short_ones(engine, CLIENTS, requests, {}))
    waits: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, settings in kinds.items():
            waits[name] += asyncio.run(short_ones(engine, CLIENTS, requests, settings))
    twentieths = {name: statistics.quantiles(found, n=20) for name, found in waits.items()}
    found = {name: {"p50_ms": each[9] * 1e3, "p95_ms": each[18] * 1e3} for name, each in twentieths.items()}
    ratio = twentieths["beside a long one"][18] / twentieths["alone"][18]
    return {"short": found}, [Bound("p95 of short requests beside a long one, to that alone", ratio, 1.5)]


def measure_load(engine: Engine, seconds: float, rounds: int) -> tuple[Record, list[Bound]]:
    """What 64 clients get, and what becomes of more arrivals, in turns; medians count."""
    arriving = 1.5 * asyncio.run(closed_loop(engine, 64, seconds))
    capacities, rates, refused, longest = [], [], 0, 0.0
    for _ in range(rounds):  # both pay for the arrivals, which take a part of the cores
        capacities.append(asyncio.run(closed_loop(engine, 64, seconds, arriving)))
        rate, refusals, slowest = asyncio.run(open_loop(engine, arriving, seconds))
        rates.append(rate)
        refused, longest = refused + refusals, max(longest, slowest)
    found = {"capacity_requests_per_s": capacities, "open_loop_requests_per_s": rates, "refused": refused}
    ratio = statistics.median(rates) / statistics.median(capacities)
    return {**found, "longest_refusal_ms": longest * 1e3}, [
        Bound("requests per second at 1.5 times capacity, to capacity", ratio, 1 - NOISE, at_least=True),
        Bound("refused requests", refused, 1, at_least=True),
        Bound("longest refusal, ms", longest * 1e3, 50.0),
    ]


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each loop")
    parser.add_argument("--requests", type=int, default=20, help="short ones of each client in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="file to write the record to")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = TRTT5ForConditionalGeneration.from_pretrained(given.model, backend="onnxruntime", num_threads=given.threads)
    with Engine(model, max_rows=given.rows, max_waiting=64) as engine:
        record, bounds = measure_waits(engine, given.requests, given.rounds)
        more, loaded = measure_load(engine, given.seconds, given.rounds)
        steps = max(asyncio.run(steps_after_leaving(engine, 2 * given.rows)) for _ in range(given.rounds))
    bounds += [*loaded, Bound("steps for clients that have left", steps, 2)]
    record |= {"model": Path(given.model).name, "rows": given.rows, "threads": given.threads, **more, **environment()}
    record["bounds"] = [{**vars(bound), "holds": bound.holds} for bound in bounds]
    print(json.dumps(record, indent=1), *bounds, sep="\n")
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(bound.holds for bound in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
