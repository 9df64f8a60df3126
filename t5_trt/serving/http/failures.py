"""What cannot be answered: statuses, and errors in the form of OpenAI's API."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from t5_trt.errors import EngineClosedError, InputError, QueueFullError, RequestTimeoutError

logger = logging.getLogger("t5_trt.serving")

_TYPES = {404: "not_found_error", 429: "rate_limit_error"}
_REASONS = {404: "not_found", 405: "method_not_allowed"}
_PROBLEMS = 5  # of a body that are told
_NAME = 60  # characters of a field's name, which may be the client's own


class RequestError(Exception):
    """A request that is refused or has failed.

    Args:
        status: of HTTP.
        reason: in a word, for programs: ``code`` of the error, and a label in logs and metrics.
        message: for people.
        param: the field that is wrong.
        headers: of the answer.
    """

    def __init__(
        self, status: int, reason: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.param, self.headers = status, reason, param, headers

    def body(self) -> dict[str, Any]:
        """The answer as OpenAI's clients expect it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.reason}}

    def response(self) -> JSONResponse:
        """The same with its status."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def invalid(message: str, param: str | None = None) -> RequestError:
    """A request with a value that cannot be served."""
    return RequestError(400, "invalid_request", message, param)


def as_request_error(error: BaseException) -> RequestError:
    """What a client is told of any error; one that nobody expected is logged, and says nothing of itself."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, "queue_full", "too many requests wait; try again later.", headers={"Retry-After": "1"})
    if isinstance(error, EngineClosedError):
        headers = {"Retry-After": "5", "Connection": "close"}
        return RequestError(503, "shutting_down", "the server is shutting down; ask another one.", headers=headers)
    if isinstance(error, RequestTimeoutError):
        return RequestError(504, "timeout", "the request did not end within the server's time limit.")
    if isinstance(error, InputError):
        return invalid(str(error))
    logger.error("a request failed", exc_info=error)
    return RequestError(500, "internal_error", "internal error; the server's log has it.")


def add_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    def tell(request: Request, error: RequestError) -> JSONResponse:
        request.state.record.reason = error.reason
        return error.response()

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return tell(request, as_request_error(error))

    async def bad_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return tell(request, _about_body(error))

    async def by_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        reason = _REASONS.get(error.status_code, "invalid_request")
        headers = dict(error.headers) if error.headers else None
        return tell(request, RequestError(error.status_code, reason, str(error.detail), headers=headers))

    app.add_exception_handler(RequestValidationError, bad_body)
    app.add_exception_handler(HTTPException, by_framework)
    for kind in (RequestError, QueueFullError, EngineClosedError, RequestTimeoutError, InputError, Exception):
        app.add_exception_handler(kind, refused)


def _about_body(error: RequestValidationError) -> RequestError:
    problems, first = [], None
    for found in error.errors()[:_PROBLEMS]:
        place = found["loc"][1:]  # of JSON that cannot be read, a number
        name = ".".join(str(part)[:_NAME] for part in place) if isinstance(next(iter(place), 0), str) else ""
        first = first or name or None
        message = found["msg"].removeprefix("Value error, ")
        problems.append(f"{name}: {message}" if name else f"the body: {message}")
    hint = "" if first else " Expected a JSON object, sent with Content-Type: application/json."
    return invalid("; ".join(problems) + "." + hint, first)
