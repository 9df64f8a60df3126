"""The call of ``generate()`` that the parts of a model currently work for.

Transformers' ``generate()`` calls the encoder module and ``forward()`` itself, and rejects or copies unknown arguments. So the
context is a context variable instead of an argument: it belongs to one thread and one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from t5_trt.generation.prepared import RequestKey


@dataclass(frozen=True)
class GenerationContext:
    """One running call of ``generate()``. It has checked for changed weights, and runs on engines even in training mode.

    Attributes:
        model_runner: of the model that generates.
        rows_per_source: decoder rows of each batch entry: beams, or returned sequences.
        key: of its preparation in `t5_trt.generation.prepared`.
        outer: the enclosing call: an assistant model generates within the main model's call.
    """

    model_runner: object
    rows_per_source: int
    key: RequestKey | None
    outer: GenerationContext | None


_running: ContextVar[GenerationContext | None] = ContextVar("t5_trt_generation", default=None)


@contextmanager
def generating(model_runner: object, rows_per_source: int, key: RequestKey | None) -> Iterator[None]:
    """Run a block as part of one call of ``generate()``; arguments as of `GenerationContext`."""
    before = _running.get()
    try:
        _running.set(GenerationContext(model_runner, rows_per_source, key, before))
        yield
    finally:
        _running.set(before)


def generation_of(model_runner: object) -> GenerationContext | None:
    """The call of ``generate()`` that this thread runs for a model; None outside of one."""
    context = _running.get()
    while context is not None and context.model_runner is not model_runner:
        context = context.outer
    return context
