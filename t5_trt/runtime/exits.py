"""What becomes of daemon threads in the middle of a call when the interpreter ends: they stop between two engine runs.

CPython before 3.14 ends a daemon thread when it next asks for the interpreter. If C++ code asks, as torch's does after every
operation, the process aborts ("terminate called without an active exception"); Hugging Face's class does that too. So at exit
such threads are held where no C++ code is on their stack.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: how long the exit waits for threads that do not come to a place where they can stop (the stock model's loop, a long run)
PATIENCE_S = 5.0

_busy: set[int] = set()  # threads inside a call of a model
_leaving = False


@contextmanager
def at_work() -> Iterator[None]:
    """A call of a model; calls within calls do not count."""
    pause_at_exit()
    thread = threading.get_ident()
    outermost = thread not in _busy
    _busy.add(thread)
    try:
        yield
    finally:
        if outermost:
            _busy.discard(thread)


def pause_at_exit() -> None:
    """Stop for good if the interpreter is ending and this thread does not keep it from that."""
    if _leaving and threading.current_thread().daemon:
        _busy.discard(threading.get_ident())
        forever = threading.Lock()
        forever.acquire()
        forever.acquire()


@atexit.register
def _wait_for_threads() -> None:
    global _leaving
    _leaving = True
    end = time.monotonic() + PATIENCE_S
    while _busy - {threading.get_ident()} and time.monotonic() < end:
        time.sleep(0.001)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_busy.clear)  # only the thread that forks goes on there
