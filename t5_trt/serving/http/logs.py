"""Logs of one JSON object a line. Texts of requests never get into them: of errors they have the kind and the place."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

import transformers


class JsonLines(logging.Formatter):
    """A record as one line of JSON; ``extra={"fields": {...}}`` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        made = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": made, "level": record.levelname, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _places(record.exc_info[1])  # its message may quote a text
        return json.dumps(line, ensure_ascii=False)


def install() -> None:
    """Write all logs of this process, and Python's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("t5_trt").setLevel(logging.INFO)
    logging.captureWarnings(True)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()


def _places(error: BaseException) -> list[str]:
    """The kinds of an error and of what it came from, and where each was raised."""
    found = []
    cause: BaseException | None = error
    while cause is not None:
        kind = type(cause)
        frames = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)
        ]
        found.append(" < ".join([f"{kind.__module__}.{kind.__qualname__}", *reversed(frames)]))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found
