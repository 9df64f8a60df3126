"""Chooses the encoder for each size in a TensorRT session: the engine or that of the backend "cuda", whichever was measured to be faster.

Both read the same weights, so the second form needs memory only for its buffers. The measured times are stored with the engine.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from t5_trt.engine.profiles import Shapes
from t5_trt.engine.provider import EngineProvider
from t5_trt.graph.signature import ENCODER
from t5_trt.runtime.cuda_graph import at_home
from t5_trt.runtime.gpu_encoder import GpuEncoder
from t5_trt.runtime.tensorrt_encoder import Encoders
from t5_trt.runtime.tensorrt_engines import Key, TrtEngines
from t5_trt.runtime.torch_layers import TorchEncoder

logger = logging.getLogger("t5_trt")

#: a form's time is the best of so many rounds of so many calls
ROUNDS, CALLS = 3, 5
#: warm-up calls: the second one captures a graph, the third one replays it
WARM_UPS = 3
#: held by a thread that checks or times an engine: Python aborts a process that exits while a daemon thread is inside of torch
_inside_torch = threading.Lock()
EXIT_S = 5.0


@atexit.register
def _wait_for_builder() -> None:
    _inside_torch.acquire(timeout=EXIT_S)  # and prevent the next one from starting


class EncoderForms:
    """Chooses an encoder by size; with `background`, a thread builds engines one after the other while requests go on.

    Args:
        engines: of the session.
        encoders: run them.
        make_own: the encoder of the backend "cuda" over the engines' weights; called when it is first needed.
        turn: gives the session's turn on the GPU. It must not keep the session alive.
        background: serve sizes without an engine by our own form until the engine is built.
    """

    def __init__(
        self,
        engines: TrtEngines,
        encoders: Encoders,
        make_own: Callable[[], TorchEncoder],
        turn: Callable[[], AbstractContextManager[None]],
        *,
        background: bool,
    ) -> None:
        self.background = background
        self._engines, self._encoders, self._make_own, self._turn = engines, encoders, make_own, turn
        self._device = engines.weights.device
        self._own: GpuEncoder | None = None
        self._own_is_faster: dict[Key, bool] = {}
        self._judges: set[int] = set()  # threads that check or time an engine, which must use that engine
        self._guard = threading.Lock()  # of the three below
        self._begun: set[Key] = set()
        self._queue: list[Key] = []
        self._builder: threading.Thread | None = None

    @property
    def own(self) -> GpuEncoder:
        """Our own form; only for a thread that has the session's turn."""
        if self._own is None:
            self._own = GpuEncoder(self._make_own(), self._device)
        return self._own

    def opened(self) -> tuple[str, ...]:
        """The name of our own form, if it was used."""
        return () if self._own is None else (self._own.form.name,)

    def clear(self) -> None:
        """Drop what our own form captured."""
        if self._own is not None:
            self._own.clear()

    def own_serves(self, graph: str, shapes: Shapes) -> bool:
        """Whether our own form serves a request of a bucket now; measures it, or starts to, if that is not known.

        Raises:
            BackendError: the engine cannot be built, or is wrong; not with `background`.
        """
        if threading.get_ident() in self._judges:
            return False
        known = self._own_is_faster.get((graph, shapes))
        if known is not None:
            return known
        key = self._engines.key(graph, shapes)
        if key in self._begun:  # and not over
            return self._own_is_faster.get(key, True)
        if key not in self._own_is_faster:
            times = self._engines.provider.times(*key)
            if times is not None:
                self._own_is_faster[key] = times["kernels"] < times["engine"]
            elif self.background:
                self._begin(key)
                return True
            else:
                with self._turn(), self._judging():
                    if key not in self._own_is_faster:  # another thread did it
                        self._engines.load(*key)
                        # an engine that another process built without timing is used as is
                        self._own_is_faster[key] = key in self._engines.built and self._compare(key)
        self._own_is_faster[graph, shapes] = self._own_is_faster[key]
        return self._own_is_faster[key]

    def wait(self) -> None:
        """Wait until all engines built in the background are in use."""
        builder = self._builder
        if builder is not None:
            builder.join()

    def _begin(self, key: Key) -> None:
        with self._guard:
            if key in self._begun:
                return
            self._begun.add(key)
            self._queue.append(key)
            if self._builder is None:
                work = (weakref.ref(self), self._engines.provider)
                self._builder = threading.Thread(target=_build, args=work, name="t5_trt-builds", daemon=True)
                self._builder.start()

    def _next(self) -> Key | None:
        """The next engine to build; None ends the thread."""
        with self._guard:
            if self._queue:
                return self._queue.pop(0)
            self._builder = None
            return None

    def _settle(self, key: Key, failure: Exception | None) -> None:
        """Start to use a newly built engine, if it is correct and faster."""
        own_is_faster = True
        if failure is None:
            try:
                with at_home(self._device), self._judging():
                    self._engines.load(*key)  # takes the session's turn only for its own runs
                    with self._turn():
                        own_is_faster = self._compare(key)
            except ReferenceError:  # the model was deleted
                return
            except Exception as error:
                failure = error
        if failure is not None:
            words = "there is no engine for %s %s: %s. This process goes on without it."
            logger.warning(words, key[0], key[1].describe(), str(failure).rstrip("."))
        self._own_is_faster[key] = own_is_faster

    def _compare(self, key: Key) -> bool:
        """Whether our own form is faster at the full size of a loaded engine; frees the memory of the slower one."""
        engine_ms, own_ms = self._times_ms(*key)
        faster = own_ms < engine_ms
        self._engines.provider.keep_times(*key, {"engine": engine_ms, "kernels": own_ms})
        size, winner = key[1].describe(), "our own form" if faster else "the engine"
        logger.info(
            "encoder %s: the engine takes %.3f ms, our own form %.3f; %s serves it", size, engine_ms, own_ms, winner
        )
        if faster:
            self._encoders.drop(*key)
            self._engines.drop(key)
        else:
            self.own.clear()
        return faster

    def _times_ms(self, graph: str, shapes: Shapes) -> tuple[float, float]:
        arch, generator = self._engines.provider.arch, torch.Generator().manual_seed(0)
        ids = torch.randint(0, arch.vocab_size, (shapes.B, shapes.S), generator=generator).to(self._device)
        embeds = None
        if graph != ENCODER:
            embeds = torch.randn((shapes.B, shapes.S, arch.d_model), generator=generator).to(self._device)
        given = None if embeds is not None else ids, embeds, torch.ones_like(ids)
        works: tuple[Callable[[], object], ...] = (
            lambda: self._encoders.encode(graph, shapes, *given),
            lambda: self.own.encode(*given),
        )
        for work in works:
            for _ in range(WARM_UPS):
                work()
        rounds = [[self._round_ms(work) for work in works] for _ in range(ROUNDS)]
        engine_ms, own_ms = (min(times) for times in zip(*rounds, strict=True))
        return engine_ms, own_ms

    def _round_ms(self, work: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            work()
        self._synchronize()
        return (time.perf_counter() - start) * 1e3 / CALLS

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def _judging(self) -> Iterator[None]:
        thread = threading.get_ident()
        self._judges.add(thread)
        try:
            yield
        finally:
            self._judges.discard(thread)


def _build(reference: weakref.ref[EncoderForms], provider: EngineProvider) -> None:
    """The body of the thread; it does not keep the model alive while an engine is built."""
    while (forms := reference()) is not None and (key := forms._next()) is not None:
        del forms
        failure = None
        try:
            provider.plan(*key)
        except Exception as error:
            failure = error
        forms = reference()
        if forms is None:
            return
        with _inside_torch:
            forms._settle(key, failure)
        del forms
