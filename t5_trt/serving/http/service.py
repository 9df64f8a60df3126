"""The model that a server has, and what a request may ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from t5_trt.generation.search_settings import length_limit
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.serving.engine import Engine
from t5_trt.serving.handle import Handle
from t5_trt.serving.http.failures import RequestError, invalid
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.metrics import Metrics
from t5_trt.serving.http.record import Record
from t5_trt.serving.http.text import Decoder

#: of random draws, as far as torch's generators take it
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
#: new tokens of a request that names no number, of a checkpoint that names none
_NEW_TOKENS = 128


class Service:
    """A model, its engine and its tokenizer behind a name.

    Args:
        model: that is served.
        tokenizer: of the model.
        name: that clients call it by.
        limits: of one request.
        max_rows: see `t5_trt.serving.engine.Engine`.
        max_waiting: likewise.

    Attributes:
        ready: a request has gone through.
    """

    def __init__(
        self,
        model: TRTT5ForConditionalGeneration,
        tokenizer: Any,
        name: str,
        limits: Limits,
        *,
        max_rows: int = 16,
        max_waiting: int = 256,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.engine = Engine(model, max_rows=max_rows, max_waiting=max_waiting)
        self.metrics, self.decoder = Metrics(self.engine), Decoder(tokenizer)
        self.created = int(time.time())
        self.ready = False
        self._tokenizer = tokenizer
        self._warm_rows = min(max_rows, max_waiting)

    @property
    def failed(self) -> bool:
        """Whether the engine has ended by itself, after an error of its backend: another process has to be started."""
        return self.ready and self.engine.closed

    def read(self, record: Record, source: str | list[int], param: str) -> list[int]:
        """The token ids of one text.

        Args:
            record: of the HTTP request.
            source: text, or token ids as they are.
            param: the field that has it.

        Raises:
            RequestError: there are too many.
        """
        ids = self._tokenizer(source, verbose=False)["input_ids"] if isinstance(source, str) else source
        if len(ids) > self.limits.source_tokens:
            message = f"{param} got {len(ids)} tokens; expected at most {self.limits.source_tokens}."
            raise RequestError(400, "context_length_exceeded", message, param)
        record.prompt_tokens += len(ids)
        return ids

    def submit(self, record: Record, ids: list[int], settings: Mapping[str, Any], seed: int | None) -> Handle:
        """Give the engine one text, with the time that a request has.

        Args:
            record: of the HTTP request.
            ids: of the text.
            settings: of ``generate()``.
            seed: of its draws.
        """
        handle = self.engine.submit(ids, seed=seed, timeout=self.limits.seconds, **settings)
        record.handles.append(handle)
        return handle

    def limited(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings whose number of new tokens is within the limit: the client's, else the checkpoint's or a default.

        Raises:
            RequestError: the client asks for more.
        """
        config, most = self.model.generation_config, self.limits.new_tokens
        asked = settings.get("max_new_tokens")
        if asked is None and config.max_new_tokens is None and isinstance(settings.get("max_length"), int):
            asked = settings["max_length"] - 1  # without the decoder's first token
        if asked is None:
            usual = config.max_new_tokens or (config.max_length - 1 if config.max_length else _NEW_TOKENS)
            named = {name: value for name, value in settings.items() if value is not None or name != "max_new_tokens"}
            return {**length_limit(config, min(usual, most)), **named}
        if isinstance(asked, int | float) and asked > most:
            raise invalid(f"new tokens got {asked}; expected at most {most}.", "max_tokens")
        return dict(settings)

    async def warm_up(self) -> None:
        """Fill all rows once, so that the first clients do not wait for what is made at its first use."""
        settings = {"num_beams": 1, "num_return_sequences": 1, **length_limit(self.model.generation_config, 2)}
        handles = [self.engine.submit(self._tokenizer("a"), **settings) for _ in range(self._warm_rows)]
        for handle in handles:
            await handle.result()
        self.ready = True

    async def close(self, grace: float) -> None:
        """Take no more requests, and end those that are there after some seconds."""
        self.ready = False
        await asyncio.to_thread(self.engine.close, grace)
