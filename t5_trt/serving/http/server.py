"""The process: a socket, uvicorn, and an end that leaves nobody without an answer."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from t5_trt.errors import InputError
from t5_trt.serving.http.app import build_app
from t5_trt.serving.http.service import Service

logger = logging.getLogger("t5_trt.serving")

#: seconds that a connection may be idle: longer than those of usual load balancers, which else meet closed ones
_KEEP_ALIVE_S = 75
#: seconds for which the event loop's thread may hold the interpreter when the rows' thread has a step to start; a step of a small model takes
#: 0.2 ms, and Python's default is 5 ms
_SWITCH_S = 0.0005
#: seconds that answers which are there have to be sent
_SEND_S = 5


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that a port in use is told before a model is loaded.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        InputError: it cannot be had.
    """
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        if made is not None:
            made.close()
        raise InputError(
            f"cannot listen at {host} port {port} ({error}); expected an address of this machine and a free port."
        ) from error
    return made


class Server(uvicorn.Server):
    """Serves one application.

    On SIGTERM or SIGINT new requests are refused, and those that run go on for a while; a second signal ends them at once.

    Args:
        service: that answers.
        grace: seconds that running requests have after the signal.
    """

    def __init__(self, service: Service, grace: float) -> None:
        config = uvicorn.Config(
            build_app(service),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_SEND_S,
        )
        super().__init__(config)
        self._service, self._grace = service, grace
        self._ending: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            logger.info("listening", extra={"fields": {"url": url, "model": self._service.name}})

    def end(self) -> None:
        """Refuse new requests, let those that are there end, and stop; again: stop now. In the event loop's thread."""
        grace = 0.0 if self._ending else self._grace
        self._ending.append(asyncio.get_running_loop().create_task(self._end(grace)))

    async def _end(self, grace: float) -> None:
        logger.info("shutting down", extra={"fields": {"grace_s": grace}})
        await self._service.close(grace)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's way, which closes its sockets at once and ends the process by the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.end)
        try:
            yield
        finally:
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(name)


def serve(service: Service, listener: socket.socket, grace: float) -> None:
    """Serve until a signal ends it.

    Args:
        service: that answers.
        listener: from `bound_socket`.
        grace: seconds that running requests have then.
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # what is there now stays: a search through half a million objects would hold all requests up for 0.3 s
    run: Callable[..., Any] = asyncio.run
    with suppress(ImportError):  # there is none for Windows
        run = importlib.import_module("uvloop").run
    run(Server(service, grace).serve(sockets=[listener]))
