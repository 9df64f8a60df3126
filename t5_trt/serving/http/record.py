"""What is known of one HTTP request while it runs, for its log line and the metrics. No texts."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from t5_trt.serving.handle import Handle

#: the status that is logged for a client that left, as nginx has it; nobody is there to get it
CLIENT_LEFT = 499


@dataclass
class Record:
    """One request.

    Attributes:
        id: of the request, also in the header ``X-Request-Id``.
        begin: seconds of ``time.monotonic()``.
        method: of HTTP.
        route: the path's pattern; None where there is none.
        status: of the answer.
        reason: why it was refused, has failed, or lost its client.
        handles: of the engine.
        prompt_tokens: of all texts.
        completion_tokens: of all results; None counts those of the handles.
    """

    method: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    begin: float = field(default_factory=time.monotonic)
    route: str | None = None
    status: int = 0
    reason: str | None = None
    handles: list[Handle] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens that were made for it."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return sum(len(handle.tokens) for handle in self.handles)

    def first_token_s(self) -> list[float]:
        """Seconds from its arrival to the first token of each handle that has one."""
        firsts = [handle.times.first_token for handle in self.handles]
        return [first - self.begin for first in firsts if first is not None]

    def token_s(self) -> list[float]:
        """Seconds of each token behind the first, on average for each handle that has ended."""
        found = []
        for handle in self.handles:
            times, count = handle.times, len(handle.tokens)
            if times.first_token is not None and times.end is not None and count > 1:
                found.append((times.end - times.first_token) / (count - 1))
        return found

    def usage(self) -> dict[str, int]:
        """Its tokens in OpenAI's form."""
        made = self.new_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def line(self) -> dict[str, Any]:
        """The fields of its log line; times in milliseconds."""
        first = self.first_token_s()
        return {
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "reason": self.reason,
            "results": len(self.handles),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "first_token_ms": round(min(first) * 1e3, 1) if first else None,
            "total_ms": round((time.monotonic() - self.begin) * 1e3, 1),
        }
