"""``/generate``: texts through the model with any settings that the engine takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from t5_trt.errors import T5TRTError
from t5_trt.serving.handle import Handle, length
from t5_trt.serving.http.answer import Answer
from t5_trt.serving.http.bodies import BodyRoute
from t5_trt.serving.http.events import event, merged, streamed
from t5_trt.serving.http.failures import invalid
from t5_trt.serving.http.record import Record
from t5_trt.serving.http.service import Seed, Service

#: what Transformers raises for values that it does not expect, at the begin or while tokens are chosen
_OF_SETTINGS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError)


class GenerateBody(BaseModel):
    """Of a request: a text or several, and settings by the names of ``GenerationConfig``."""

    model_config = ConfigDict(extra="allow", strict=True)
    text: str | None = None
    texts: list[str] | None = Field(None, min_length=1)
    stream: bool = False
    seed: Seed | None = None

    def check(self, service: Service) -> None:
        """Refuse what the server does not do.

        Raises:
            RequestError: saying what.
        """
        if (self.text is None) == (self.texts is None):
            raise invalid("expected either text, a string, or texts, a list of strings.", "text")
        if self.stream and (self.texts is not None or self.settings.get("num_return_sequences") not in (None, 1)):
            raise invalid("a stream has one result; expected text, without num_return_sequences.", "stream")
        for name in self.settings:
            if name.startswith("_"):
                raise invalid("a name got an underscore at its begin; expected settings of GenerationConfig.")
        most = service.limits.results
        counts = {"texts": len(self.texts or ())} | {
            name: self.settings.get(name) for name in ("num_beams", "num_return_sequences")
        }
        for name, count in counts.items():
            if isinstance(count, int | float) and count > most:
                raise invalid(f"{name} got {count}; expected at most {most}.", name)

    @property
    def settings(self) -> dict[str, Any]:
        """Of ``generate()``."""
        return dict(self.model_extra or {})


@contextmanager
def settings_at_fault() -> Iterator[None]:
    """Errors of Transformers are the client's, who chose its settings."""
    try:
        yield
    except _OF_SETTINGS as error:
        if isinstance(error, T5TRTError):
            raise
        raise invalid(f"the settings cannot be run: {type(error).__name__}: {error}") from error


def submitted(body: GenerateBody, service: Service, record: Record) -> list[Handle]:
    """Give the engine what a body asks for: a handle for each text.

    Raises:
        RequestError: it cannot be served.
        QueueFullError, EngineClosedError: see `Engine.submit`.
    """
    body.check(service)
    service.engine.check_open()
    texts = [body.text] if body.text is not None else body.texts or []
    sources = [service.read(record, text, "text") for text in texts]
    with settings_at_fault():
        settings = service.limited(body.settings)
        return [service.submit(record, ids, settings, body.seed) for ids in sources]


async def results(handle: Handle, service: Service) -> tuple[list[str], int, str]:
    """The texts of a handle, the number of their tokens, and how the last one ended."""
    rows = (await handle.result())[:, 1:].tolist()
    ends = [length(row, handle.end_tokens) for row in rows]
    return [service.decoder.text(row) for row in rows], sum(count for count, _ in ends), _reason(ends[-1][1])


def _reason(ended: bool) -> str:
    return "stop" if ended else "length"


async def _whole(body: GenerateBody, handles: list[Handle], service: Service, record: Record) -> dict[str, Any]:
    with settings_at_fault():
        found = await asyncio.gather(*(results(handle, service) for handle in handles))
    record.completion_tokens = sum(count for _, count, _ in found)
    texts: list[Any] = [each[0] if len(each) == 1 else each for each, _, _ in found]
    named = {"text": texts[0]} if body.texts is None else {"texts": texts}
    return {**named, "usage": record.usage()}


async def _events(handle: Handle, service: Service, record: Record) -> AsyncIterator[str]:
    answer = Answer(handle, service.decoder)
    with settings_at_fault():
        async for _, piece in merged([answer]):
            if piece is not None:
                yield event({"text": piece})
    record.completion_tokens = answer.tokens
    yield event({"finish_reason": answer.finish_reason, "usage": record.usage()})


def generation(service: Service) -> BodyRoute:
    """The route ``/generate``."""

    async def generate(body: GenerateBody, record: Record) -> Response:
        handles = submitted(body, service, record)
        if body.stream:
            return await streamed(_events(handles[0], service, record), record)
        return JSONResponse(await _whole(body, handles, service, record))

    return BodyRoute("/generate", service, GenerateBody, generate)
