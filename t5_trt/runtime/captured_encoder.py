"""An encoder as CUDA graphs: the host takes longer to launch its kernels one by one than the GPU to run them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from t5_trt.runtime.cuda_graph import CaptureError, GraphMemory, capture, outside_capture
from t5_trt.runtime.torch_layers import NO_KEY

logger = logging.getLogger("t5_trt")

#: an encoder is captured up to this many source tokens of a batch, with padding: beyond it the GPU is slower than the host
CAPTURED_TOKENS = 4096
#: part of the GPU's memory that buffers of all sizes may take; the least recently used are dropped
PART_KEPT = 1 / 50
#: lengths are padded to a multiple of this, so that texts of similar lengths share a graph
LENGTH_STEP = 16

Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class CapturedSize:
    """Buffers of one size and the graph over them; None until the size is asked for a second time."""

    ids: torch.Tensor  # int64 [B, S]
    mask: torch.Tensor  # int64 [B, S], NO_KEY where there is no token
    graph: Any = None
    hidden: torch.Tensor | None = None  # [B, S, E]
    cross: torch.Tensor | None = None  # [L, 2, B, H, S, D]

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(each.nbytes for each in (self.ids, self.mask, self.hidden, self.cross) if each is not None)


class CapturedEncoder:
    """Runs an encoder as a CUDA graph if its size was seen before. Calls in different streams must be ordered.

    The first request of a size runs kernel by kernel, which is as fast as a capture; later ones use a graph.

    Args:
        encode: (ids int64 [B, S], mask int64 [B, S]) -> (hidden states [B, S, E], cross-attention K/V [L, 2, B, H, S, D]).
        device: the GPU.
    """

    def __init__(self, encode: Encode, device: torch.device) -> None:
        self._encode, self._device = encode, device
        self._sizes: OrderedDict[tuple[int, int], CapturedSize] = OrderedDict()
        self._memory = GraphMemory()

    def run(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`; the results do not share memory with the graph."""
        batch, length = ids.shape
        room = -(-length // LENGTH_STEP) * LENGTH_STEP
        if batch * room > CAPTURED_TOKENS:
            return self._encode(ids, mask)
        size = self._sizes.get((batch, room))
        seen_before = size is not None
        if size is None:
            zeros = partial(torch.zeros, (batch, room), dtype=torch.int64, device=self._device)
            size = self._sizes[batch, room] = CapturedSize(zeros(), zeros())
            self._drop_oldest()
        else:
            self._sizes.move_to_end((batch, room))
        if length < room:
            size.ids.zero_()
            size.mask.fill_(NO_KEY)
        size.ids[:, :length].copy_(ids)
        size.mask[:, :length].copy_(mask)
        if size.graph is None and not (seen_before and self._capture(size)):
            if seen_before:
                del self._sizes[batch, room]
            hidden, cross = self._encode(size.ids, size.mask)  # padded as in the graph: equal order of sums, equal bits
            return hidden[:, :length].contiguous(), cross[..., :length, :].contiguous()
        size.graph.replay()
        assert size.hidden is not None and size.cross is not None
        return size.hidden[:, :length].clone(), size.cross[..., :length, :].clone(memory_format=torch.contiguous_format)

    def clear(self) -> None:
        """Drop all graphs and buffers."""
        if self._sizes:
            self._wait()
        self._sizes.clear()

    def _capture(self, size: CapturedSize) -> bool:
        def work() -> None:
            hidden, cross = self._encode(size.ids, size.mask)
            if (
                size.hidden is None or size.cross is None
            ):  # first warm-up: allocate buffers outside of the graph's memory
                size.hidden, size.cross = torch.empty_like(hidden), torch.empty_like(cross)
            size.hidden.copy_(hidden)
            size.cross.copy_(cross)

        try:
            size.graph = capture(work, self._device, self._memory, draws=False)
        except CaptureError as error:
            logger.warning("the encoder is not captured (%s); it runs kernel by kernel.", str(error))
            return False
        self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        if self._device.type != "cuda":
            return
        most = PART_KEPT * torch.cuda.get_device_properties(self._device).total_memory
        while len(self._sizes) > 1 and sum(size.nbytes for size in self._sizes.values()) > most:
            self._wait()
            self._sizes.popitem(last=False)

    def _wait(self) -> None:
        """Wait for the GPU: what is freed may have been used last in another stream than the one that it was allocated for."""
        if self._device.type == "cuda":
            with outside_capture():
                torch.cuda.synchronize(self._device)
