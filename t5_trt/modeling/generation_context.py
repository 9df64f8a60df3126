"""Tells the parts of a model which call of ``generate()`` they work for.

Transformers' ``generate()`` calls the encoder module and ``forward()`` itself, and refuses or copies arguments that it does not know.
So the context is no argument but a context variable: it belongs to one thread, and to one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from t5_trt.generation.prepared import RequestKey


@dataclass(frozen=True)
class GenerationContext:
    """One running call of ``generate()``. It has looked for changed weights, and runs on engines in training mode too.

    Attributes:
        model_runner: of the model that generates.
        rows_per_source: decoder rows of each batch entry: beams, or returned sequences.
        key: under which its preparation may be kept, see `t5_trt.generation.prepared`.
        outer: the call that this one runs inside of: an assistant generates within the model's own call.
    """

    model_runner: object
    rows_per_source: int
    key: RequestKey | None
    outer: GenerationContext | None


_running: ContextVar[GenerationContext | None] = ContextVar("t5_trt_generation", default=None)


@contextmanager
def generating(model_runner: object, rows_per_source: int, key: RequestKey | None) -> Iterator[None]:
    """Run a block as a part of one call of ``generate()``; arguments as of `GenerationContext`."""
    before = _running.get()
    try:
        _running.set(GenerationContext(model_runner, rows_per_source, key, before))
        yield
    finally:
        _running.set(before)


def generation_of(model_runner: object) -> GenerationContext | None:
    """The call of ``generate()`` that a model is in, in this thread; None outside of one."""
    context = _running.get()
    while context is not None and context.model_runner is not model_runner:
        context = context.outer
    return context
