"""Capturing GPU work as one CUDA graph, so that a step costs one launch instead of hundreds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from t5_trt.errors import BackendError, causes, raise_hidden_interrupt
from t5_trt.kernels.compile import bindings, checked

WARM_UPS = 3  # TensorRT allocates lazily in its first runs; that must be done before a capture
#: held during captures: torch's allocator cannot serve two at once or release memory during one, nor can its generator draw
_alone = threading.Lock()
_capturing_thread: int | None = None  # the thread that captures
#: graphs whose capture failed: the allocator keeps a pointer to each
_failed: list[torch.cuda.CUDAGraph] = []


class CaptureError(RuntimeError):
    """Work ran, but cannot be part of a CUDA graph, for example because it waits for the GPU."""


class GraphMemory:
    """Memory shared by CUDA graphs that never run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """A stream for these captures alone, so that cuBLAS's workspace, which torch allocates once for a stream, lies in this memory.

        Any other may be freed while a graph still writes to it: torch.compile frees all workspaces before and after its own captures
        (``clear_cublas_manager`` in ``torch/_inductor/cudagraph_trees.py``).
        """
        if self._stream is None:
            self._stream = _own_stream(device)
        return self._stream

    def take(self) -> Any:
        """The pool for the next capture."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        return self.pool

    def give_up(self) -> None:
        """Use another pool for the following captures."""
        self.pool = self._stream = None


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else gets: torch deals its 32 out again and again."""
    try:
        driver = bindings("driver")
    except BackendError:  # without our kernels: with TensorRT's engines alone
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        made = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
    return torch.cuda.ExternalStream(int(made), device)  # type: ignore[no-untyped-call]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of most captures: torch keeps freed memory, and cuBLAS a workspace, for every stream that was ever used."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def urgent_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of high priority, which the kernels of a graph that is captured in it have wherever it runs."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def capture(
    work: Callable[[], None],
    device: torch.device,
    memory: GraphMemory | None = None,
    *,
    draws: bool = True,
    stream: torch.cuda.Stream | None = None,
) -> torch.cuda.CUDAGraph:
    """Run `work` a few times on a side stream, then capture it.

    Args:
        work: enqueues on torch's current stream, reads and writes fixed addresses, and does not wait. What torch allocates in it
            comes from the graph's memory and is not valid between replays.
        device: of the GPU.
        memory: shared with other graphs; None gives the graph its own.
        draws: the work may draw random numbers. False leaves torch's generators alone, which another thread may be seeding.
        stream: to warm up in, and to capture in where there is no `memory`; None takes one of all models.

    Returns:
        The graph. Replaying it runs what was captured with whatever the buffers then hold.

    Raises:
        CaptureError: the work ran, but could not be captured.
        torch.cuda.OutOfMemoryError: GPU memory ran out.
    """
    with _capturing():
        side, before = stream or _side_stream(device), torch.cuda.current_stream(device)
        capturing, memory = (side, GraphMemory()) if memory is None else (memory.stream(device), memory)
        side.wait_stream(before)
        with (
            torch.random.fork_rng([device], enabled=draws),
            torch.cuda.stream(side),
        ):  # warm-ups draw nothing from the user's generator
            for _ in range(WARM_UPS):
                work()
        before.wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        pool = memory.take()
        try:
            # other threads may use the GPU meanwhile; freeing a graph here would become part of the capture
            with (
                _no_collection(),
                torch.cuda.graph(graph, pool=pool, stream=capturing, capture_error_mode="thread_local"),
            ):
                work()
        except BaseException as error:
            memory.give_up()
            _clean_up(graph, device, pool, before)
            raise_hidden_interrupt(error)
            if any(isinstance(cause, torch.cuda.OutOfMemoryError) for cause in causes(error)):
                raise torch.cuda.OutOfMemoryError(str(error)) from error
            if not isinstance(error, Exception):
                raise
            raise CaptureError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}") from error
    return graph


def _clean_up(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
    """Repair torch's state after a failed capture.

    ``CUDAGraph.capture_end`` throws before it has done so (torch 2.11): the allocators go on serving a capture, the generator
    refuses to draw, and the side stream stays the current one. A capture that succeeds puts the generator right. The allocator of
    page-locked memory cannot be told: it takes no further capture into that pool.
    """
    _failed.append(graph)
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):  # it had been ended
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        torch._C._cuda_releasePool(stream.device.index, pool)
    probe, side = torch.zeros(1, device=device), _side_stream(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"):
        probe.add_(1)


@dataclass
class NotCaptured:
    """Stand-in for a CUDA graph that runs its work kernel by kernel."""

    replay: Callable[[], None]


class StreamOrder:
    """Orders work on several streams that use the same buffers: later work starts after earlier work has ended.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """Make torch's current stream wait for the previous one, if they differ; the host does not wait."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream


@contextmanager
def outside_capture() -> Iterator[None]:
    """Exclude captures by other threads, during which the GPU's generator cannot draw."""
    if _capturing_thread == threading.get_ident():
        yield
        return
    with _alone:
        yield


@contextmanager
def _capturing() -> Iterator[None]:
    global _capturing_thread
    with _alone:
        _capturing_thread = threading.get_ident()
        try:
            yield
        finally:
            _capturing_thread = None


@contextmanager
def _no_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def out_of_memory(error: Exception) -> BackendError:
    """The error for exhausted GPU memory, raised after a session has freed what it can."""
    return BackendError(
        f"GPU memory ran out ({str(error).splitlines()[0]}). Idle buffers were freed; use a smaller batch, fewer beams or "
        "shorter texts, or precision='fp16', or free other models."
    )


def at_home(device: torch.device) -> AbstractContextManager[Any]:
    """Make a model's GPU the thread's current one: kernels and engines are loaded and started there. Nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def taking_turns(lock: threading.RLock, order: StreamOrder, let_go: Callable[[], None]) -> Iterator[None]:
    """Give a session its turn on the GPU: one thread at a time, streams in order.

    Args:
        lock: of the session.
        order: of its streams.
        let_go: frees idle buffers when GPU memory runs out.

    Raises:
        BackendError: GPU memory ran out.
    """
    with lock, at_home(order.device):
        order.follow()
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            let_go()
            free_unused()
            raise out_of_memory(error) from error


def free_unused() -> None:
    """Return unused memory that torch holds to the GPU, except during a capture."""
    with _alone:
        torch.cuda.empty_cache()
