"""A slot of a session on a GPU: the buffers of one shape and the decoder steps that were captured over them.

A slot is leased to one `DecoderState` at a time and reused for the next request of the same shape, so that only the
first one captures. A step may have a token selection captured with it: engine or kernels, K/V write, selector and the next step's
input are then one CUDA graph.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from t5_trt.engine.profiles import Shapes
from t5_trt.graph.architecture import Architecture
from t5_trt.runtime import cuda_kernels
from t5_trt.runtime.cuda_graph import CaptureError, NotCaptured, outside_capture
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState, layer_views, move_ancestors, own_beams
from t5_trt.runtime.session import NextStep, TokenSelector

logger = logging.getLogger("t5_trt")

#: number of captured steps that a slot keeps, least recently used first out; requests with other processors need their own
STEPS_KEPT = 8


@dataclass
class CapturedStep:
    """A CUDA graph of one decoder step and the selector that is part of it (None: the step alone)."""

    graph: Any
    selector: TokenSelector | None

    def replay(self, slot: Slot, state: DecoderState) -> None:
        """Launch the step for a state in the slot, without waiting for it."""
        if slot.position_host != state.length:
            slot.set_position(state.length)
        self.graph.replay()
        state.length += 1
        slot.position_host = state.length


@dataclass
class Slot:
    """Fixed buffers of one shape with the context and the captured steps that were bound to them."""

    shapes: Shapes
    kv: torch.Tensor  # [L, 2, R, H, T, D]
    qkv: torch.Tensor  # [L, R, 1, 3, H, D], output of a step; its K and V go into the cache
    cross: torch.Tensor  # [L, 2, B, H, S, D]
    cross_bias: torch.Tensor  # [B, 1, 1, S]
    tokens: torch.Tensor  # int32 [R, 1]
    position: torch.Tensor  # int64 [1]
    positions: torch.Tensor  # int32, the same as the step reads it: [1] for an engine, [R] for the kernels
    logits: torch.Tensor  # float32 [R, 1, V]
    context: Any = None
    weights: Sequence[torch.Tensor] = ()  # read by the context
    steps: OrderedDict[Hashable, CapturedStep] = field(default_factory=OrderedDict)
    position_host: int = -1  # value of `position`
    reads_empty_places: bool = True  # the step reads the whole cache, and masks empty places
    ancestors: torch.Tensor | None = None  # uint8 [R, T + 1], see `DecoderState`; None if rows of the cache are moved

    @classmethod
    def allocate(cls, arch: Architecture, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Slot:
        """Buffers of one shape, zeros.

        Raises:
            torch.cuda.OutOfMemoryError: GPU memory ran out.
        """
        rows, zeros = shapes.B * shapes.N, partial(torch.zeros, device=device)
        heads = arch.num_heads
        return cls(
            shapes=shapes,
            kv=zeros((arch.decoder_layers, 2, rows, heads, shapes.T, arch.d_kv), dtype=dtype),
            qkv=zeros((arch.decoder_layers, rows, 1, 3, heads, arch.d_kv), dtype=dtype),
            cross=zeros((arch.decoder_layers, 2, shapes.B, heads, shapes.S, arch.d_kv), dtype=dtype),
            cross_bias=zeros((shapes.B, 1, 1, shapes.S), dtype=dtype),
            tokens=zeros((rows, 1), dtype=torch.int32),
            position=zeros(1, dtype=torch.int64),
            positions=zeros(1, dtype=torch.int32),
            logits=torch.empty((rows, 1, arch.vocab_size), dtype=torch.float32, device=device),
        )

    def take_in(self, state: DecoderState, mask_value: float) -> None:
        """Move a state into the buffers; `mask_value` hides places after its sources."""
        cross = state.cross
        state.materialize()
        _overlay(self.cross, cross.kv)
        self._set_bias(state.cross_bias, mask_value)
        if self.reads_empty_places:  # empty places are multiplied by a probability of 0
            self.kv.zero_()
        if state.length:
            self.kv[:, :, : state.rows, :, : state.length].copy_(state.kv[:, :, : state.rows, :, : state.length])
        self.position_host = -1
        if self.ancestors is not None:
            own_beams(self.ancestors, cross.beams)
        state.kv, state.cross_bias = self.kv, self.cross_bias
        state.cross = CrossStates(self.cross, cross.beams, (cross.batch, cross.source_length))

    def _set_bias(self, bias: torch.Tensor, mask_value: float) -> None:
        grown = bias
        if bias.shape != self.cross_bias.shape:
            grown = torch.full_like(self.cross_bias, mask_value)
            grown[: bias.shape[0], ..., : bias.shape[3]].copy_(bias[: grown.shape[0], ..., : grown.shape[3]])
        self.cross_bias.copy_(grown)

    def set_position(self, position: int) -> None:
        """Set the position where the next step writes."""
        self.position.fill_(position)
        self.positions.fill_(position)

    def move_on(self, position: torch.Tensor) -> None:
        """Advance a position, int64 [1], and let the next step write there."""
        position.add_(1)
        self.positions.copy_(position.expand_as(self.positions))

    def step_tensors(self) -> dict[str, torch.Tensor]:
        """Inputs and outputs of a step's engine by name."""
        tensors = {"decoder_input_ids": self.tokens, "position": self.positions, "logits": self.logits}
        return tensors | made_rows(self.qkv) | self.cache_tensors()

    def cache_tensors(self) -> dict[str, torch.Tensor]:
        """Inputs that all decoder engines have, by name."""
        layers = layer_views("past", self.kv) | layer_views("cross", self.cross)
        return layers | {"cross_bias": self.cross_bias}


class Lease:
    """Returns a slot to its session when the state that used it is gone."""

    def __init__(self, slot: Slot, idle: list[Slot], owner: object) -> None:
        self.slot = slot
        self._idle = idle
        self._owner = weakref.ref(owner)

    def of(self, owner: object) -> bool:
        """Whether `owner` leased the slot; a slot of another session has other weights and may be of another kind."""
        return self._owner() is owner

    def __del__(self) -> None:
        self._idle.append(self.slot)


class SlotStep:
    """See `t5_trt.runtime.session.GenerationStep`.

    Args:
        slot: that `state` lives in.
        state: of the request.
        step: captured, with its selector or without.
        selector: what to do after a step that was captured without one.
    """

    def __init__(self, slot: Slot, state: DecoderState, step: CapturedStep, selector: TokenSelector | None) -> None:
        self._slot, self._state, self._step = slot, state, step
        # keeps the slot while the state moves to a larger one
        self._lease = state.binding
        self._apart = selector is not None
        chosen = step.selector if selector is None else selector
        assert chosen is not None
        self.selector = chosen
        self._draws = self.selector.draws and not self._apart
        self.tokens = slot.tokens[: state.rows]

    def feed(self, tokens: torch.Tensor) -> None:
        """See `t5_trt.runtime.session.GenerationStep.feed`."""
        self.tokens.copy_(tokens)

    def launch(self) -> None:
        """See `t5_trt.runtime.session.GenerationStep.launch`."""
        with outside_capture() if self._draws else nullcontext():
            self._step.replay(self._slot, self._state)
        self._state.ancestors = self._slot.ancestors
        if self._apart:
            select_tokens(self._slot, self.selector, self._slot.position - 1)


def captured_step(
    slot: Slot,
    state: DecoderState,
    key: Hashable,
    selector: TokenSelector | None,
    work: Callable[[], None],
    capture: Callable[[Callable[[], None]], Any],
) -> CapturedStep:
    """The step of a slot with a token selector (None: without one), captured at the first use.

    Args:
        slot: that `state` lives in.
        state: of the request.
        key: of the selector; None for the step alone.
        selector: with the buffers that the captured step keeps.
        work: what is captured: the step and, if there is one, the selector.
        capture: makes a CUDA graph of work.

    Raises:
        CaptureError: the selector cannot be captured.
    """
    if key in slot.steps:
        slot.steps.move_to_end(key)
        return slot.steps[key]
    started = time.perf_counter()
    kept = slot.kv[..., : state.length, :].clone()  # the warm-ups write into the cache, which may be in use
    slot.set_position(0)
    try:
        graph: Any = capture(work)
    except CaptureError as error:
        if selector is not None:
            raise
        logger.warning("the decoder step is not captured (%s); it runs kernel by kernel.", str(error))
        graph = NotCaptured(work)
    finally:
        slot.kv[..., : state.length, :].copy_(kept)
        if slot.ancestors is not None:
            own_beams(slot.ancestors, slot.shapes.N)
        slot.position_host = -1
    slot.steps[key] = CapturedStep(graph, selector)
    logger.debug("captured a decoder step for %s in %.1f ms", slot.shapes, (time.perf_counter() - started) * 1e3)
    while len(slot.steps) > STEPS_KEPT:
        slot.steps.popitem(last=False)
    return slot.steps[key]


def generation_step_of(
    slot: Slot,
    state: DecoderState,
    make: Callable[[], TokenSelector],
    key: Hashable,
    captured: Callable[[Any, DecoderState, Hashable, TokenSelector | None], CapturedStep],
    not_capturable: set[Hashable],
) -> SlotStep:
    """The generation step over a slot: its selector is captured with the step, or runs after it.

    Args:
        slot: that `state` lives in.
        state: as of `t5_trt.runtime.session.Session.generation_step`, like `make` and `key`.
        make: a new selector.
        key: equal for selectors that do the same; None always makes a new one.
        captured: gives the step of a slot, see `captured_step`.
        not_capturable: keys of selectors that could not be captured; another one is added.
    """
    if key is not None and key not in not_capturable:
        found = slot.steps.get(key)
        selector = make() if found is None else found.selector
        try:
            return SlotStep(slot, state, captured(slot, state, key, selector), None)
        except CaptureError as error:  # for example an operation that waits for the GPU
            not_capturable.add(key)
            logger.warning(
                "the token selection is not captured with the decoder step (%s); it runs after it.",
                str(error),  # as text: a log handler that keeps its arguments would keep the buffers too
            )
    return SlotStep(slot, state, captured(slot, state, None, None), make())


def run_step(slot: Slot, selector: TokenSelector | None, enqueue: Callable[[Slot], None]) -> None:
    """The captured work: engine, K/V write, selector, next position."""
    enqueue(slot)
    slot.kv.index_copy_(4, slot.position, cache_rows(slot.qkv))
    if selector is None:
        slot.move_on(slot.position)
    else:
        select_tokens(slot, selector, slot.position)


def select_tokens(
    slot: Slot, selector: TokenSelector, position: torch.Tensor, best: torch.Tensor | None = None
) -> None:
    """Choose tokens after a step, make them the next input, reorder rows, and advance the position.

    Args:
        slot: with the step's logits.
        selector: see `t5_trt.runtime.session.TokenSelector`.
        position: int64 [1], of the step.
        best: what the step left in place of logits, see `NextStep`.
    """
    rows = selector.rows
    following = None  # if rows of the cache are moved, torch does the rest
    if slot.ancestors is not None or not selector.moves_rows:
        ancestors = None if slot.ancestors is None else slot.ancestors[:rows]
        following = NextStep(slot.tokens[:rows], slot.positions, best, ancestors)
    made = selector.advance(slot.logits[:rows, 0], position, following)
    if made is None:
        return
    chosen, parents = made
    slot.tokens[:rows].copy_(chosen[:, None])
    if parents is not None:
        if slot.ancestors is None:
            reorder_rows(slot.kv, parents, position, slot.shapes.N)
        else:
            move_ancestors(slot.ancestors, parents, position, slot.shapes.N)
    slot.move_on(position)


def reorder_rows(kv: torch.Tensor, parents: torch.Tensor, position: torch.Tensor, beams: int) -> None:
    """Reorder a cache [L, 2, R, H, T, D]: row i continues row ``parents[i]``; rows after the last parent are unchanged.

    On a GPU a kernel moves the tokens up to `position` (int64 [1]) only; later tokens are not in use yet.
    """
    if cuda_kernels.reorder_rows(kv, parents, position, beams):
        return
    for layer in kv:  # layer by layer: the copy is small enough to stay in the GPU's cache
        rows = layer[:, : len(parents)]
        rows.copy_(rows.index_select(1, parents))


def made_rows(qkv: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of a decoder engine by name, out of [L, R, Q, 3, H, D]."""
    return {f"new_qkv_{layer}": rows for layer, rows in enumerate(qkv)}


def cache_rows(qkv: torch.Tensor) -> torch.Tensor:
    """K and V out of [L, R, Q, 3, H, D] as the cache keeps them, [L, 2, R, H, Q, D]; a view."""
    return qkv[:, :, :, 1:].permute(0, 3, 1, 4, 2, 5)


def _overlay(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the common part of two [.., B, H, S, D] buffers; the rest of the target becomes zero."""
    if target.shape == source.shape:
        target.copy_(source)
        return
    target.zero_()
    batch, length = (min(target.shape[axis], source.shape[axis]) for axis in (2, 4))
    target[:, :, :batch, :, :length].copy_(source[:, :, :batch, :, :length])
