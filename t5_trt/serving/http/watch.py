"""What surrounds every request: the size and time of its body, its client's leaving, its log line and metrics."""

from __future__ import annotations

import asyncio
import logging

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t5_trt.serving.http.failures import RequestError
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.record import CLIENT_LEFT, Record
from t5_trt.serving.http.service import Service

logger = logging.getLogger("t5_trt.serving")

#: routes that are asked all the time
QUIET = ("/health/live", "/health/ready", "/metrics")
#: seconds that a client has to read its answer, behind the time of the request
_READ_S = 30.0


class Watch:
    """Reads bodies within the limits, and ends what runs for a client that has left.

    Args:
        app: to go on with.
        service: that has limits and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope["method"])
        scope.setdefault("state", {})["record"] = record
        answer = _Answer(send, record)
        try:
            await self._serve(scope, receive, answer, record)
        finally:
            for handle in record.handles:
                handle.cancel()
            record.route = getattr(scope.get("route"), "path", None)
            self._service.metrics.count(record)
            if record.route not in QUIET:
                logger.info("request", extra={"fields": record.line()})

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer, record: Record) -> None:
        try:
            body = await read_body(scope, receive, self._service.limits)
        except RequestError as error:
            record.reason = error.reason
            await error.response()(scope, receive, answer)
            return
        if body is None:
            record.status, record.reason = CLIENT_LEFT, "client_left"
            return
        with anyio.move_on_after(self._service.limits.seconds + _READ_S) as running:
            left = asyncio.ensure_future(_left(receive, answer, running))
            try:
                await self._app(scope, given(body), answer)
            except Exception as error:  # the handler of errors has answered, and has logged it
                logger.debug("a request failed", exc_info=error)
            finally:
                left.cancel()
        if running.cancelled_caught:
            record.status, record.reason = CLIENT_LEFT, "client_left"


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes | None:
    """The whole body of a request; None if the client left. Never much more of it is in memory than is allowed.

    Args:
        scope: of the request.
        receive: its parts.
        limits: of its size and time.

    Raises:
        RequestError: it is too large or too slow.
    """
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    too_large = RequestError(
        413, "body_too_large", f"the body is too large; expected at most {limits.body_bytes} bytes."
    )
    if int(announced) > limits.body_bytes:
        raise too_large
    body = bytearray()

    with anyio.move_on_after(limits.seconds):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body.extend(message.get("body", b""))
            if len(body) > limits.body_bytes:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)
    text = f"the body did not arrive within {limits.seconds:g} s."
    raise RequestError(408, "body_too_slow", text, headers={"Connection": "close"})


class _Answer:
    """Sends, and knows the status and whether that was all."""

    def __init__(self, send: Send, record: Record) -> None:
        self._send, self._record = send, record
        self.complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._record.id.encode())]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True


def given(body: bytes) -> Receive:
    """What the application receives: the body, and then nothing more."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.get_running_loop().create_future()
        return messages.pop()

    return receive


async def _left(receive: Receive, answer: _Answer, running: anyio.CancelScope) -> None:
    """Cancel what runs for a client once it has left without its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not answer.complete:
        running.cancel()
