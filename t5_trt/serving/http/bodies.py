"""Routes that take a body of JSON and are asked most: Starlette's, as FastAPI's way to a body and an answer takes several times as long."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from t5_trt.serving.http.record import Record
from t5_trt.serving.http.service import Service

Body = TypeVar("Body", bound=BaseModel)


class BodyRoute(Route):
    """Answers POST. While the queue is full, bodies are refused unread.

    Args:
        path: of the route.
        service: that answers.
        kind: of body.
        answer: (body, record of the request) -> response.
    """

    def __init__(
        self, path: str, service: Service, kind: type[Body], answer: Callable[[Body, Record], Awaitable[Response]]
    ) -> None:
        async def endpoint(request: Request) -> Response:
            service.engine.check_open()
            body = parsed(kind, await request.body(), request.headers.get("content-type", ""))
            return await answer(body, request.state.record)

        super().__init__(path, endpoint, methods=["POST"])
        self.kind = kind

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether it is asked; the scope then names it, as FastAPI's routes do."""
        match, found = super().matches(scope)
        return match, found if match is Match.NONE else {**found, "route": self}


def add_bodies(app: FastAPI, routes: Sequence[BodyRoute]) -> None:
    """Add routes to an application, and to its schema, which FastAPI makes of its own routes only."""
    app.router.routes.extend(routes)
    own = app.openapi

    def schema() -> dict[str, Any]:
        known = app.openapi_schema is not None
        made = own()
        if not known:
            kinds: list[tuple[type[BaseModel], JsonSchemaMode]] = [(route.kind, "validation") for route in routes]
            names, models = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
            made.setdefault("components", {}).setdefault("schemas", {}).update(models.get("$defs", {}))
            for route in routes:
                body = {"required": True, "content": {"application/json": {"schema": names[route.kind, "validation"]}}}
                answers = {"200": {"description": "Successful Response"}, "4XX": {"description": "Error"}}
                made["paths"][route.path] = {"post": {"requestBody": body, "responses": answers}}
        return made

    app.openapi = schema  # type: ignore[method-assign]  # FastAPI's documentation does so


def parsed(kind: type[Body], body: bytes, content_type: str) -> Body:
    """The body of a request.

    Args:
        kind: of body.
        body: the bytes.
        content_type: that the client names.

    Raises:
        RequestValidationError: it is not such a body, in FastAPI's form.
    """
    media, _, _ = content_type.partition(";")
    media = media.strip().lower()
    given: Any = body
    try:
        if media == "application/json" or (media.startswith("application/") and media.endswith("+json")):
            given = json.loads(body)
        return kind.model_validate(given)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(found) from error
    except (ValueError, RecursionError) as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", 0), "msg": "JSON decode error"}]
        ) from error
