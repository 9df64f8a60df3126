"""One result of a request: its text, in pieces or whole, up to a stop; how it ended; how many tokens it took."""

from __future__ import annotations

from collections.abc import AsyncIterator

from t5_trt.serving.handle import Handle, length
from t5_trt.serving.http.text import Decoder, TextStream


class Answer:
    """The text of a handle's first result.

    Args:
        handle: of the engine.
        decoder: of the model's tokens.
        stops: texts before which it ends.

    Attributes:
        tokens: new ones, the end token with them.
        finish_reason: "stop" (an end token, or a stop) or "length"; None before the end.
    """

    def __init__(self, handle: Handle, decoder: Decoder, stops: tuple[str, ...] = ()) -> None:
        self._handle, self._decoder, self._stops = handle, decoder, stops
        self.tokens = 0
        self.finish_reason: str | None = None

    async def whole(self) -> str:
        """The text, once it has ended."""
        if self._stops:
            return "".join([piece async for piece in self.pieces()])
        await self._handle.result()
        tokens = self._handle.tokens
        self._end(tokens)
        return self._decoder.text(tokens)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, in parts that are not empty."""
        stream, stopper = TextStream(self._decoder), Stopper(self._stops)
        tokens: list[int] = []
        while more := await self._handle.tokens_after(len(tokens)):
            # with stops one by one, so that the number of tokens does not depend on how many came together
            for some in [[token] for token in more] if self._stops else [more]:
                tokens += some
                if text := stopper.push(stream.push(some)):
                    yield text
                if stopper.stopped:
                    self._handle.cancel()
                    self.tokens, self.finish_reason = len(tokens), "stop"
                    return
        self._end(tokens)
        if text := stopper.push(stream.finish(), last=True):
            yield text
        if stopper.stopped:
            self.finish_reason = "stop"

    def _end(self, tokens: list[int]) -> None:
        self.tokens, ended = length(tokens, self._handle.end_tokens)
        self.finish_reason = "stop" if ended else "length"


class Stopper:
    """Ends a text before the first of some stops.

    Attributes:
        stopped: one was found.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # could be the begin of a stop
        self.stopped = False

    def push(self, piece: str, *, last: bool = False) -> str:
        """Add text; gives what can be said to be before any stop."""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
