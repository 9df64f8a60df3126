"""T5 behind HTTP on the machines of a Ray cluster: the routes of `t5-trt serve`, one model in each replica.

    pip install "t5-trt[ray,serve]"
    python examples/ray_serve.py examples/kana_romaji
    python examples/ray_serve.py MODEL --num-gpus 1 --max-replicas 8 --engine-cache-dir /shared/engines
    serve run --app-dir examples ray_serve:build_app model=MODEL num_gpus=1

    curl localhost:8000/v1/completions --json '{"prompt": "さくら", "max_tokens": 32}'
    curl -N localhost:8000/generate --json '{"text": "さくら", "stream": true}'

A `Replica` has a model on a GPU or on CPU cores, its engine, whose requests share decoder steps, and the application of `t5-trt serve`.
A `Gateway` takes HTTP requests and gives each to a replica that has room. Ray adds replicas when the requests that run or wait are more than
the replicas' rows, and takes them away again. A client that leaves frees its row.

A request whose replica ends before the first part of the answer is sent again to another one, once; then it gets 503 with the code
`replica_lost`. A stream that has begun ends with that error as its last event. Errors are those of `t5-trt serve`, JSON always; only
what Ray's proxy says where no gateway runs is plain text.

There is no login and no TLS: put this behind a gateway that has them. Ray's dashboard runs code for whoever reaches it: it stays on this
machine unless told otherwise. A request of a new size builds an engine where TensorRT's store has none: fill it first.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.serving.http.app import build_app as build_http_app
from t5_trt.serving.http.events import event
from t5_trt.serving.http.failures import RequestError, as_request_error
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.service import Service
from t5_trt.serving.http.watch import given, read_body

#: how often a request is given to a replica, if the first one ends before it has answered
ATTEMPTS = 2
#: of a request's scope, what its replica needs
SCOPE = ("type", "http_version", "method", "path", "raw_path", "query_string", "root_path", "headers", "scheme")


class Settings(BaseModel):
    """Of the deployments; ``serve run`` gives them as name=value."""

    model_config = ConfigDict(extra="forbid")
    model: str
    name: str | None = Field(None, description="of the model for clients")
    engine_cache_dir: str | None = None
    num_cpus: int = Field(1, ge=1, description="of a replica; without a GPU also its threads")
    num_gpus: float = Field(0, ge=0, description="of a replica")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    gateways: int = Field(1, ge=1, description="processes that take HTTP requests and have no model")
    max_rows: int = Field(16, ge=1, description="requests that decode at a time in a replica")
    max_waiting: int = Field(256, ge=1, description="requests that wait for a replica at a gateway; more get 429")
    max_body_bytes: int = Field(256_000, ge=1, description="of a request")
    max_source_tokens: int = Field(512, ge=1, description="of a text")
    max_new_tokens: int = Field(512, ge=1, description="of a result")
    max_results: int = Field(16, ge=1, description="of a request: texts times n, texts, beams")
    timeout: float = Field(60, gt=0, description="seconds of a request")

    def limits(self) -> Limits:
        """Of a request."""
        sizes = (self.max_body_bytes, self.max_source_tokens, self.max_new_tokens, self.max_results)
        return Limits(*sizes, self.timeout)


@serve.deployment(name="t5")
class Replica:
    """One model, which answers as `t5-trt serve` does."""

    async def __init__(self, settings: Settings) -> None:
        load: dict[str, Any] = {"engine_cache_dir": settings.engine_cache_dir}
        if not settings.num_gpus:
            load.update(backend="onnxruntime", num_threads=settings.num_cpus)
        model = TRTT5ForConditionalGeneration.from_pretrained(settings.model, **load)
        tokenizer, name = AutoTokenizer.from_pretrained(settings.model), settings.name or Path(settings.model).name
        # each of a replica's requests may have several texts
        rows = {"max_rows": settings.max_rows, "max_waiting": 2 * settings.max_rows * settings.max_results}
        self._service = Service(model, tokenizer, name, settings.limits(), **rows)
        self._app = build_http_app(self._service)
        await self._service.warm_up()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """The messages of an answer as they come; the first ones have the whole of it, or the first part of a stream."""
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._app(scope, given(body), queue.put))
        work.add_done_callback(lambda _: queue.put_nowait(None))
        messages: list[Message] = []
        try:
            while (message := await queue.get()) is not None:
                messages.append(message)
                if queue.empty() and message["type"] == "http.response.body":
                    yield messages
                    messages = []
        finally:  # with the application, what runs for it ends
            work.cancel()
            await asyncio.wait([work])

    def check_health(self) -> None:
        """Raise where Ray should start another replica instead."""
        if self._service.failed:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.engine.close()


@serve.deployment(name="gateway")
@serve.ingress()
class Gateway:
    """Reads requests within the limits, and sends on what a replica answers."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        self._limits, self._replicas = settings.limits(), replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Starlette(routes=[Mount("", self._serve)])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"].endswith("/metrics"):
                raise RequestError(404, "not_found", "there are metrics of all replicas at Ray's own metrics ports.")
            body = await read_body(scope, receive, self._limits)
            if body is not None:
                await self._answer({name: scope[name] for name in SCOPE if name in scope}, body, send)
        except RequestError as error:
            await error.response()(scope, receive, send)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        deadline = time.monotonic() + self._limits.seconds
        for _ in range(ATTEMPTS):
            answer, begun = self._replicas.answer.remote(scope, body), False
            try:
                messages = await asyncio.wait_for(anext(answer), deadline - time.monotonic())
                begun = True
                await _send(messages, send)
                while messages[-1].get("more_body", False):
                    messages = await anext(answer)
                    await _send(messages, send)
                return
            except Exception as error:
                failure = _told(error)
                if begun:
                    last = event(failure.body()).encode()
                    await send({"type": "http.response.body", "body": last, "more_body": False})
                    return
                if not isinstance(error, RayActorError):
                    raise failure from error
            finally:
                with suppress(Exception):  # the error of a request that got no replica, once more
                    answer.cancel()  # of no effect after its end
        raise failure


async def _send(messages: list[Message], send: Send) -> None:
    for message in messages:
        await send(message)


def _told(error: Exception) -> RequestError:
    """What a client is told of an error that no replica has answered."""
    if isinstance(error, BackPressureError):
        return RequestError(429, "queue_full", "too many requests wait; try again later.", headers={"Retry-After": "1"})
    if isinstance(error, asyncio.TimeoutError):
        return RequestError(504, "timeout", "the request did not end within the server's time limit.")
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        message = "the replica that ran the request has ended; send the request again."
        return RequestError(503, "replica_lost", message, headers={"Retry-After": "1"})
    return as_request_error(error)


def build_app(settings: Settings | dict[str, Any]) -> serve.Application:
    """The application, for ``serve run`` and `serve.run`. Ray wants one argument: `Settings` or a dict of them."""
    wanted = Settings.model_validate(settings).model_copy()
    if Path(wanted.model).is_dir():  # replicas have another current folder
        wanted.model = str(Path(wanted.model).resolve())
    replicas = Replica.options(
        autoscaling_config={
            "min_replicas": wanted.min_replicas,
            "max_replicas": wanted.max_replicas,
            "target_ongoing_requests": wanted.max_rows,  # more than that wait
        },
        max_ongoing_requests=2 * wanted.max_rows,  # those that wait in a replica take its free rows between two steps
        max_queued_requests=wanted.max_waiting,
        graceful_shutdown_timeout_s=wanted.timeout,
        ray_actor_options={"num_cpus": wanted.num_cpus, "num_gpus": wanted.num_gpus},
    )
    gateway = Gateway.options(
        num_replicas=wanted.gateways,
        max_ongoing_requests=100_000,  # what waits is bounded where it waits for a replica
        graceful_shutdown_timeout_s=wanted.timeout,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(wanted, replicas.bind(wanted))


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
