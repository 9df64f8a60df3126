"""``/v1``: completions and models as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from t5_trt.serving.http.answer import Answer
from t5_trt.serving.http.bodies import BodyRoute
from t5_trt.serving.http.events import event, merged, streamed
from t5_trt.serving.http.failures import RequestError, invalid
from t5_trt.serving.http.record import Record
from t5_trt.serving.http.service import Seed, Service

#: temperatures below it are greedy search, as 0 is: divided by them, logits overflow
_COLDEST = 0.01
#: stops of a request, and characters of each
_STOPS, _STOP = 16, 1000
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None, 1), "the server returns all n results."),
    "echo": ((None, False), "T5 does not continue its prompt."),
    "frequency_penalty": ((None, 0), "/generate has repetition_penalty and no_repeat_ngram_size."),
    "logit_bias": ((None, {}), "/generate has sequence_bias and suppress_tokens."),
    "logprobs": ((None,), "the server returns no scores."),
    "presence_penalty": ((None, 0), "/generate has repetition_penalty."),
    "suffix": ((None, ""), "T5 has no text behind the result."),
}


def _check_prompt(prompt: Any) -> Any:
    """Texts or lists of token ids, one or more; a list of one kind."""

    def is_tokens(item: Any) -> bool:
        return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)

    if isinstance(prompt, str) or is_tokens(prompt):
        return prompt
    if (
        isinstance(prompt, list)
        and prompt
        and (all(isinstance(each, str) for each in prompt) or all(map(is_tokens, prompt)))
    ):
        return prompt
    raise ValueError(
        "expected a text, a list of texts, a list of token ids, or a list of such lists; none of them empty"
    )


def _check_stop(stop: Any) -> Any:
    """A text or several; each new piece of text is compared with all of them."""
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None or (
        isinstance(stops, list)
        and len(stops) <= _STOPS
        and all(isinstance(each, str) and 0 < len(each) <= _STOP for each in stops)
    ):
        return stop
    raise ValueError(f"expected a text or up to {_STOPS} texts, each of 1 to {_STOP} characters")


class StreamOptions(BaseModel):
    """What a stream has besides texts."""

    include_usage: bool = False


class CompletionBody(BaseModel):
    """Of a request. What is not named is as in the model's ``generation_config``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1)
    seed: Seed | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    presence_penalty: Any = None
    suffix: Any = None

    def check(self, service: Service) -> None:
        """Refuse what the server does not do.

        Raises:
            RequestError: saying what.
        """
        if self.model not in (None, service.name):
            raise model_missing(service)
        for name, (neutral, advice) in _REFUSED.items():
            value = getattr(self, name)
            if isinstance(value, bool) and name != "echo":
                raise invalid(f"{name} got a boolean; expected a number, or nothing.", name)
            if value not in neutral and not (name == "best_of" and value == self.n):
                raise invalid(f"{name} is not supported: {advice} Leave it out.", name)
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only for stream=true.", "stream_options")
        count, most = len(self.prompts) * (self.n or 1), service.limits.results
        if count > most:
            raise invalid(f"texts times n got {count}; expected at most {most}.", "n" if self.n else "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each text or list of token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item, arg-type]

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which a result ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def settings(self) -> dict[str, Any]:
        """Of ``generate()``."""
        found: dict[str, Any] = {"num_return_sequences": 1}
        cut = self.top_p is not None and self.top_p < 1
        if self.temperature is not None and self.temperature < _COLDEST:
            found |= {"do_sample": False, "num_beams": 1}
        elif self.temperature is not None or cut:
            asked = {"temperature": self.temperature, "top_p": self.top_p}
            found |= {"do_sample": True, "num_beams": 1}
            found |= {name: value for name, value in asked.items() if value is not None}
        if self.max_tokens is not None:
            found["max_new_tokens"] = self.max_tokens
        return found


def model_missing(service: Service) -> RequestError:
    """The error for another model's name."""
    return RequestError(404, "model_not_found", f"this server has one model, {service.name!r}.", "model")


class Completion:
    """One request that runs.

    Args:
        service: that it asks.
        body: what it asks.
        record: of the HTTP request.
    """

    def __init__(self, service: Service, body: CompletionBody, record: Record) -> None:
        self._service, self._body, self._record = service, body, record
        self._created = int(time.time())
        self._answers: list[Answer] = []
        body.check(service)
        settings = service.limited(body.settings())
        for ids in [service.read(record, prompt, "prompt") for prompt in body.prompts]:
            for number in range(body.n or 1):
                seed = None if body.seed is None else body.seed + number
                handle = service.submit(record, ids, settings, seed)
                self._answers.append(Answer(handle, service.decoder, body.stops))

    async def whole(self) -> dict[str, Any]:
        """The answer, once all is there."""
        texts = await asyncio.gather(*(answer.whole() for answer in self._answers))
        choices = [
            self._choice(number, text, answer.finish_reason)
            for number, (text, answer) in enumerate(zip(texts, self._answers, strict=True))
        ]
        self._count()
        return self._frame(choices, usage=self._record.usage())

    async def events(self) -> AsyncIterator[str]:
        """The answer in pieces."""
        with_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        async for number, piece in merged(self._answers):
            reason = self._answers[number].finish_reason if piece is None else None
            yield event(self._frame([self._choice(number, piece or "", reason)], **more))
        self._count()
        if with_usage:
            yield event(self._frame([], usage=self._record.usage()))
        yield event("[DONE]")

    def _count(self) -> None:
        self._record.completion_tokens = sum(answer.tokens for answer in self._answers)

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        name, made = self._service.name, self._created
        return {
            "id": f"cmpl-{self._record.id}",
            "object": "text_completion",
            "created": made,
            "model": name,
            "choices": choices,
            **more,
        }

    @staticmethod
    def _choice(number: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def completions(service: Service) -> BodyRoute:
    """The route ``/v1/completions``."""

    async def complete(body: CompletionBody, record: Record) -> Response:
        completion = Completion(service, body, record)
        if body.stream:
            return await streamed(completion.events(), record)
        return JSONResponse(await completion.whole())

    return BodyRoute("/v1/completions", service, CompletionBody, complete)


def models(service: Service) -> APIRouter:
    """The routes below ``/v1/models``."""
    router = APIRouter(prefix="/v1")
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "t5_trt"}

    @router.get("/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name:path}")
    async def model_of(name: str) -> dict[str, Any]:
        if name != service.name:
            raise model_missing(service)
        return model

    return router
