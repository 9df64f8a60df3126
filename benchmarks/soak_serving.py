"""Send mixed requests to one engine, directly and over HTTP: every result stays right, rows get free, memory stays flat.

    python -m benchmarks soak_serving --requests 2000
    python -m benchmarks soak_serving --minutes 30 --cores 0.5 --json FILE

Lengths, settings (greedy, processors, sampling with seeds, beams) and the ends of clients are random: some cancel, leave, drop their
handle, are too late, or close their connection, also in the middle of a stream. Requests come in rounds, more at a time than may wait.
After each round the engine must be idle within a bound, and every result that a client got is compared with that of ``generate()`` alone.
The first tenth of the rounds is warm-up; from then on nothing may grow. The exit status is 1 if anything is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psutil
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks import soak
from benchmarks.soak_clients import Asked, come, drawn
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.server import Server
from t5_trt.serving.http.service import Service
from t5_trt.tools.environment import environment
from tests.http_server import Client, serving
from tests.serving_requests import alone, until

#: requests of a round; of the engine fewer run and wait at a time, so that some are refused and come again
ROUND, ROWS, WAITING = 40, 8, 12
HTTP_CLIENTS = 8


@dataclass
class Seen(soak.Soak):
    """What a run has seen."""

    refused: int = 0
    largest_round_s: float = 0.0
    steps: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # of the engine's requests

    def thirds(self) -> list[float]:
        """Mean resident memory in the first and the last third after the warm-up, in 10**6 bytes."""
        steady = [usage.resident_mb for usage in self.usage[self.warm :]]
        third = max(len(steady) // 3, 1)
        return [round(statistics.mean(part), 2) for part in (steady[:third], steady[-third:]) if part]


class Run:
    """Rounds of requests to one service.

    Args:
        service: whose server runs.
        server: that.
        client: of it.
        tokenizer: of the model.
        lines: of texts.
        seed: of all that is drawn.
    """

    def __init__(
        self, service: Service, server: Server, client: Client, tokenizer: Any, lines: list[str], seed: int
    ) -> None:
        self._service, self._server, self._client = service, server, client
        self._tokenizer, self._lines = tokenizer, lines
        self._chance, self._threads = random.Random(seed), ThreadPoolExecutor(HTTP_CLIENTS)
        # a pool starts a thread only when all others are busy, which may be after the warm-up
        everyone = threading.Barrier(HTTP_CLIENTS)
        list(self._threads.map(lambda _: everyone.wait(), range(HTTP_CLIENTS)))
        self.seen, self.count = Seen(), 0

    def round(self, size: int) -> None:
        """Send requests, wait until all rows are free, and compare."""
        vocabulary = self._service.model.config.vocab_size
        asked = [drawn(self._chance, vocabulary, self._lines) for _ in range(size)]
        begin = time.monotonic()
        asyncio.run(self._all(asked))
        until(self._idle)
        self.seen.largest_round_s = max(self.seen.largest_round_s, round(time.monotonic() - begin, 2))
        for each in asked:
            self._judge(each)
        self.count += size

    async def _all(self, asked: list[Asked]) -> None:
        await asyncio.gather(*(come(each, self._service, self._client, self._threads) for each in asked))

    def _idle(self) -> bool:
        stats = self._service.engine.stats()
        return stats.running == stats.waiting == 0 and not self._server.server_state.connections

    def _judge(self, asked: Asked) -> None:
        seen = self.seen
        seen.refused += asked.refused
        (seen.disturbed if asked.found is None else seen.answered)[asked.kind] += 1
        if asked.found is None:
            if "stays" in asked.ending:
                seen.different.append({"kind": asked.kind, "settings": asked.settings, "got": None})
            return
        seen.compared += 1
        wanted = self._wanted(asked)
        if asked.found != wanted:
            found = {"got": asked.found, "wanted": wanted}
            seen.different.append({"kind": asked.kind, "settings": asked.settings, "source": asked.source, **found})
            print("different:", seen.different[-1], flush=True)

    def _wanted(self, asked: Asked) -> list[Any]:
        tokenizer, text = self._tokenizer, isinstance(asked.source, str)
        ids = tokenizer(asked.source)["input_ids"] if text else asked.source
        rows = alone(self._service.model, ids, **asked.settings)
        return tokenizer.batch_decode(rows, skip_special_tokens=True) if text else rows.tolist()


def run(
    service: Service,
    tokenizer: Any,
    lines: list[str],
    *,
    requests: int | None = None,
    minutes: float = 0.0,
    cores: float = 2.0,
    seed: int = 0,
) -> Seen:
    """Rounds until so many requests were sent or minutes are over; between them it rests, so that so many cores are busy on average."""
    process, start = psutil.Process(), time.monotonic()
    with serving(service) as (client, server):
        made = Run(service, server, client, tokenizer, lines, seed)
        busy = sum(process.cpu_times()[:2])
        while True:
            elapsed = time.monotonic() - start
            share = made.count / requests if requests is not None else elapsed / max(60 * minutes, 1e-9)
            if share >= 1:
                break
            made.round(ROUND if requests is None else min(ROUND, requests - made.count))
            made.seen.usage.append(soak.Usage.now(made.count, on_gpu=False))
            if share < 0.1:
                made.seen.warm = len(made.seen.usage)
            if made.count % (25 * ROUND) == 0:
                print(
                    f"{elapsed / 60:.1f} min", made.seen.usage[-1], f"different: {len(made.seen.different)}", flush=True
                )
            time.sleep(max((sum(process.cpu_times()[:2]) - busy) / cores - (time.monotonic() - start), 0))
        soak.look_last(made.seen, made.count, on_gpu=False)
        stats = service.engine.stats()
        made.seen.steps = stats.steps
        made.seen.ended.update(
            {name: getattr(stats, name) for name in ("completed", "cancelled", "timed_out", "failed")}
        )
    return made.seen


def record_of(seen: Seen, given: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a run."""
    steady, slope = seen.usage[seen.warm :], seen.slope("resident_mb")
    thin = max(len(seen.usage) // 60, 1)
    return {
        "model": Path(given.model).name,
        "backend": "onnxruntime",
        "precision": "fp32",
        "minutes": given.minutes,
        "cores": given.cores,
        "seed": given.seed,
        "rows": ROWS,
        "requests": sum((seen.answered + seen.disturbed).values()),
        "answered": dict(seen.answered),
        "disturbed": dict(seen.disturbed),
        "refused_and_sent_again": seen.refused,
        "ended_in_the_engine": dict(seen.ended),
        "steps": seen.steps,
        "largest_round_s": seen.largest_round_s,
        "compared": seen.compared,
        "different": seen.different,
        "growth_mb_per_1000_requests": None if slope is None else round(slope, 3),
        "resident_mb_of_first_and_last_third": seen.thirds(),
        "after_warm_up": vars(steady[0]) if steady else None,
        "at_the_end": vars(steady[-1]) if steady else None,
        "broken": seen.broken(),
        "usage": [[usage.requests, usage.resident_mb, usage.threads, usage.open_files] for usage in seen.usage[::thin]],
        "usage_columns": ["requests", "resident_mb", "threads", "open_files"],
        **environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "kana_romaji"), help="a folder")
    parser.add_argument("--texts", type=Path, default=ROOT / "examples" / "data" / "kana.txt")
    much = parser.add_mutually_exclusive_group(required=True)
    much.add_argument("--requests", type=int)
    much.add_argument("--minutes", type=float)
    parser.add_argument("--cores", type=float, default=2.0, help="that the run may keep busy on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the record to")
    given = parser.parse_args(arguments)
    soak.use_one_heap()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = TRTT5ForConditionalGeneration.from_pretrained(given.model, backend="onnxruntime", num_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    service = Service(model, tokenizer, "soak", Limits(), max_rows=ROWS, max_waiting=WAITING)
    lines = given.texts.read_text(encoding="utf-8").split("\n")[:-1]
    how = {"requests": given.requests, "minutes": given.minutes, "cores": given.cores, "seed": given.seed}
    seen = run(service, tokenizer, lines, **how)
    record = record_of(seen, given)
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "usage"}, indent=1))
    return 1 if record["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
