"""Requests per second of one model on a CPU: a plain loop, `generate_many`, and the engine with clients that wait.

    python -m benchmarks.serving examples/kana_romaji --texts examples/data/kana.txt

A request is one to four lines of a file. Each of the engine's clients tokenizes a text, submits it, waits for the end and decodes it, and
then takes the next one. The ways take turns, their texts are compared, and the median of their rates is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t5_trt import TRTT5ForConditionalGeneration, generate_many
from t5_trt.serving import Engine


class Ways:
    """Ways to get the texts of many requests.

    Args:
        model: on ONNX Runtime.
        tokenizer: of the model.
        rows: of a batch, and of the engine.
        limit: new tokens of a request.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int, limit: int) -> None:
        self.model, self.tokenizer, self.rows, self.limit = model, tokenizer, rows, limit
        self.waits: list[float] = []  # seconds of each request of `served`
        self.steps = 0

    def plain(self, texts: list[str]) -> list[str]:
        """`generate` for one text after the other."""
        found = []
        for text in texts:
            made = self.model.generate(**self.tokenizer(text, return_tensors="pt"), max_new_tokens=self.limit)
            found.append(self.tokenizer.decode(made[0], skip_special_tokens=True))
        return found

    def batched(self, texts: list[str]) -> list[str]:
        """`generate_many`, which knows all texts beforehand and sorts them by length."""
        options = {"batch_size": self.rows, "max_new_tokens": self.limit, "show_progress": False}
        return list(generate_many(self.model, self.tokenizer, texts, **options))

    def served(self, texts: list[str], clients: int) -> list[str]:
        """The engine, for a number of clients."""
        found, left, self.waits = [""] * len(texts), iter(range(len(texts))), []

        async def client(engine: Engine) -> None:
            for place in left:
                begin = time.perf_counter()
                handle = engine.submit(self.tokenizer(texts[place]), max_new_tokens=self.limit)
                made = await handle.result()
                found[place] = self.tokenizer.decode(made[0], skip_special_tokens=True)
                self.waits.append(time.perf_counter() - begin)

        async def run(engine: Engine) -> None:
            await asyncio.gather(*(client(engine) for _ in range(clients)))

        with Engine(self.model, max_rows=self.rows) as engine:
            asyncio.run(run(engine))
            self.steps = engine.stats().steps
        return found


def options(description: str | None) -> argparse.ArgumentParser:
    """A command line that names a model and the texts of requests to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def requests(path: Path, count: int) -> list[str]:
    """Texts of one to four lines of a file each, always the same."""
    lines, chance = path.read_text(encoding="utf-8").split("\n")[:-1], random.Random(0)
    return ["".join(chance.choices(lines, k=chance.randint(1, 4))) for _ in range(count)]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--max-new-tokens", type=int, default=95)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = TRTT5ForConditionalGeneration.from_pretrained(given.model, backend="onnxruntime", num_threads=given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = requests(given.texts, given.requests)
    ways = Ways(model, tokenizer, given.rows, given.max_new_tokens)
    served: dict[str, Callable[[list[str]], list[str]]] = {
        "one at a time": ways.plain,
        "generate_many": ways.batched,
        **{f"engine, {count} clients": lambda texts, count=count: ways.served(texts, count) for count in (1, 16, 64)},
    }
    rates: dict[str, list[float]] = {name: [] for name in served}
    notes: dict[str, str] = {}
    for way in served.values():
        way(texts[:32])
    wanted: list[str] = []
    for _ in range(given.rounds):
        for name, way in served.items():
            begin = time.perf_counter()
            found = way(texts)
            rates[name].append(len(texts) / (time.perf_counter() - begin))
            wanted = wanted or found
            differing = sum(one != other for one, other in zip(found, wanted, strict=True))
            if name.startswith("engine"):
                waits = statistics.quantiles(ways.waits, n=20)
                notes[name] = f", p50 {waits[9] * 1e3:.0f} ms, p95 {waits[18] * 1e3:.0f} ms, {ways.steps} steps"
            notes[name] = notes.get(name, "") + (f", {differing} texts differ" if differing else "")
    base = statistics.median(rates["generate_many"])
    for name, found_rates in rates.items():
        rate = statistics.median(found_rates)
        print(f"{name:20} {rate:6.1f} requests/s, {rate / base:.2f} of generate_many{notes[name]}")


if __name__ == "__main__":
    main()
