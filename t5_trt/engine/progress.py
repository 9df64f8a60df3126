"""Progress of builds: one bar per engine on a terminal, log lines otherwise."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger("t5_trt")


class BuildProgress:
    """A context manager around one build.

    Args:
        label: what is built.
        show: draw a bar; None does so on a terminal only.
    """

    def __init__(self, label: str, show: bool | None = None) -> None:
        self.label = label
        self._show = sys.stderr.isatty() if show is None else show
        self._phase = "starting"
        self._bar: tqdm[None] | None = None
        self._done = threading.Event()
        self._clock: threading.Thread | None = None
        self._started = 0.0

    def __enter__(self) -> BuildProgress:
        self._started = time.monotonic()
        logger.info("building the engine %s", self.label)
        if self._show:
            layout = "{desc} {bar} {postfix} [{elapsed}]"
            self._bar = tqdm(total=1, desc=f"building {self.label}", bar_format=layout, leave=False, dynamic_ncols=True)
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._clock is not None:
            self._clock.join()
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            logger.info("built the engine %s in %.1f s", self.label, time.monotonic() - self._started)

    def update(self, phase: str, step: int, steps: int) -> None:
        """Show a report of the build process."""
        self._phase = phase
        if self._bar is not None and steps:
            self._bar.total, self._bar.n = steps, step
            self._bar.set_postfix_str(phase)

    def _tick(self) -> None:
        """TensorRT 8 reports nothing: the elapsed time shows that the build is alive."""
        assert self._bar is not None
        while not self._done.wait(0.5):
            self._bar.set_postfix_str(self._phase)
            self._bar.refresh()
