"""Requests per second of `t5-trt serve` on a CPU against `generate_many`, for clients that wait.

    python -m benchmarks.serving_http examples/kana_romaji --texts examples/data/kana.txt

The server is a process of its own; so are the clients, which keep their connections and take the next text when one is answered.
`generate_many` runs here, in turns with them. All have all cores; what a request costs of a processor, in the server and in its client,
is printed, too.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.http_clients import ask, post
from benchmarks.serving import options, requests
from t5_trt import TRTT5ForConditionalGeneration, generate_many


@contextmanager
def server(model: str, rows: int) -> Iterator[tuple[int, psutil.Process]]:
    """A server; gives its port and process once it is ready."""
    command = [sys.executable, "-m", "t5_trt.cli", "serve", model, "--port", "0", "--max-rows", str(rows)]
    with subprocess.Popen([*command, "--backend", "onnxruntime"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = next(int(line["url"].rpartition(":")[2]) for line in lines_of(process.stderr) if "url" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while asked(HTTPConnection("127.0.0.1", port), "GET", "/health/ready")[0] != 200:
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
        process.terminate()


def lines_of(file: Any) -> Iterator[dict[str, Any]]:
    """The lines of JSON in a log."""
    for line in file:
        if line.startswith("{"):
            yield json.loads(line)


def asked(connection: HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and answer of one request."""
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def clients(port: int, texts: list[str], count: int, stream: bool) -> tuple[list[str], float, float]:
    """The texts that so many clients get, the seconds that it took, and those that the clients had of a processor."""
    bodies = [{"prompt": text, "max_tokens": 95, "stream": stream} for text in texts]
    found = ask(port, [post("/v1/completions", body) for body in bodies], count)
    read = streamed if stream else lambda answer: json.loads(answer)["choices"][0]["text"]
    return [read(answer) for answer in found.bodies], found.wall_s, found.cpu_s


def streamed(answer: bytes) -> str:
    """The text of an answer in pieces, each event on a line between those of its chunk."""
    lines = answer.decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ") and "[DONE]" not in line]
    return "".join(json.loads(each)["choices"][0]["text"] for each in events)


def main() -> None:
    """Measure and print."""
    given = options(__doc__).parse_args()
    model = TRTT5ForConditionalGeneration.from_pretrained(
        given.model, backend="onnxruntime", num_threads=torch.get_num_threads()
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = requests(given.texts, given.requests)
    ways = [(count, stream) for stream in (False, True) for count in (1, 16, 64)]
    names = [f"server, {count} clients{', streams' if stream else ''}" for count, stream in ways]
    rates: dict[str, list[float]] = {name: [] for name in ("generate_many", *names)}
    many = {"batch_size": given.rows, "max_new_tokens": 95, "show_progress": False}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}  # of the server and of its clients
    with server(given.model, given.rows) as (port, process), multiprocessing.get_context("spawn").Pool(1) as others:
        for turn in range(given.rounds + 1):  # the first one warms up
            begin = time.perf_counter()
            wanted = list(generate_many(model, tokenizer, texts, **many))
            rates["generate_many"].append(len(texts) / (time.perf_counter() - begin))
            for name, way in zip(names, ways, strict=True):
                before = sum(process.cpu_times()[:2])
                found, wall, own = others.apply(clients, (port, texts, *way))
                rates[name].append(len(texts) / wall)
                costs[name].append((sum(process.cpu_times()[:2]) - before, own))
                assert found == wanted, f"{name}, round {turn}: texts differ"
    base = statistics.median(rates["generate_many"][1:])
    for name, measured in rates.items():
        rate, cost = statistics.median(measured[1:]), ""
        if name in costs:
            served, own = (statistics.median(each) / len(texts) * 1e3 for each in zip(*costs[name][1:], strict=True))
            cost = f"; a request costs the server {served:.1f} ms of a processor, its client {own:.2f}"
        print(f"{name:28} {rate:6.1f} requests/s, {rate / base:.2f} of generate_many{cost}")


if __name__ == "__main__":
    main()
