"""The decoder by the library's own kernels: buffers of a request's size, and the steps captured over them.

Memory for sources and caches comes in powers of two; what is computed is what a request has. A request of a new size costs a capture,
milliseconds, and never a build.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from t5_trt.engine.profiles import Shapes, power_of_two
from t5_trt.engine.store import EngineStore
from t5_trt.graph.precision import mask_value, real_type
from t5_trt.kernels.compile import architecture_name, stored_cubin
from t5_trt.kernels.decode_step import CHUNK, DecodeKernels, DecodeStep, constants
from t5_trt.kernels.step_memory import StepBuffers, StepInputs
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.runtime.cuda_graph import CaptureError, GraphMemory, NotCaptured, capture, urgent_stream
from t5_trt.runtime.kernel_positions import PROGRAMS_KEPT, PositionsStep, positions_at_once
from t5_trt.runtime.kernel_rows import KernelRowBuffers, padded_count
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState, bucket_length
from t5_trt.runtime.recently_used import keep
from t5_trt.runtime.session import TokenSelector
from t5_trt.runtime.step_buffers import (
    CapturedStep,
    Lease,
    Slot,
    SlotStep,
    captured_step,
    generation_step_of,
    select_tokens,
)

logger = logging.getLogger("t5_trt")

#: number of idle buffers that are kept for later requests of their size, least recently used first out
SLOTS_KEPT = 16
#: beams whose numbers a table of uint8 holds; the caches of more are moved
MOST_BEAMS = 256
#: its name in `Session.loaded_graphs`
BY_KERNELS = "decoder step (kernels)"
#: the smallest memory for a source's keys
SMALLEST_SOURCE = 32
#: the smallest memory for a row's own keys: unused room costs a step nothing
SMALLEST_CACHE = 128


@dataclass
class KernelSlot(Slot):
    """Buffers of one size, and the steps over them."""

    step: DecodeStep | None = None
    lengths: torch.Tensor | None = None  # int32 [B], keys of each source
    several: OrderedDict[int, PositionsStep] = field(default_factory=OrderedDict)  # by number of positions


class KernelDecoder:
    """Runs the decoder of one model on one GPU. Not thread-safe: its session takes turns.

    Args:
        maker: of the weights.
        precision: of the session.
        store: of compiled kernels.

    Attributes:
        weights: in the kernels' order.
    """

    def __init__(self, maker: StepWeightsMaker, precision: str, store: EngineStore) -> None:
        self._maker, self.weights = maker, maker.make()
        self._arch, self._dtype, self._device = maker.arch, maker.dtype, maker.device
        self._hidden = mask_value(real_type(precision))
        self._embedding_scale = 1.0 / maker.scaling.embedding
        self._store = store
        self._kernels: dict[tuple[int, ...], DecodeKernels] = {}  # by compile-time constants
        self._idle: OrderedDict[Shapes, list[Slot]] = OrderedDict()
        self._between: dict[tuple[int, int], StepBuffers] = {}  # of steps of several positions, by rows and chunks
        self._memory = GraphMemory()
        self._not_captured: set[Hashable] = set()

    def start(self, cross: CrossStates, cross_bias: torch.Tensor, capacity_tokens: int) -> DecoderState:
        """See `t5_trt.runtime.step_decoder.StepDecoder.start`: in the buffers that the steps will use."""
        capacity = bucket_length(capacity_tokens, SMALLEST_CACHE)
        slot, idle = self._lend(cross, capacity)
        new = slot.kv.new_empty((*slot.kv.shape[:4], 1, slot.kv.shape[5]))
        state = DecoderState(slot.kv, new, cross, cross_bias, smallest_bucket=SMALLEST_CACHE)
        self._move_in(slot, idle, state)
        return state

    def step(self, state: DecoderState, input_ids: torch.Tensor) -> torch.Tensor:
        """Decode one token of every row, int64 [R, 1], and return logits [R, 1, V] in memory of their own."""
        state.materialize()
        slot = self._slot(state)
        slot.tokens[: state.rows].copy_(input_ids)
        self._captured(slot, state, None, None).replay(slot, state)
        return slot.logits[: state.rows].clone()

    def decode(self, state: DecoderState, input_ids: torch.Tensor) -> torch.Tensor:
        """Decode any number of tokens of every row, int64 [R, Q], of a state with room for them; return logits [R, Q, V] in new memory."""
        rows, count = input_ids.shape
        if count == 1:
            return self.step(state, input_ids)
        logits = torch.empty((rows, count, self._arch.vocab_size), device=self._device)
        most = positions_at_once(rows, self._arch.num_heads, state.capacity)
        for start in range(0, count, most):
            tokens, piece = input_ids[:, start : start + most], logits[:, start : start + most]
            if tokens.shape[1] == 1:
                piece.copy_(self.step(state, tokens))
            else:
                self._decode_positions(state, tokens, piece)
        return logits

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> SlotStep:
        """See `t5_trt.runtime.session.Session.generation_step`."""
        state.reserve(1)
        state.materialize()
        slot = self._slot(state)
        return generation_step_of(slot, state, make, key, self._captured, self._not_captured)

    def row_buffers(self, rows: int) -> KernelRowBuffers:
        """See `t5_trt.runtime.row_buffers.RowSession.row_buffers`: with all kernels loaded that any number of rows in use takes."""
        for count in sorted({padded_count(count, rows) for count in range(1, rows + 1)}):
            self.kernels(count)
        return KernelRowBuffers(self._arch, rows, dtype=self._dtype, hidden=self._hidden, device=self._device)

    def step_rows(self, rows: KernelRowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """See `t5_trt.runtime.row_buffers.RowSession.step_rows`."""
        count = rows.count
        rows.hand_over()
        key = (padded_count(count, rows.rows), best_only)
        graph: Any = rows.bindings.get(key)
        if graph is None:
            graph = rows.bindings[key] = self._captured_rows(rows, *key)
        graph.replay()
        rows.advance()
        return rows.best[:count] if best_only else rows.logits[:count]

    def forget(self) -> None:
        """Free idle buffers and what was captured over them."""
        self._idle.clear()
        self._between.clear()

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`: if fewer groups of 8 rows are left."""
        beams = state.cross.beams
        return -(-batch * beams // 8) < -(-state.rows // 8)

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`: no row is padding."""
        return state.rows

    def update_weight(self, key: str, tensor: torch.Tensor) -> None:
        """See `t5_trt.runtime.step_decoder.StepDecoder.update_weight`."""
        self._maker.update(self.weights, key, tensor)

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding [V, E], which engines can share."""
        return self.weights.embedding

    @property
    def weight_bytes(self) -> int:
        """See `t5_trt.runtime.step_decoder.StepDecoder.weight_bytes`."""
        return self.weights.nbytes

    def kernels(self, rows: int) -> DecodeKernels:
        """The loaded kernels for a number of rows; compiled at the first use unless they are in the store."""
        major, minor = torch.cuda.get_device_capability(self._device)
        wanted = constants(self._arch, self._dtype, rows, major, int8=self.weights.int8)
        key = tuple(wanted.values())
        if key not in self._kernels:
            cubin = stored_cubin("decode_step.cu", wanted, architecture_name(major, minor), self._store)
            torch.cuda.current_stream(self._device).synchronize()  # makes torch's context current
            self._kernels[key] = DecodeKernels(cubin, wanted, self._device, early=major >= 9)
        return self._kernels[key]

    def _decode_positions(self, state: DecoderState, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Decode P tokens of every row, int64 [R, P], which one step takes; the logits go to float32 [R, P, V]."""
        state.materialize()
        slot, count = self._slot(state), tokens.shape[1]
        positions = keep(slot.several, count, PROGRAMS_KEPT, lambda: self._positions_step(slot, count))
        positions.feed(tokens, state.length)
        work = partial(self._run_positions, positions)
        # at the second use, as a capture takes milliseconds and most prompts' lengths do not come again
        if positions.used and positions.graph is None:
            positions.graph = self._captured_alone(work, f"{count} positions")
        positions.used = True
        work() if positions.graph is None else positions.graph.replay()
        made = logits if logits.is_contiguous() else logits.new_empty(logits.shape)
        positions.step.enqueue_head(self._stream(), made)
        if made is not logits:
            logits.copy_(made)
        state.length += count

    def _positions_step(self, slot: KernelSlot, count: int) -> PositionsStep:
        assert slot.step is not None
        rows, chunks = slot.shapes.B * slot.shapes.N * count, slot.step.buffers.parts.shape[2]
        size = (power_of_two(rows, 8), chunks)
        if size not in self._between:  # shared, as no step runs beside another
            self._between[size] = StepBuffers.allocate(
                self._arch, self._dtype, *size, self._device, int8=self.weights.int8
            )
        return PositionsStep.over(slot.step, count, self.kernels(rows), self._between[size])

    def _run_positions(self, positions: PositionsStep) -> None:
        positions.step.enqueue_layers(self._stream())

    def _stream(self) -> int:
        """The current stream of torch, as a CUstream."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def _captured(
        self, slot: KernelSlot, state: DecoderState, key: Hashable, selector: TokenSelector | None
    ) -> CapturedStep:
        """The step of a slot with a token selector (None: without one), captured at the first use."""
        work = partial(self._run, slot, selector)
        return captured_step(slot, state, key, selector, work, lambda work: capture(work, self._device, self._memory))

    def _captured_rows(self, rows: KernelRowBuffers, count: int, best_only: bool) -> Any:
        """The step of the first rows as a CUDA graph."""
        step = rows.step(count, self.kernels(count), self.weights, self._embedding_scale)

        def work() -> None:
            rows.take_tokens(count)
            self._run_rows(rows, step, best_only)

        # sources are encoded beside it, and every row waits for it
        urgent = urgent_stream(self._device) if self._device.type == "cuda" else None
        return self._captured_alone(work, f"{count} rows", urgent)

    def _captured_alone(self, work: Callable[[], None], what: str, stream: torch.cuda.Stream | None = None) -> Any:
        """A CUDA graph of a step that allocates nothing. Warm-ups are the step that is due: they write what it will write."""
        started = time.perf_counter()
        try:
            # without shared memory: such graphs may all go at once, with which torch would give the memory up
            graph: Any = capture(work, self._device, draws=False, stream=stream)
        except CaptureError as error:
            logger.warning("the step of %s is not captured (%s); it runs kernel by kernel.", what, str(error))
            graph = NotCaptured(work)
        logger.debug("captured the step of %s in %.1f ms", what, (time.perf_counter() - started) * 1e3)
        return graph

    def _run_rows(self, rows: KernelRowBuffers, step: DecodeStep, best_only: bool) -> None:
        """What is captured: the step, and its best tokens."""
        step.enqueue(self._stream(), wants_best=best_only)
        if best_only:
            rows.name_best(step.buffers.best[: len(step.inputs.tokens)])

    def _run(self, slot: KernelSlot, selector: TokenSelector | None) -> None:
        """What is captured: the step, the selector, the next position."""
        assert slot.step is not None
        wants_best = selector is not None and selector.takes_best
        hiding = selector.hiding if selector is not None and wants_best else None
        hidden, until = (None, None) if hiding is None else (hiding.tokens, hiding.until)
        slot.step.enqueue(self._stream(), wants_best=wants_best, hidden=hidden, until=until)
        if selector is None:
            slot.move_on(slot.position)
        else:
            select_tokens(slot, selector, slot.position, slot.step.buffers.best if wants_best else None)

    def _slot(self, state: DecoderState) -> KernelSlot:
        """The slot of a state; the state moves into one if it has none (it is new, has grown or was reordered)."""
        lease = state.binding
        if isinstance(lease, Lease) and lease.of(self):
            return lease.slot  # type: ignore[return-value]
        slot, idle = self._lend(state.cross, state.capacity)
        self._move_in(slot, idle, state)
        return slot

    def _lend(self, cross: CrossStates, capacity: int) -> tuple[KernelSlot, list[Slot]]:
        """A lease of a slot for sources and a number of tokens."""
        source = bucket_length(cross.source_length, SMALLEST_SOURCE)
        shapes = Shapes(B=cross.batch, N=cross.beams, S=source, T=capacity)
        idle = self._idle.setdefault(shapes, [])
        self._idle.move_to_end(shapes)
        while len(self._idle) > SLOTS_KEPT:
            self._idle.popitem(last=False)
        return (idle.pop() if idle else self._allocate(shapes)), idle  # type: ignore[return-value]

    def _move_in(self, slot: KernelSlot, idle: list[Slot], state: DecoderState) -> None:
        state.binding = Lease(slot, idle, self)
        length = state.cross.source_length
        slot.take_in(state, self._hidden)
        assert slot.lengths is not None
        slot.lengths.fill_(length)

    def _allocate(self, shapes: Shapes) -> KernelSlot:
        arch, device, dtype, rows = self._arch, self._device, self._dtype, shapes.B * shapes.N
        layers, heads, width = arch.decoder_layers, arch.num_heads, arch.d_kv
        zeros = partial(torch.zeros, device=device)
        slot = KernelSlot(
            shapes=shapes,
            kv=torch.empty((layers, 2, rows, heads, shapes.T, width), dtype=dtype, device=device),
            qkv=zeros(0, dtype=dtype),
            cross=zeros((layers, 2, shapes.B, heads, shapes.S, width), dtype=dtype),
            cross_bias=zeros((shapes.B, 1, 1, shapes.S)),
            tokens=zeros((rows, 1), dtype=torch.int32),
            position=zeros(1, dtype=torch.int64),
            positions=zeros(rows, dtype=torch.int32),
            logits=torch.empty((rows, 1, arch.vocab_size), device=device),
            lengths=zeros(shapes.B, dtype=torch.int32),
            ancestors=zeros((rows, shapes.T + 1), dtype=torch.uint8) if 1 < shapes.N <= MOST_BEAMS else None,
            reads_empty_places=False,
        )
        assert slot.lengths is not None
        inputs = StepInputs(
            slot.tokens[:, 0],
            slot.positions,
            slot.kv,
            slot.cross,
            slot.cross_bias[:, 0, 0],
            slot.lengths,
            shapes.N,
            slot.logits[:, 0],
            slot.ancestors,
        )
        chunks = -(-max(shapes.T, shapes.S) // CHUNK)
        buffers = StepBuffers.allocate(arch, dtype, rows, chunks, device, int8=self.weights.int8)
        slot.step = DecodeStep(
            arch, self.kernels(rows), self.weights, buffers, inputs, arch.epsilon, self._embedding_scale
        )
        return slot
