"""Watches the parts of a call on a GPU through what sessions offer: when its steps are launched, and what is captured."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from t5_trt.runtime import cuda_graph


class Launches:
    """Notes when a call starts, launches each of its steps, and ends, on the host's clock and on the GPU's.

    Args:
        session: of the model; its programs are watched inside of the ``with`` block.
    """

    def __init__(self, session: Any) -> None:
        self._session, self._make = session, session.generation_step
        self._watched: list[Any] = []
        #: of every launch: before and after it, by the host's clock
        self.host: list[tuple[float, float]] = []
        self._events: list[Any] = []

    def __enter__(self) -> Launches:
        self._session.generation_step = self._program
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session.generation_step  # the class's own shows again
        for program in self._watched:
            program.__dict__.pop("launch", None)

    def run(self, call: Callable[[], Any]) -> None:
        """Make a call."""
        torch.cuda.synchronize()
        self._mark()
        self.start = time.perf_counter()
        call()
        self.returned = time.perf_counter()
        self._mark()
        torch.cuda.synchronize()
        if not self.host:
            raise RuntimeError("no step was launched through Session.generation_step")

    def parts(self) -> dict[str, float]:
        """Milliseconds of the call's parts. "Before": from the call on; "launch": of one step; "after": until the call returns."""
        begin, *steps, end = self._events
        launches = sorted(after - before for before, after in self.host)
        return {
            "host before the steps": (self.host[0][0] - self.start) * 1e3,
            "host launch of a step": launches[len(launches) // 2] * 1e3,
            "host after the last launch": (self.returned - self.host[-1][1]) * 1e3,
            "GPU before the steps": begin.elapsed_time(steps[0]),
            "GPU steps": steps[0].elapsed_time(steps[-1]),
            "GPU after the steps": steps[-1].elapsed_time(end),
        }

    def steps_us(self) -> list[float]:
        """The GPU's time for each step, with what it waited for the host before the next one."""
        marks = self._events[1:-1]
        return [left.elapsed_time(right) * 1e3 for left, right in itertools.pairwise(marks)]

    def _program(self, *arguments: Any, **named: Any) -> Any:
        program = self._make(*arguments, **named)
        launch = type(program).launch
        if program not in self._watched:
            self._watched.append(program)

        def timed() -> None:
            if not self.host:
                self._mark()
            before = time.perf_counter()
            launch(program)
            self.host.append((before, time.perf_counter()))
            self._mark()

        program.launch = timed
        return program

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


class Captures:
    """Times every capture of a CUDA graph inside of the ``with`` block, warm-ups included."""

    def __init__(self) -> None:
        self.times_ms: list[float] = []
        self._patched: list[Any] = []

    def __enter__(self) -> Captures:
        for name, module in list(sys.modules.items()):
            if name.startswith("t5_trt.") and getattr(module, "capture", None) is cuda_graph.capture:
                self._patched.append(module)
        self._capture = cuda_graph.capture
        for module in self._patched:
            module.capture = self._timed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._patched:
            module.capture = self._capture

    def _timed(self, *arguments: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return self._capture(*arguments, **named)
        finally:
            self.times_ms.append(round((time.perf_counter() - start) * 1e3, 3))
