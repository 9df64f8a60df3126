"""Recording work on the GPU as one CUDA graph, so that a step costs one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

WARM_UPS = 3  # TensorRT allocates and chooses lazily in its first runs; a capture must find everything in place
#: torch's allocator cannot serve two recordings at once, nor give back its memory during one
_alone = threading.Lock()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings: torch keeps freed memory, and cuBLAS a workspace, for every stream that was ever used."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def record(work: Callable[[], None], device: torch.device, pool: Any = None) -> torch.cuda.CUDAGraph:
    """Run `work` a few times on a side stream, then record it.

    Args:
        work: enqueues on torch's current stream, reads and writes fixed addresses, and does not wait. What torch allocates in it
            comes from the graph's memory and is not there between replays.
        device: of the GPU.
        pool: memory shared with other graphs, none of which runs at the same time (``torch.cuda.graph_pool_handle()``).

    Returns:
        The graph. Replaying it runs what was recorded with whatever the buffers then hold.
    """
    with _alone:
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with (
            torch.random.fork_rng([device]),
            torch.cuda.stream(side),
        ):  # warm-ups draw nothing from the user's generator
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # other threads go on with their own work on the GPU
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            work()
    return graph


def free_unused() -> None:
    """Give memory that torch holds and nobody uses back to the GPU, not while something is recorded."""
    with _alone:
        torch.cuda.empty_cache()
