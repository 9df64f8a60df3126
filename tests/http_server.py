"""A server in a thread of a test's process, and a client for it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from t5_trt.serving.http.server import Server, bound_socket
from t5_trt.serving.http.service import Service
from tests.serving_requests import PATIENCE_S, until


class Client:
    """Of the server at a port of this machine.

    Attributes:
        service: that answers.
    """

    def __init__(self, port: int, service: Service | None = None) -> None:
        self.port, self._service = port, service

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def open(self, path: str, body: Any = None, **headers: str) -> HTTPConnection:
        """Ask, and do not read the answer yet; a body is sent as JSON, bytes as they are."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if data is None else {"Content-Type": "application/json"}
        connection.request("GET" if data is None else "POST", path, data, {**kind, **headers})
        return connection

    def raw(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers with names in lower case, and the text of an answer."""
        connection = self.open(path, body, **headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        status, _, text = self.raw(path, body, **headers)
        return status, json.loads(text)

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; the last may be the text [DONE]."""
        status, headers, text = self.raw(path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def metric(self, sample: str) -> float:
        """The value of one sample by its name and labels; 0 if it is not there."""
        lines = self.raw("/metrics")[2].splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == sample), 0.0)


@contextmanager
def serving(service: Service, grace: float = 0.0) -> Iterator[tuple[Client, Server]]:
    """A server, ready; it ends with the block."""
    listener = bound_socket("127.0.0.1", 0)
    server = Server(service, grace)
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    until(lambda: service.ready)
    try:
        yield Client(listener.getsockname()[1], service), server
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.end)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def end(server: Server, service: Service) -> None:
    """Begin the end, as a signal does, and wait until requests are refused."""
    loop = server.servers[0].get_loop()
    loop.call_soon_threadsafe(server.end)
    until(lambda: not service.ready and service.engine.closed)
