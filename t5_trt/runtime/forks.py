"""Engines after a fork: the child abandons its parent's engines, and opens new ones when it needs them.

A fork copies memory, but only the thread that forks. ONNX Runtime's pools have no threads in the child, so running
one of its parent's graphs would wait for ever, and so would taking a pool down; a lock that another thread held stays held.
torch's OpenMP pool is lost in the same way. CUDA does not survive a fork at all.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, Protocol

import torch

from t5_trt.errors import BackendError


class Forkable(Protocol):
    """An object with engines or locks."""

    def after_fork(self) -> None:
        """Called in the child: replace locks, `abandon` engines."""
        ...


_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_forks(owner: Forkable) -> None:
    """Have ``owner.after_fork()`` called in every process that is forked while the owner lives."""
    _watched.add(owner)


def abandon(engines: object) -> None:
    """In a child: keep the parent's engines until the process ends, so that nothing tries to destroy them.

    Where there were engines, torch has run in several threads too, and would wait for them at its next large operation; so it
    is told to use one, as DataLoader does in its workers.
    """
    if engines is None:
        return
    torch.set_num_threads(1)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engines))


def check_cuda_after_fork() -> None:
    """Check that CUDA can be used in this process.

    Raises:
        BackendError: the process was forked from one that had used the GPU.
    """
    if torch.cuda._is_in_bad_fork():
        raise BackendError(
            "this process was forked from one that had used the GPU, and CUDA cannot go on in it. Start workers with the "
            "'spawn' method (multiprocessing.get_context('spawn'), DataLoader(..., multiprocessing_context='spawn')), or fork "
            "before the GPU is used."
        )


def _after_fork_in_child() -> None:
    for owner in list(_watched):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
