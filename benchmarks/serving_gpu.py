"""The engine of serving against static batches on an NVIDIA GPU: tokens per second, and the time to the first token.

    python -m benchmarks.serving_gpu --out FOLDER [--backends cuda] [--clients 64,256] [--lengths uniform,skewed] [--searches greedy,sampled]

T5-base shapes with random weights, fp16. Requests of 16 to 512 source and 16 to 256 new tokens arrive as a Poisson process; lengths are
drawn evenly, or evenly in their logarithms ("skewed": many short ones, few long ones); `SEARCHES` has the ways to choose tokens. As many
clients are served at a time as the engine has rows. Static batches take requests in the order of their arrival, as many as wait and at most
as many as there are rows, and `generate()` makes each batch's longest output. Both get the same arrivals: first more than they can serve,
which gives tokens per second (those that were asked for), then 0.7 times what the engine can serve, which gives waiting times. Rounds take
turns; medians count.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import kernel_models
from benchmarks.kernel_models import attempt, base_name, keep, named_backends, open_model, t5_base
from t5_trt.runtime.cuda_session import CudaSession
from t5_trt.runtime.row_sources import common_size, encode_in_turn
from t5_trt.serving import Engine
from t5_trt.tools.records import Record

SOURCE, NEW = (16, 512), (16, 256)
#: settings of ``generate()`` by the way to choose tokens
SEARCHES: dict[str, Record] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 50},
    "penalty": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}
#: requests of a run, for each client
PER_CLIENT = 6
#: runs of the engine before it is measured
WARM_UPS = 4
#: arrivals, as a multiple of the requests that the engine can serve
CROWDED, EASY = 1.5, 0.7


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the beginning, its source int64 [1, S], and its number of new tokens."""

    at: float
    ids: torch.Tensor
    new: int


@dataclass
class Run:
    """What became of the requests of a run; times in seconds.

    Attributes:
        wall: from the first arrival to the last token.
        first: of each request from its arrival to its first token that could be read.
        whole: and to its last one.
        tokens: new ones of each request.
        steps: of the engine.
    """

    wall: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    steps: int = 0

    def rate(self, arrivals: Sequence[Arrival]) -> float:
        """Tokens per second that were asked for."""
        return sum(arrival.new for arrival in arrivals) / self.wall

    def waits(self) -> Record:
        """Percentiles in milliseconds."""
        found = {}
        for name, seconds in (("first_token_ms", self.first), ("whole_ms", self.whole)):
            twentieths = statistics.quantiles(seconds, n=20)
            found[name] = {"p50": round(twentieths[9] * 1e3, 1), "p95": round(twentieths[18] * 1e3, 1)}
        return found


def arrivals(count: int, rate: float, lengths: str, seed: int) -> list[Arrival]:
    """So many requests; those of one seed differ in their times only."""
    chance, gaps, at = random.Random(seed), random.Random(seed + 1), 0.0
    made = []
    for _ in range(count):
        at += gaps.expovariate(rate)
        source, new = (drawn(chance, bounds, lengths) for bounds in (SOURCE, NEW))
        made.append(Arrival(at, torch.tensor([[chance.randrange(2, 32000) for _ in range(source)]]), new))
    return made


def drawn(chance: random.Random, bounds: tuple[int, int], lengths: str) -> int:
    """A length."""
    if lengths == "uniform":
        return chance.randint(*bounds)
    return round(math.exp(chance.uniform(math.log(bounds[0]), math.log(bounds[1]))))


def served(engine: Engine, requests: Sequence[Arrival], search: Record) -> Run:
    """The engine's run."""
    run, before = Run(), engine.stats().steps

    async def client(place: int, begin: float) -> None:
        arrival = requests[place]
        handle = engine.submit(arrival.ids, max_new_tokens=arrival.new, **search)
        async for _ in handle:  # all others are read at the end
            run.first.append(time.perf_counter() - begin - arrival.at)
            break
        made = await handle.result()
        run.whole.append(time.perf_counter() - begin - arrival.at)
        run.tokens[place] = made[0, 1:].tolist()

    async def all_of_them() -> None:
        begin, tasks = time.perf_counter(), []
        for place, arrival in enumerate(requests):
            delay = begin + arrival.at - time.perf_counter()
            if delay > 0 or place % 16 == 0:
                await asyncio.sleep(max(delay, 0))
            tasks.append(asyncio.ensure_future(client(place, begin)))
        await asyncio.gather(*tasks)
        run.wall = time.perf_counter() - begin - requests[0].at

    asyncio.run(all_of_them())
    run.steps = engine.stats().steps - before
    return run


def in_batches(model: Any, requests: Sequence[Arrival], rows: int, search: Record) -> Run:
    """The static batches' run. The first token of a request that can be read is there with its last one."""
    run, begin, place = Run(), time.perf_counter(), 0
    while place < len(requests):
        time.sleep(max(begin + requests[place].at - time.perf_counter(), 0))
        now = time.perf_counter() - begin
        batch = [arrival for arrival in requests[place : place + rows] if arrival.at <= now]
        ids = torch.zeros((len(batch), max(arrival.ids.shape[1] for arrival in batch)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, arrival in enumerate(batch):
            length = arrival.ids.shape[1]
            ids[row, :length], mask[row, :length] = arrival.ids[0], 1
        inputs = kernel_models.on_device({"input_ids": ids, "attention_mask": mask})
        longest = max(arrival.new for arrival in batch)
        made = model.generate(**inputs, max_new_tokens=longest, **search).tolist()
        end = time.perf_counter() - begin
        for row, arrival in enumerate(batch):
            run.whole.append(end - arrival.at)
            run.tokens[place + row] = made[row][1 : 1 + arrival.new]
        place += len(batch)
    run.first = run.whole
    run.wall = time.perf_counter() - begin - requests[0].at
    return run


def measure(model: Any, clients: int, lengths: str, rounds: int, per_client: int, search: Record) -> Record:
    """One case."""
    count = per_client * clients
    with Engine(model, max_rows=clients, max_waiting=count) as engine:
        ways: dict[str, Callable[[Sequence[Arrival]], Run]] = {
            "engine": lambda requests: served(engine, requests, search),
            "static": lambda requests: in_batches(model, requests, clients, search),
        }
        for seed in range(clients, clients + WARM_UPS):  # captures: sizes of encoders are captured when they come again
            crowd = arrivals(count, 1e6, lengths, seed)
            ways["engine"](crowd)
        ways["static"](crowd)
        capacity = count / ways["engine"](crowd).wall
        # few sources at a time have sizes of their own
        ways["engine"](arrivals(count, EASY * capacity, lengths, clients))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        found: Record = {"capacity_requests_per_s": round(capacity, 1)}
        for number in range(rounds):
            requests = arrivals(count, CROWDED * capacity, lengths, clients + 10 * number)
            runs = {name: way(requests) for name, way in ways.items()}
            for name, run in runs.items():
                rates[name].append(run.rate(requests))
        steps = runs["engine"].steps
        found |= {"requests": count, "step_ms": round(runs["engine"].wall / steps * 1e3, 3)}
        if not search.get("do_sample"):  # draws differ
            equal = sum(runs["engine"].tokens[place] == runs["static"].tokens[place] for place in range(count))
            found["equal_requests"] = equal
        found["rows_in_use"] = round(sum(arrival.new for arrival in requests) / steps, 1)
        easy = arrivals(count, EASY * capacity, lengths, clients)
        for name, way in ways.items():
            found[name] = {"tokens_per_s": round(statistics.median(rates[name])), **way(easy).waits()}
    found["ratio"] = round(found["engine"]["tokens_per_s"] / found["static"]["tokens_per_s"], 2)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; the status is 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--backends", default="cuda", help="comma-separated; those whose step the kernels do")
    parser.add_argument("--clients", default="64,256", help="comma-separated numbers, also of rows")
    parser.add_argument("--lengths", default="uniform,skewed", help="comma-separated ways to draw them")
    parser.add_argument("--searches", default="greedy", help=f"comma-separated, of {', '.join(SEARCHES)}")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=PER_CLIENT, help="requests of a run, for each client")
    parser.add_argument("--seconds", type=float, default=100.0, help="after which no further case begins")
    parser.add_argument("--store", type=Path, default=Path("/var/tmp/t5_trt-kernel-engines"), help="of kernels")
    parser.add_argument("--in-turn", action="store_true", help="encode in the stream of the steps, to compare")
    given = parser.parse_args(arguments)
    if given.in_turn:
        CudaSession.batch_size = staticmethod(common_size)  # type: ignore[assignment]
        CudaSession.encode_rows = partialmethod(encode_in_turn, size=common_size)  # type: ignore[assignment, method-assign]
    end, failed, hugging_face = time.monotonic() + given.seconds, False, t5_base(given.layers)
    for backend in named_backends(given.backends):
        model = open_model(backend, hugging_face, "fp16", given.store)
        model.generation_config.eos_token_id = None  # every request makes all of its tokens
        for lengths in given.lengths.split(","):
            cases = [(n, way) for n in map(int, given.clients.split(",")) for way in given.searches.split(",")]
            for clients, way in cases:
                if time.monotonic() > end:
                    print(f"{backend}, {lengths}, {clients} clients, {way}: no time left", flush=True)
                    continue
                found: Record = {"model": base_name(given.layers), "precision": "fp16", "backend": backend}
                stage = f"{lengths} lengths" + ("" if way == "greedy" else f", {way}")
                found |= {"batch": clients, "stage": stage, "source_tokens": SOURCE, "new_tokens": NEW}
                case = partial(measure, model, clients, lengths, given.rounds, given.per_client, SEARCHES[way])
                attempt(found, "serving", case)
                keep(given.out, "serving", [found], backend)
                print(summary(found), flush=True)
                failed |= "failed" in found
                gc.collect()
    sys.exit(1 if failed else 0)


def summary(found: Record) -> str:
    """One line for a terminal."""
    case = f"{found['backend']:16} {found['batch']} clients, {found['stage']}"
    if "serving" not in found:
        return f"{case}: failed"
    made = found["serving"]
    engine, static = made["engine"], made["static"]
    return (
        f"{case}: engine {engine['tokens_per_s']} tokens/s, static batches {static['tokens_per_s']}, ratio {made['ratio']}; first token "
        f"p50 {engine['first_token_ms']['p50']} p95 {engine['first_token_ms']['p95']} ms (static {static['first_token_ms']['p50']}, "
        f"{static['first_token_ms']['p95']}), step {made['step_ms']} ms of {made['rows_in_use']} rows, "
        f"{made.get('equal_requests', 'draws')} of {made['requests']} equal"
    )


if __name__ == "__main__":
    main()
