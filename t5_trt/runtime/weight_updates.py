"""New values of weights for a session on a GPU. Where they are computed from memory that stays, all of it is one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from t5_trt.graph.parameters import Weights
from t5_trt.runtime.cuda_graph import CaptureError, GraphMemory, capture

logger = logging.getLogger("t5_trt")
Write = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class ComputedFrom:
    """How weights are computed on a device without the host.

    Attributes:
        state: equal for what reads the same memory in the same way.
        compute: for each key what enqueues the work and returns the weight.
    """

    state: Hashable
    compute: Mapping[str, Callable[[], torch.Tensor]]


@runtime_checkable
class ComputedWeights(Protocol):
    """Weights that may say how they are computed."""

    def source(self) -> ComputedFrom | None:
        """What they are computed from, brought up to date; None if the host has to do it."""
        ...


class WeightUpdates:
    """Writes new values of weights where a session reads them. Not thread-safe.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, Any] = {}  # None for what cannot be captured
        self._memory = GraphMemory()

    def apply(self, changed: Weights, write: Write) -> None:
        """Write all values of `changed`.

        Args:
            changed: state-dict key -> tensor on the device.
            write: puts the value of a key in its places, the same ones at every call.
        """
        source = changed.source() if isinstance(changed, ComputedWeights) else None
        if source is None:
            for key in changed:
                write(key, changed[key])
            return
        work = partial(_compute, source, write)
        if source.state not in self._graphs:
            self._graphs[source.state] = self._captured(work)
        elif self._graphs[source.state] is None:
            work()
        else:
            self._graphs[source.state].replay()

    def _captured(self, work: Callable[[], None]) -> Any:
        """The graph of an update, whose warm-ups make it."""
        try:
            return capture(work, self._device, self._memory, draws=False)
        except CaptureError as error:
            logger.debug("an update of weights is not captured: %s", error)
            return None


def _compute(source: ComputedFrom, write: Write) -> None:
    for key, compute in source.compute.items():
        write(key, compute())
