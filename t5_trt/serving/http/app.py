"""The application: all routes over one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from t5_trt.serving.http.bodies import add_bodies
from t5_trt.serving.http.completions import completions, models
from t5_trt.serving.http.failures import RequestError, add_handlers
from t5_trt.serving.http.generate import generation
from t5_trt.serving.http.service import Service
from t5_trt.serving.http.watch import Watch


def build_app(service: Service) -> ASGIApp:
    """An application of ASGI. It warms up when it starts, and closes the engine when it ends.

    Args:
        service: that answers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        warming.cancel()
        await service.close(0)

    app = FastAPI(
        title="t5_trt",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    add_handlers(app)
    add_bodies(app, [completions(service), generation(service)])
    for router in (models(service), _health(service)):
        app.include_router(router)
    return Watch(app, service)


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health/live")
    async def live() -> dict[str, Any]:
        if service.failed:
            raise RequestError(500, "engine_failed", "the engine has ended after an error; start the server again.")
        return {"status": "live"}

    @router.get("/health/ready")
    async def ready() -> dict[str, Any]:
        if not service.ready or service.failed:
            raise RequestError(503, "not_ready", "the server is warming up or shutting down.")
        return {"status": "ready"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
