"""Requests per second of `t5-trt serve` on a CPU against `generate_many`, for clients that wait.

    python -m benchmarks.serving_http examples/kana_romaji --texts examples/data/kana.txt

The server is a process of its own; so are the clients, which keep their connections and take the next text when one is answered.
`generate_many` runs here, in turns with them. Both have all cores; the clients' process takes its share of them.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
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

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.serving import options, requests
from t5_trt import TRTT5ForConditionalGeneration, generate_many


@contextmanager
def server(model: str, rows: int) -> Iterator[int]:
    """A server; gives its port once it is ready."""
    command = [sys.executable, "-m", "t5_trt.cli", "serve", model, "--port", "0", "--max-rows", str(rows)]
    with subprocess.Popen([*command, "--backend", "onnxruntime"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = next(int(line["url"].rpartition(":")[2]) for line in lines_of(process.stderr) if "url" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while asked(HTTPConnection("127.0.0.1", port), "GET", "/health/ready")[0] != 200:
            time.sleep(0.1)
        yield port
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


def clients(port: int, texts: list[str], count: int, stream: bool) -> list[str]:
    """The answers that so many clients get, each in a thread."""
    found, left = [""] * len(texts), queue.SimpleQueue[int]()
    for place in range(len(texts)):
        left.put(place)

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port)
        while True:
            try:
                place = left.get_nowait()
            except queue.Empty:
                return
            status, answer = asked(
                connection, "POST", "/v1/completions", {"prompt": texts[place], "max_tokens": 95, "stream": stream}
            )
            assert status == 200, answer
            found[place] = streamed(answer) if stream else json.loads(answer)["choices"][0]["text"]

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def streamed(answer: bytes) -> str:
    """The text of an answer in pieces."""
    events = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line and "[DONE]" not in line]
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
    with server(given.model, given.rows) as port, multiprocessing.get_context("spawn").Pool(1) as others:
        for turn in range(given.rounds + 1):  # the first one warms up
            begin = time.perf_counter()
            wanted = list(generate_many(model, tokenizer, texts, **many))
            rates["generate_many"].append(len(texts) / (time.perf_counter() - begin))
            for name, way in zip(names, ways, strict=True):
                begin = time.perf_counter()
                found = others.apply(clients, (port, texts, *way))
                rates[name].append(len(texts) / (time.perf_counter() - begin))
                assert found == wanted, f"{name}, round {turn}: texts differ"
    base = statistics.median(rates["generate_many"][1:])
    for name, measured in rates.items():
        rate = statistics.median(measured[1:])
        print(f"{name:28} {rate:6.1f} requests/s, {rate / base:.2f} of generate_many")


if __name__ == "__main__":
    main()
