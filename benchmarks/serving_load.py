"""The engine under load on a CPU: short requests beside a long one, and more requests than it can serve.

    python -m benchmarks.serving_load examples/kana_romaji

Prints how long short requests take, alone and beside long ones (one request of the longest source after the other), and what becomes of an
open loop with Poisson arrivals at 1.5 times the rate that 64 clients reach.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import QueueFullError
from t5_trt.serving import Engine

#: source and new tokens
SHORT, LONG = (12, 12), (256, 95)


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


async def closed_loop(engine: Engine, clients: int, seconds: float) -> float:
    """Requests per second of clients that wait for their answers."""
    chance, done, end = random.Random(1), 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await ask(engine, chance, (chance.randint(4, 64), chance.randint(4, 64)))
            done += 1

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - begin)


async def open_loop(engine: Engine, rate: float, seconds: float) -> tuple[float, int, float]:
    """Requests per second that end, refused ones, and the longest time that a refusal took, of Poisson arrivals."""
    chance, refusals, done = random.Random(2), [], 0
    tasks = set()

    async def client() -> None:
        nonlocal done
        begin = time.perf_counter()
        try:
            await ask(engine, chance, (chance.randint(4, 64), chance.randint(4, 64)))
            done += 1
        except QueueFullError:
            refusals.append(time.perf_counter() - begin)

    begin = upcoming = time.perf_counter()
    while upcoming < begin + seconds:
        upcoming += chance.expovariate(rate)
        await asyncio.sleep(max(upcoming - time.perf_counter(), 0))
        tasks.add(asyncio.ensure_future(client()))
    await asyncio.gather(*tasks)
    return done / (time.perf_counter() - begin), len(refusals), max(refusals, default=0.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = TRTT5ForConditionalGeneration.from_pretrained(given.model, backend="onnxruntime", num_threads=given.threads)
    kinds: dict[str, dict[str, Any] | None] = {
        "alone": None,
        "beside a long one": {},
        "beside 4 beams": {"num_beams": 4},
    }
    with Engine(model, max_rows=given.rows, max_waiting=64) as engine:
        asyncio.run(short_ones(engine, 7, 20, {}))
        waits: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(4):
            for name, settings in kinds.items():
                waits[name] += asyncio.run(short_ones(engine, 7, 20, settings))
        base = statistics.quantiles(waits["alone"], n=20)[18]
        for name, found in waits.items():
            tenths = statistics.quantiles(found, n=20)
            print(
                f"short {name:18} p50 {tenths[9] * 1e3:.0f} ms, p95 {tenths[18] * 1e3:.0f} ms ({tenths[18] / base:.2f})"
            )
        capacity = asyncio.run(closed_loop(engine, 64, given.seconds))
        rate, refused, longest = asyncio.run(open_loop(engine, 1.5 * capacity, given.seconds))
        print(f"64 clients {capacity:.1f} requests/s; open loop at 1.5 times that: {rate:.1f} requests/s ({rate / capacity:.2f}), "
              f"{refused} refused, each within {longest * 1e3:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
