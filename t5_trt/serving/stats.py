"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from t5_trt.errors import RequestCancelledError, RequestTimeoutError

_ENDS = {type(None): "completed", RequestCancelledError: "cancelled", RequestTimeoutError: "timed_out"}


@dataclass(frozen=True)
class Stats:
    """What an engine does and has done.

    Attributes:
        waiting: requests without a row.
        running: requests in rows or in a group.
        steps: decoder steps of the rows.
        tokens: new tokens of the rows.
        completed: requests that ended with a result.
        cancelled: by their client, or because it was lost.
        timed_out: after their timeout.
        failed: with another error.
        refused: at once, because too many waited.
    """

    waiting: int = 0
    running: int = 0
    steps: int = 0
    tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    refused: int = 0

    def more(self, **counts: int) -> Stats:
        """These counts and as many more."""
        return replace(self, **{name: getattr(self, name) + count for name, count in counts.items()})

    def ended(self, error: BaseException | None) -> Stats:
        """With one more request that ended so."""
        return self.more(**{_ENDS.get(type(error), "failed"): 1})
