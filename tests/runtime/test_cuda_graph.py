"""Recording, with torch's CUDA calls exchanged for ones that note what happens; tests/gpu/test_recording.py has the real ones."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5_trt.runtime import cuda_graph
from t5_trt.runtime.cuda_graph import WARM_UPS, CaptureError, GraphMemory, capture, outside_capture

DEVICE = torch.device("cpu")  # where a probe may lie; no call of CUDA's is made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was called, in order; "capture" stands for a recording that has begun."""
    noted: list[Any] = []

    class Stream:
        device = SimpleNamespace(index=0)

        def wait_stream(self, other: Any) -> None:
            noted.append("wait")

    home, pools = Stream(), iter(range(1, 99))

    @contextmanager
    def graph(captured: Any, pool: Any = None, **options: Any) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        noted.append(("capture", pool))
        yield
        noted.append("end")

    def refuse(*_: Any) -> None:
        noted.append("released")

    cuda = {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: home,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: noted.append("home" if stream is home else "elsewhere"),
        "synchronize": lambda device: None,
        "CUDAGraph": SimpleNamespace,
        "graph": graph,
        "graph_pool_handle": lambda: next(pools),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, refuse, raising=False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, enabled=True: nullcontext())
    monkeypatch.setattr(cuda_graph, "_failed", [])
    monkeypatch.setattr(cuda_graph, "_own_stream", lambda device: Stream())
    cuda_graph._side_stream.cache_clear()
    return noted


def test_warm_ups_then_a_capture(calls: list[Any]) -> None:
    memory, collects = GraphMemory(), []

    def work() -> None:
        collects.append(gc.isenabled())
        with outside_capture():  # the recording thread is not kept waiting by itself
            calls.append("work")

    capture(work, DEVICE, memory)
    capture(work, DEVICE, memory)
    once = ["wait", *["work"] * WARM_UPS, "wait", ("capture", 1), "work", "end"]
    assert calls == 2 * once and not cuda_graph._failed
    assert collects == 2 * [*[True] * WARM_UPS, False] and gc.isenabled()
    capture(work, DEVICE)
    assert ("capture", 2) in calls  # a memory of its own


def test_each_memory_has_a_stream_of_its_own(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So cuBLAS's workspace, which torch allocates once for a stream, lies in that memory."""
    streams: list[Any] = []

    @contextmanager
    def graph(captured: Any, *, stream: Any, **_: Any) -> Iterator[None]:
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    first, second = GraphMemory(), GraphMemory()
    for memory in (first, first, second):
        capture(lambda: None, DEVICE, memory)
    first.give_up()
    capture(lambda: None, DEVICE, first)
    assert streams[0] is streams[1] and len({id(stream) for stream in streams}) == 3


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("draws", [True, False])
def test_work_that_draws_nothing_leaves_the_generators_to_other_threads(
    monkeypatch: pytest.MonkeyPatch, draws: bool
) -> None:
    forked: list[bool] = []

    def fork(devices: Any, enabled: bool = True) -> Any:
        forked.append(enabled)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    capture(lambda: None, DEVICE, draws=draws)
    assert forked == [draws]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), CaptureError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["not permitted", "memory", "Ctrl-C"],
)
def test_capture_that_fails(calls: list[Any], raised: BaseException, seen: type[BaseException]) -> None:
    """The pool is used up, the stream is the caller's again, a capture that succeeds follows, and the next one can begin."""
    memory, runs = GraphMemory(), []

    def work() -> None:
        runs.append(1)
        if len(runs) == WARM_UPS + 1:
            raise raised

    with pytest.raises(seen) as error:
        capture(work, DEVICE, memory)
    if seen is CaptureError:
        assert str(error.value) == "RuntimeError: operation not permitted when stream is capturing"
    assert calls == ["wait", "wait", ("capture", 1), "home", "released", "released", ("capture", None), "end"]
    assert len(cuda_graph._failed) == 1 and gc.isenabled() and not cuda_graph._alone.locked()
    del calls[:], error
    capture(lambda: None, DEVICE, memory)
    assert ("capture", 2) in calls


def test_warm_up_that_fails(calls: list[Any]) -> None:
    """That is the work's own error."""
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 // 0, DEVICE)  # type: ignore[arg-type,return-value]
    assert calls == ["wait"] and not cuda_graph._alone.locked()


def test_draws_wait_for_a_capture_of_another_thread(calls: list[Any]) -> None:
    drawn = []

    def draw() -> None:
        with outside_capture():
            drawn.append(len(runs))

    runs: list[int] = []
    other = threading.Thread(target=draw)

    def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            other.start()
            other.join(0.2)

    capture(work, DEVICE)
    other.join(10)
    assert drawn == [WARM_UPS + 1]


def test_nothing_is_kept_by_a_failure(calls: list[Any]) -> None:
    """Neither the work nor what it holds."""
    held = [torch.zeros(1)]
    runs: list[int] = []

    def attempt(kept: Any) -> None:
        def work() -> None:
            runs.append(id(kept))
            if len(runs) == WARM_UPS + 1:
                raise RuntimeError("operation not permitted")

        with pytest.raises(CaptureError):
            capture(work, DEVICE)

    gone = weakref.ref(held[0])
    gc.collect()
    gc.disable()
    try:
        attempt(held.pop())
        assert gone() is None
    finally:
        gc.enable()
