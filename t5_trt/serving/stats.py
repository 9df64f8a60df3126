"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from t5_trt.errors import RequestCancelledError, RequestTimeoutError

_ENDS = {type(None): "completed", RequestCancelledError: "cancelled", RequestTimeoutError: "timed_out"}


@dataclass(frozen=True)
class Stats:
    """Counts of requests, steps and tokens.

    Attributes:
        waiting: requests without a row.
        running: requests in rows or in a group.
        steps: decoder steps of the rows.
        tokens: new tokens of the rows.
        completed: requests that ended with a result.
        cancelled: requests cancelled by their client, or because it disconnected.
        timed_out: requests that ended after their timeout.
        failed: requests that ended with another error.
        refused: requests refused because the queue was full.
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


def end_named(error: BaseException | None) -> str:
    """The field of `Stats` that counts a request which ended with an error, or with None."""
    return _ENDS.get(type(error), "failed")
