"""Clients of a soak run of serving: they stay, cancel, leave or are too late, at the engine or over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

from t5_trt.errors import QueueFullError, RequestCancelledError, RequestTimeoutError
from t5_trt.serving import Handle
from t5_trt.serving.http.service import Service
from tests.http_server import Client
from tests.serving_requests import drawn_settings

#: way to the engine -> how its clients end, by weights of one each
ENDINGS = {
    "engine": ("stays",) * 6 + ("cancels", "leaves", "drops it", "is late"),
    "http": ("stays",) * 4 + ("stays for a stream",) * 4 + ("leaves", "leaves a stream"),
}
#: most seconds that a client waits before it comes, and before it leaves
ARRIVAL_S, LEAVES_S = 0.2, 0.03
#: most tokens of a source, lines of a text
SOURCE_TOKENS, LINES = 200, 4
_AGAIN_S = 0.02


@dataclass
class Asked:
    """One request and what became of it.

    Attributes:
        way: "engine" or "http".
        ending: of its client, from `ENDINGS`.
        source: token ids for the engine, a text for HTTP.
        settings: of ``generate()``, and a seed.
        arrival_s: seconds until its client comes.
        leaves_s: seconds that a client stays that does not stay to the end.
        found: token rows, or texts; None where the client did not get the result.
        refused: how often the queue was full.
    """

    way: str
    ending: str
    source: Any
    settings: dict[str, Any]
    arrival_s: float
    leaves_s: float
    found: list[Any] | None = None
    refused: int = 0

    @property
    def kind(self) -> str:
        """For counting."""
        return f"{self.way}, client {self.ending}"


def drawn(chance: random.Random, vocabulary: int, lines: list[str]) -> Asked:
    """A request of random length, settings and ending."""
    way = chance.choice(list(ENDINGS))
    ending, settings = chance.choice(ENDINGS[way]), drawn_settings(chance, vocabulary)
    if ending.endswith("stream"):
        settings.pop("num_return_sequences", None)
    length = int((SOURCE_TOKENS + 1) ** chance.random())  # short ones are as likely as long ones by order of magnitude
    ids = [chance.randrange(3, vocabulary) for _ in range(length)]
    text = "".join(chance.choices(lines, k=chance.randint(1, LINES)))
    source = ids if way == "engine" else text
    return Asked(way, ending, source, settings, chance.uniform(0, ARRIVAL_S), chance.uniform(0.001, LEAVES_S))


async def come(asked: Asked, service: Service, client: Client, threads: ThreadPoolExecutor) -> None:
    """Send one request and stay for its result, or not."""
    await asyncio.sleep(asked.arrival_s)
    if asked.way == "http":
        await asyncio.get_running_loop().run_in_executor(threads, _over_http, asked, client)
        return
    handle = await _submitted(asked, service)
    try:
        if asked.ending == "drops it":
            await asyncio.sleep(asked.leaves_s)
            return  # and nobody has the handle
        if asked.ending == "leaves":
            task = asyncio.ensure_future(handle.result())
            await asyncio.wait([task], timeout=asked.leaves_s)
            task.cancel()
            await asyncio.wait([task])
            asked.found = None if task.cancelled() else task.result().tolist()
            return
        if asked.ending == "cancels":
            await asyncio.sleep(asked.leaves_s)
            handle.cancel()
        streamed = [token async for token in handle]
        asked.found = (await handle.result()).tolist()
        if streamed != asked.found[0][1:]:
            raise AssertionError(f"a stream of {streamed} became {asked.found[0][1:]}")
    except (RequestCancelledError, RequestTimeoutError):
        if asked.ending == "stays":
            raise


async def _submitted(asked: Asked, service: Service) -> Handle:
    while True:
        timeout = asked.leaves_s if asked.ending == "is late" else None
        try:
            return service.engine.submit(asked.source, timeout=timeout, **asked.settings)
        except QueueFullError:
            asked.refused += 1
            await asyncio.sleep(_AGAIN_S)


def _over_http(asked: Asked, client: Client) -> None:
    stream = asked.ending.endswith("stream")
    body = {"text": asked.source, "stream": stream, **asked.settings}
    while True:
        connection = client.open("/generate", body)
        try:
            if asked.ending == "leaves":
                time.sleep(asked.leaves_s)
                return
            answer = connection.getresponse()
            if answer.status == 429:
                asked.refused += 1
                time.sleep(_AGAIN_S)
                continue
            if asked.ending == "leaves a stream":
                answer.read(6)
                return
            asked.found = _texts(answer, stream)
            return
        finally:
            connection.close()


def _texts(answer: HTTPResponse, stream: bool) -> list[str]:
    """What an answer has.

    Raises:
        AssertionError: it is an error.
    """
    raw = answer.read().decode()
    if answer.status != 200 or '{"error":' in raw:
        raise AssertionError(f"HTTP got {answer.status}: {raw[-500:]}")
    if not stream:
        text = json.loads(raw)["text"]
        return text if isinstance(text, list) else [text]
    events = [json.loads(line.removeprefix("data: ")) for line in raw.split("\n\n") if line]
    return ["".join(each.get("text", "") for each in events)]
