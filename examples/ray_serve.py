"""T5 behind HTTP with Ray Serve: dynamic batches, streaming, autoscaling over the GPUs of a cluster.

    pip install "t5-trt[ray]"
    python examples/ray_serve.py examples/kana_romaji
    python examples/ray_serve.py MODEL --num-gpus 1 --max-replicas 8 --engine-cache-dir /shared/engines
    serve run --app-dir examples ray_serve:build_app model=MODEL num_gpus=1

    curl localhost:8000/generate --json '{"text": "さくら", "num_beams": 4, "max_new_tokens": 32}'
    curl -N localhost:8000/stream --json '{"text": "さくら"}'

`/generate` answers {"text", "batch_size"}; requests with equal settings that come close together run as one batch, and
others never share one. `/stream` (without beams) answers lines of JSON: {"text": piece} ..., then {"done": true} or
{"error": ...}. Errors are {"error": message} with status 400 (values), 408 (the body came too slowly), 413 (too long), 500 or
504 (too late); 503 is Ray's and plain text: too many wait.

A request is one text; `Settings` has the limits of its size, its time and how many wait. A request of a new size builds an
engine where the store has none: fill it first. There is no login and no TLS: put this behind a gateway that has them. Ray's
dashboard runs code for whoever reaches it: it stays on this machine unless told otherwise.
"""

import argparse
import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import AutoTokenizer, TextStreamer

from t5_trt import TRTT5ForConditionalGeneration, generate_many

logger = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """Of the deployment; ``serve run`` gives them as name=value."""

    model_config = ConfigDict(extra="forbid")
    model: str
    engine_cache_dir: str | None = None
    num_cpus: int = Field(1, ge=1, description="of a replica; without a GPU also its threads")
    num_gpus: float = Field(0, ge=0, description="of a replica")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    max_batch_size: int = Field(8, ge=1)
    batch_wait_s: float = Field(0.01, ge=0, description="how long a batch waits for more texts")
    max_queued_requests: int = Field(256, ge=1, description="more than these are answered with 503")
    max_body_bytes: int = Field(64_000, ge=1, description="of a request, before it is read as JSON")
    max_text_characters: int = Field(4000, ge=1)
    max_source_tokens: int = Field(512, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    max_num_beams: int = Field(8, ge=1)
    request_timeout_s: float = Field(30, gt=0, description="for the body to arrive, and again for the answer")


class Ask(BaseModel):
    """The body of a request. `TextService._check` has the upper limits."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str
    num_beams: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1)


def _line(**values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


class Pieces(TextStreamer):
    """`TextIteratorStreamer` for a reader in an event loop: no thread waits, and the reader can end the generation."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.closed = False

    def put(self, value: Any) -> None:
        """Take tokens from `generate`, in its thread."""
        if self.closed:
            raise ConnectionAbortedError("the reader of a stream left")
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, text)


Batch = Callable[[tuple[str, float]], Awaitable[tuple[str, int]]]
api = FastAPI(title="t5_trt")


@api.exception_handler(RequestValidationError)
async def _bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
    told = error.errors()[:5]  # the names are the client's own, of any length and number
    names = [".".join(part for part in found["loc"][1:] if isinstance(part, str))[:50] for found in told]
    problems = [f"{name or 'body'}: {found['msg']}" for name, found in zip(names, told, strict=True)]
    return JSONResponse({"error": "; ".join(problems)}, status_code=400)


@api.exception_handler(HTTPException)
async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


@api.exception_handler(Exception)
async def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "internal error"}, status_code=500)  # Starlette logs it


async def _read_ask(request: Request) -> Ask:
    """The body, never more of it in memory than is allowed: FastAPI's own way would read all of it first."""
    limits = serve.get_replica_context().servable_object.settings
    body = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > limits.max_body_bytes:
                raise HTTPException(413, f"the body is too long; expected at most {limits.max_body_bytes} bytes")

    try:
        await asyncio.wait_for(read(), limits.request_timeout_s)
        return Ask.model_validate_json(bytes(body))
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {limits.request_timeout_s:g} s") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body is not complete") from None
    except ValidationError as error:
        found = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


Body = Annotated[Ask, Depends(_read_ask)]


@serve.deployment(name="t5")
@serve.ingress(api)
class TextService:
    """One replica: one model, one thread that generates, any number of waiting requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        load: dict[str, Any] = {"engine_cache_dir": settings.engine_cache_dir}
        if not settings.num_gpus:
            load.update(backend="onnxruntime", num_threads=settings.num_cpus)
        self.model = TRTT5ForConditionalGeneration.from_pretrained(settings.model, **load)
        self.thread = ThreadPoolExecutor(1)  # calls on one model run one by one anyway
        self._batches: dict[tuple[int, int], Batch] = {}  # the limits bound their number
        self._texts(["a"], num_beams=1, max_new_tokens=2)  # a replica is healthy when its engines are open

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether this replica can answer."""
        return {"status": "ok", "backend": self.model.session.backend}

    @api.post("/generate")
    async def generate(self, ask: Body) -> dict[str, Any]:
        """The whole answer."""
        self._check(ask)
        batch, timeout_s = self._batch(ask.num_beams, ask.max_new_tokens), self.settings.request_timeout_s
        try:
            text, size = await asyncio.wait_for(batch((ask.text, time.monotonic() + timeout_s)), timeout_s)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no answer within {timeout_s:g} s") from None
        return {"text": text, "batch_size": size}

    @api.post("/stream")
    async def stream(self, ask: Body) -> StreamingResponse:
        """The answer piece by piece."""
        self._check(ask)
        if ask.num_beams != 1:
            raise HTTPException(
                400, f"num_beams got {ask.num_beams}; /stream takes 1: beams have no text before the end"
            )
        return StreamingResponse(self._lines(ask), media_type="application/x-ndjson")

    def _check(self, ask: Ask) -> None:
        limits = self.settings
        if (got := len(ask.text)) > limits.max_text_characters:
            raise HTTPException(413, f"text got {got} characters; expected at most {limits.max_text_characters}")
        if (got := len(self.tokenizer(ask.text)["input_ids"])) > limits.max_source_tokens:
            raise HTTPException(413, f"text got {got} tokens; expected at most {limits.max_source_tokens}")
        for name, most in (("num_beams", limits.max_num_beams), ("max_new_tokens", limits.max_new_tokens)):
            if getattr(ask, name) > most:
                raise HTTPException(400, f"{name} got {getattr(ask, name)}; expected at most {most}")

    def _batch(self, num_beams: int, max_new_tokens: int) -> Batch:
        """A queue of its own for each setting: whatever waits in it can run together."""

        @serve.batch(max_batch_size=self.settings.max_batch_size, batch_wait_timeout_s=self.settings.batch_wait_s)
        async def batch(items: list[tuple[str, float]]) -> list[tuple[str, int]]:
            run = asyncio.get_running_loop().run_in_executor
            return await run(self.thread, self._answers, items, num_beams, max_new_tokens)

        return self._batches.setdefault((num_beams, max_new_tokens), batch)

    def _answers(self, items: list[tuple[str, float]], num_beams: int, max_new_tokens: int) -> list[tuple[str, int]]:
        now = time.monotonic()
        live = [text for text, deadline in items if deadline > now]  # the others have their 504 already
        rest_s = max(deadline for _, deadline in items) - now  # when the last caller gives up, the batch ends too
        texts = iter(self._texts(live, num_beams=num_beams, max_new_tokens=max_new_tokens, max_time=rest_s))
        return [(next(texts), len(live)) if deadline > now else ("", 0) for _, deadline in items]

    def _texts(self, texts: list[str], **arguments: Any) -> list[str]:
        options = {"batch_size": self.settings.max_batch_size, "show_progress": False, **arguments}
        return list(generate_many(self.model, self.tokenizer, texts, **options))

    async def _lines(self, ask: Ask) -> AsyncIterator[str]:
        pieces, loop = Pieces(self.tokenizer), asyncio.get_running_loop()
        deadline = loop.time() + self.settings.request_timeout_s
        work = loop.run_in_executor(self.thread, self._stream_into, pieces, ask)
        work.add_done_callback(lambda _: pieces.queue.put_nowait(None))
        try:
            while (text := await asyncio.wait_for(pieces.queue.get(), deadline - loop.time())) is not None:
                if text:
                    yield _line(text=text)
            await work
            yield _line(done=True)
        except asyncio.TimeoutError:
            yield _line(error=f"no whole answer within {self.settings.request_timeout_s:g} s")
        except Exception:
            logger.exception("a stream failed")
            yield _line(error="internal error")
        finally:
            pieces.closed = True  # the reader may have left

    def _stream_into(self, pieces: Pieces, ask: Ask) -> None:
        if not pieces.closed:
            inputs = self.tokenizer([ask.text], return_tensors="pt").to(self.model.device)
            with suppress(ConnectionAbortedError):
                self.model.generate(**inputs, num_beams=1, max_new_tokens=ask.max_new_tokens, streamer=pieces)


def build_app(settings: Settings | dict[str, Any]) -> serve.Application:
    """The application, for ``serve run`` and `serve.run`. Ray wants one argument: `Settings` or a dict of them."""
    wanted = Settings.model_validate(settings).model_copy()
    if Path(wanted.model).is_dir():  # replicas have another current folder
        wanted.model = str(Path(wanted.model).resolve())
    return TextService.options(
        # two full batches are a replica's share: one that runs and one that waits
        autoscaling_config={
            "min_replicas": wanted.min_replicas,
            "max_replicas": wanted.max_replicas,
            "target_ongoing_requests": 2 * wanted.max_batch_size,
        },
        max_ongoing_requests=4 * wanted.max_batch_size,
        max_queued_requests=wanted.max_queued_requests,
        ray_actor_options={"num_cpus": wanted.num_cpus, "num_gpus": wanted.num_gpus},
    ).bind(wanted)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    for name, field in list(Settings.model_fields.items())[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=field.description)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = vars(parser.parse_args())
    serve.start(http_options={name: options.pop(name) for name in ("host", "port")})
    serve.run(build_app(options), blocking=True)


if __name__ == "__main__":
    main()
