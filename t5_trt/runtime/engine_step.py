"""The one-token decoder step by a TensorRT engine, and the buffers that decoder engines of every kind read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial

import torch

from t5_trt.engine.profiles import SMALLEST, Shapes
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import LM_HEAD
from t5_trt.graph.precision import mask_value, real_type
from t5_trt.graph.signature import STEP
from t5_trt.runtime.cuda_graph import GraphMemory, capture
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState
from t5_trt.runtime.session import TokenSelector
from t5_trt.runtime.step_buffers import CapturedStep, Lease, Slot, SlotStep, captured_step, generation_step_of, run_step
from t5_trt.runtime.tensorrt_engines import Key, TrtEngines


class EngineSlots:
    """The slots of a session's decoder engines, each lent to one state at a time. Not thread-safe.

    Args:
        engines: of the session.
        arch: of the model.
        dtype: of K/V.
        device: the GPU.
        precision: of the session.
    """

    def __init__(
        self, engines: TrtEngines, arch: Architecture, dtype: torch.dtype, device: torch.device, precision: str
    ) -> None:
        self._engines, self._arch, self._dtype, self._device = engines, arch, dtype, device
        self._hidden = mask_value(real_type(precision))
        self.idle: dict[Shapes, list[Slot]] = {}

    def home(self, state: DecoderState) -> Lease:
        """The slot of a state; the state moves into one if it has none (it is new, has grown or was reordered)."""
        lease = state.binding
        if not isinstance(lease, Lease) or not lease.of(self):  # a state may outlive the session that lent it a slot
            lease = self._lend(self.shapes(state))
            lease.slot.take_in(state, self._hidden)
            state.binding = lease
        return lease

    def start(self, cross: CrossStates, cross_bias: torch.Tensor, capacity_tokens: int) -> DecoderState:
        """An empty cache in a slot; arguments as of `EngineStep.start`."""
        shapes = self._engines.bucket(B=cross.batch, N=cross.beams, S=cross.source_length, T=capacity_tokens)
        lease = self._lend(shapes)
        kv = lease.slot.kv
        new = kv.new_empty((*kv.shape[:4], 1, kv.shape[5]))
        state = DecoderState(kv, new, cross, cross_bias, smallest_bucket=SMALLEST["T"], binding=lease)
        lease.slot.take_in(state, self._hidden)
        return state

    def copied(self, state: DecoderState) -> Lease:
        """A slot with a copy of a state; the state stays in its own buffers."""
        state.materialize()
        lease = self._lend(self.shapes(state))
        lease.slot.take_in(replace(state, binding=None), self._hidden)
        return lease

    def shapes(self, state: DecoderState) -> Shapes:
        """The bucket of a state."""
        cross = state.cross
        return self._engines.bucket(B=cross.batch, N=cross.beams, S=cross.source_length, T=state.capacity)

    def forget(self) -> None:
        """Free idle slots and all that was captured over them."""
        self.idle.clear()

    def _lend(self, shapes: Shapes) -> Lease:
        idle = self.idle.setdefault(shapes, [])
        slot = idle.pop() if idle else Slot.allocate(self._arch, shapes, self._dtype, self._device)
        return Lease(slot, idle, self)


class EngineStep:
    """A `t5_trt.runtime.step_decoder.StepDecoder`: one engine for each bucket, captured as a CUDA graph with what follows it.

    Args:
        engines: of the session.
        slots: of its decoder engines.
        arch: of the model, with the factors that its graphs undo.
        device: the GPU.
    """

    weight_bytes = 0  # the engines share their weights

    def __init__(self, engines: TrtEngines, slots: EngineSlots, arch: Architecture, device: torch.device) -> None:
        self._engines, self._slots, self._arch, self._device = engines, slots, arch, device
        # shared by all captured steps: they run one after the other and keep nothing in it
        self.memory = GraphMemory()
        self._not_capturable: set[Hashable] = set()

    def wanted(self, batch: int, beams: int, source_tokens: int) -> Key:
        """The engine that a request's first step needs."""
        return STEP, self._engines.bucket(B=batch, N=beams, S=source_tokens, T=1)

    def start(self, cross: CrossStates, cross_bias: torch.Tensor, capacity_tokens: int) -> DecoderState:
        """See `t5_trt.runtime.step_decoder.StepDecoder.start`."""
        return self._slots.start(cross, cross_bias, capacity_tokens)

    def step(self, state: DecoderState, input_ids: torch.Tensor) -> torch.Tensor:
        """See `t5_trt.runtime.step_decoder.StepDecoder.step`."""
        slot = self._slots.home(state).slot
        slot.tokens[: state.rows].copy_(input_ids)
        self.captured(slot, state, None, None).replay(slot, state)
        return slot.logits[: state.rows].clone()

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> SlotStep:
        """See `t5_trt.runtime.session.Session.generation_step`."""
        state.reserve(1)
        slot = self._slots.home(state).slot
        return generation_step_of(slot, state, make, key, self.captured, self._not_capturable)

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`: if the engine of the smaller bucket exists."""
        cross, sizes = state.cross, {"N": state.cross.beams, "S": state.cross.source_length, "T": state.capacity}
        smaller, present = (self._engines.bucket(B=size, **sizes) for size in (batch, cross.batch))
        return smaller.B < present.B and self._engines.is_ready(STEP, smaller)

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`: those of the slot that the state is in, or will be."""
        shapes = self._slots.shapes(state)
        return shapes.B * shapes.N

    def update_weight(self, key: str, tensor: torch.Tensor) -> None:
        """See `t5_trt.runtime.step_decoder.StepDecoder.update_weight`: does nothing, as engines read the session's weights."""

    def forget(self) -> None:
        """See `t5_trt.runtime.step_decoder.StepDecoder.forget`."""
        self._slots.forget()

    def captured(self, slot: Slot, state: DecoderState, key: Hashable, selector: TokenSelector | None) -> CapturedStep:
        """The step of a slot with a token selector (None: without), captured when it is first wanted."""
        if slot.context is None:
            context = self._engines.context(STEP, slot.shapes, own=True)
            slot.weights = self._engines.bind(context, slot.step_tensors())
            slot.context = context  # now that everything is bound
        work = partial(run_step, slot, selector, self.enqueue)
        return captured_step(slot, state, key, selector, work, lambda work: capture(work, self._device, self.memory))

    def enqueue(self, slot: Slot) -> None:
        """Enqueue the step of a slot."""
        self._engines.enqueue(slot.context)
        undo_head_factor(self._arch, slot.logits)


def undo_head_factor(arch: Architecture, logits: torch.Tensor) -> None:
    """Undo the fp16 factor of the head, in place.

    Not in the engine: TensorRT 8.5 multiplies in half precision there, whatever type the graph names, and large logits
    become infinite (docs/performance.md).
    """
    factor = arch.branch_factors.get(LM_HEAD, 1.0)
    if factor != 1.0:
        logits.mul_(1.0 / factor)
