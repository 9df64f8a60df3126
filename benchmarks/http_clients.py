"""Clients of a server, as cheap as they can be: what they cost is taken from the cores that the server has.

One thread with a socket for each client, which it keeps; answers are cut at the length that the server names, and read later.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answers:
    """What some clients got.

    Attributes:
        bodies: of each request, in the order in which they were given.
        wall_s: seconds from the first request to the last answer.
        cpu_s: seconds of a processor that the clients took.
    """

    bodies: list[bytes] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0


@dataclass
class _Client:
    socket: socket.socket
    place: int = -1
    got: bytearray = field(default_factory=bytearray)


def post(path: str, body: dict[str, Any]) -> bytes:
    """A request of HTTP."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def ask(port: int, requests: Sequence[bytes], count: int) -> Answers:
    """Have so many clients send requests, each the next one when it has an answer.

    Raises:
        RuntimeError: a status is not 200.
    """
    found, left = Answers([b""] * len(requests)), iter(range(len(requests)))
    with selectors.DefaultSelector() as waiting:
        begin, cpu = time.perf_counter(), time.process_time()
        for _, place in zip(range(count), left):  # noqa: B905 - as many as there are
            client = _Client(socket.create_connection(("127.0.0.1", port)), place)
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.socket.sendall(requests[place])
            waiting.register(client.socket, selectors.EVENT_READ, client)
        while waiting.get_map():
            for key, _ in waiting.select():
                _read(key.data, requests, left, found, waiting)
        found.wall_s, found.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return found


def _read(
    client: _Client, requests: Sequence[bytes], left: Iterable[int], found: Answers, waiting: selectors.BaseSelector
) -> None:
    """Read what is there for a client; give it its next request once all of an answer is."""
    client.got += client.socket.recv(1 << 16)
    body = _body(client.got)
    if body is None:
        return
    found.bodies[client.place], client.got = body, bytearray()
    place = next(iter(left), None)
    if place is None:
        waiting.unregister(client.socket)
        client.socket.close()
    else:
        client.place = place
        client.socket.sendall(requests[place])


def _body(got: bytearray) -> bytes | None:
    """The body of an answer, with chunks as they came; None before all of it is there."""
    end = got.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = got[:end].lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"a client got {bytes(got)!r}; expected status 200.")
    if b"transfer-encoding: chunked" in head:
        return bytes(got[end + 4 :]) if got.endswith(b"\r\n0\r\n\r\n") else None
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return bytes(got[end + 4 :]) if len(got) >= end + 4 + length else None
