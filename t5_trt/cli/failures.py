"""How the command ends when something goes wrong: one line on standard error and a status; the traceback where it is asked for."""

from __future__ import annotations

import os
import sys
import traceback

from t5_trt.errors import T5TRTError, causes

DEBUG = "T5_TRT_DEBUG"
#: statuses as shells give them for a process that a signal ended: Ctrl-C, and a reader that has closed the pipe
INTERRUPTED, PIPE_CLOSED = 130, 141


def report(error: BaseException) -> int:
    """Say in one line what went wrong.

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
    except BrokenPipeError:  # nobody reads standard error
        drop_output()
    return 1


def drop_output() -> None:
    """Let what is still to be written go nowhere; else Python complains at its end."""
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
