"""How the command reports errors: one line on standard error and an exit status, with a traceback on request."""

from __future__ import annotations

import os
import sys
import traceback

from t5_trt.errors import T5TRTError, causes

DEBUG = "T5_TRT_DEBUG"
#: exit statuses as of shells for a process ended by a signal: Ctrl-C, and a pipe closed by its reader
INTERRUPTED, PIPE_CLOSED = 130, 141


def report(error: BaseException) -> int:
    """Print one line about an error.

    Args:
        error: that ended the command.

    Returns:
        The status to end with.
    """
    if isinstance(error, BrokenPipeError):
        drop_output()
        return PIPE_CLOSED
    try:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exception(error)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        print(f"error: {_line(error)}", file=sys.stderr)
    except BrokenPipeError:  # standard error is closed
        drop_output()
    return 1


def drop_output() -> None:
    """Discard unwritten output; otherwise Python reports an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, T5TRTError):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory ({text or 'no more is there'}). Try smaller batches, or fewer beams. {DEBUG}=1 shows where."
        )
    return f"{type(error).__name__}: {text} ({DEBUG}=1 shows the traceback)"
