"""An encoder as CUDA graphs: the host takes longer to launch its kernels one by one than the GPU to run them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
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

Tensors = tuple[torch.Tensor, ...]
Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class CapturedSize:
    """Buffers of one size and the graph over them; None until the size is asked for a second time."""

    inputs: Tensors
    graph: Any = None
    results: Tensors | None = None

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(each.nbytes for each in (*self.inputs, *(self.results or ())))


class CapturedSizes:
    """CUDA graphs of an encoder's work, by its size. Calls in different streams must be ordered.

    The first request of a size runs kernel by kernel, which is as fast as a capture; later ones use a graph.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sizes: OrderedDict[Hashable, CapturedSize] = OrderedDict()
        self._memory = GraphMemory()

    def run(
        self,
        size: Hashable,
        make: Callable[[], Tensors],
        load: Callable[[Tensors], None],
        work: Callable[[Tensors], Tensors],
    ) -> tuple[Tensors, bool]:
        """Do some work on inputs of a size.

        Args:
            size: equal where `make` makes equal shapes and `work` does the same.
            make: new inputs.
            load: write the inputs' values.
            work: makes results of inputs; what it enqueues can be captured.

        Returns:
            The results, and whether they are in a graph's memory, which the next call of the size overwrites.
        """
        found = self._sizes.get(size)
        seen_before = found is not None
        if found is None:
            found = self._sizes[size] = CapturedSize(make())
            self._drop_oldest()
        else:
            self._sizes.move_to_end(size)
        load(found.inputs)
        if found.graph is None and not (seen_before and self._capture(found, work)):
            if seen_before:
                del self._sizes[size]
            return work(found.inputs), False
        found.graph.replay()
        assert found.results is not None
        return found.results, True

    def clear(self) -> None:
        """Drop all graphs and buffers."""
        if self._sizes:
            self._wait()
        self._sizes.clear()

    def _capture(self, size: CapturedSize, work: Callable[[Tensors], Tensors]) -> bool:
        def captured() -> None:
            made = work(size.inputs)
            if size.results is None:  # first warm-up: allocate buffers outside of the graph's memory
                size.results = tuple(torch.empty_like(each) for each in made)
            for buffer, each in zip(size.results, made, strict=True):
                buffer.copy_(each)

        try:
            size.graph = capture(captured, self._device, self._memory, draws=False)
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


class CapturedEncoder:
    """Runs an encoder of padded batches by `CapturedSizes`.

    Args:
        encode: (ids int64 [B, S], mask int64 [B, S]) -> (hidden states [B, S, E], cross-attention K/V [L, 2, B, H, S, D]).
        sizes: hold the graphs.
    """

    def __init__(self, encode: Encode, sizes: CapturedSizes) -> None:
        self._encode, self._sizes = encode, sizes

    def run(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`; the results do not share memory with the graph."""
        batch, length = ids.shape
        room = -(-length // LENGTH_STEP) * LENGTH_STEP
        if batch * room > CAPTURED_TOKENS:
            return self._encode(ids, mask)

        def make() -> Tensors:
            zeros = partial(torch.zeros, (batch, room), dtype=torch.int64, device=ids.device)
            return zeros(), zeros()

        def load(inputs: Tensors) -> None:
            if length < room:
                for buffer, value in zip(inputs, (0, NO_KEY), strict=True):
                    buffer.fill_(value)
            for buffer, given in zip(inputs, (ids, mask), strict=True):
                buffer[:, :length].copy_(given)

        # padded as in the graph, whether there is one or not: equal order of sums, equal bits
        (hidden, cross), shared = self._sizes.run((batch, room), make, load, lambda inputs: self._encode(*inputs))
        hidden, cross = hidden[:, :length], cross[..., :length, :]
        if shared:
            return hidden.clone(), cross.clone(memory_format=torch.contiguous_format)
        return hidden.contiguous(), cross.contiguous()
