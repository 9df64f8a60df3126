"""Answers in pieces: server-sent events, several results in one stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from t5_trt.serving.http.answer import Answer
from t5_trt.serving.http.failures import as_request_error
from t5_trt.serving.http.record import Record


def event(data: Any) -> str:
    """One event, with JSON unless it is text."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


async def streamed(events: AsyncIterator[str], record: Record) -> StreamingResponse:
    """The answer of a request, once its first event is there: an error before it still has a status of its own.

    Args:
        events: at least one; an error that they raise becomes the last.
        record: of the request.
    """
    first = await anext(events)

    async def all_of_them() -> AsyncIterator[str]:
        yield first
        try:
            async for each in events:
                yield each
        except Exception as error:
            failure = as_request_error(error)
            record.reason = failure.reason
            yield event(failure.body())

    # buffering proxies would hold the pieces back
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(all_of_them(), media_type="text/event-stream", headers=headers)


async def merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, str | None]]:
    """The pieces of several answers as they come, with the number of each; None is an answer's end."""
    queue: asyncio.Queue[tuple[int, str | Exception | None]] = asyncio.Queue()

    async def read(number: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                queue.put_nowait((number, piece))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(read(*each)) for each in enumerate(answers)]
    left = len(tasks)
    try:
        while left:
            number, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            left -= found is None
            yield number, found
    finally:
        for task in tasks:
            task.cancel()
