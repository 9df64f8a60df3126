"""torch's own threads beside those of ONNX Runtime."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch's operations of this thread, and of no other, run without further threads.

    After an operation torch's threads wait busily for another one, on cores that ONNX Runtime's next step needs. `torch.set_num_threads`
    would hold for the whole process; GNU's and LLVM's OpenMP keep the number for each thread. Where torch has another library, nothing
    changes.
    """
    before, set_threads = torch.get_num_threads(), _set_threads()
    if before == 1 or set_threads is None:
        yield
        return
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _set_threads() -> Callable[[int], None] | None:
    """OpenMP's function for the calling thread, from the library that torch has loaded for all, if there is one."""
    if sys.platform == "win32" or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
