"""The encoder of the TensorRT session: its buffers, and for short sources the CUDA graph that runs it over them.

An encoder of T5-base with 32 tokens keeps an H100 busy for less time than the host needs to launch its kernels one by one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from t5_trt.engine.profiles import Shapes
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.signature import ENCODER_EMBEDS
from t5_trt.runtime.cuda_graph import CaptureError, capture
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.tensorrt_engines import TrtEngines

logger = logging.getLogger("t5_trt")

#: source tokens of a batch, padding counted, up to which an encoder is captured: with more the GPU is the slower one, and the
#: buffers, 37 kB for a token of T5-base in half precision, would be kept for nothing
CAPTURED_TOKENS = 1024
#: source tokens of all captured encoders, those used last: 300 MB of buffers for T5-base in half precision. Nearly all shapes of mixed
#: requests fit: to capture one takes longer than a dozen runs of it save
TOKENS_KEPT = 8192


@dataclass
class EncoderBuffers:
    """Inputs and outputs of an encoder engine by name.

    Attributes:
        inputs: [B, S, ..] each.
        outputs: "encoder_hidden_states" [B, S, E] and "cross_kv" [L, 2, B, H, S, D].
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def fill(self, given: dict[str, torch.Tensor]) -> None:
        """Copy inputs with at most as many rows and tokens; the rest is zeros."""
        for name, buffer in self.inputs.items():
            rows, tokens = given[name].shape[:2]
            if (rows, tokens) != buffer.shape[:2]:
                buffer.zero_()
            buffer[:rows, :tokens].copy_(given[name])


@dataclass
class GraphOfEncoder:
    """A CUDA graph of an encoder engine over buffers of its own, with the context that was bound to them."""

    buffers: EncoderBuffers
    context: Any
    weights: Sequence[torch.Tensor]
    graph: Any

    def run(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode inputs as of `EncoderBuffers.fill`; returns copies of the outputs, without waiting for them."""
        self.buffers.fill(given)
        self.graph.replay()
        return {name: buffer.clone() for name, buffer in self.buffers.outputs.items()}


class Encoders:
    """Runs encoder engines; not thread-safe.

    Args:
        engines: of the session.
        arch: of the model.
        dtype: of hidden states and K/V.
        device: the GPU.
    """

    def __init__(
        self,
        engines: TrtEngines,
        arch: Architecture,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._engines, self._arch, self._dtype, self._device = engines, arch, dtype, device
        self._captured: OrderedDict[tuple[str, Shapes], GraphOfEncoder] = OrderedDict()
        self._not_capturable: set[tuple[str, Shapes]] = set()

    def encode(
        self,
        graph: str,
        shapes: Shapes,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`; by the engine of a graph and a bucket."""
        batch, length = attention_mask.shape
        given = {"attention_mask": attention_mask}
        if inputs_embeds is None:
            assert input_ids is not None
            given["input_ids"] = input_ids
        else:
            factor = self._arch.stream_factor
            given["inputs_embeds"] = inputs_embeds if factor == 1.0 else inputs_embeds * factor
        made = self.run(graph, shapes, given)
        hidden, cross = made["encoder_hidden_states"], CrossStates(made["cross_kv"], used=(batch, length))
        return hidden[:batch, :length].contiguous(), cross

    def run(self, graph: str, shapes: Shapes, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, padded to a bucket, for inputs [B, S, ..] that are not padded.

        Raises:
            BackendError: see `TrtEngines.context`.
            torch.cuda.OutOfMemoryError: GPU memory ran out.
        """
        key = graph, shapes
        if shapes.B * shapes.S <= CAPTURED_TOKENS and key not in self._not_capturable:
            try:
                return self._captured_one(graph, shapes).run(given)
            except CaptureError as error:
                self._not_capturable.add(key)
                logger.warning("the encoder is not captured (%s); it runs kernel by kernel.", str(error))
        context, buffers = self._engines.context(graph, shapes), self._buffers(graph, shapes)
        buffers.fill(given)
        self._engines.bind(context, buffers.inputs | buffers.outputs)
        self._engines.enqueue(context)
        return buffers.outputs

    def drop(self, graph: str, shapes: Shapes) -> None:
        """Drop what was captured for a bucket."""
        self._captured.pop((graph, shapes), None)

    def clear(self) -> None:
        """Drop what was captured."""
        self._captured.clear()

    def _captured_one(self, graph: str, shapes: Shapes) -> GraphOfEncoder:
        """The encoder of a bucket, captured at the first use."""
        key = graph, shapes
        if key not in self._captured:
            context, buffers = self._engines.context(graph, shapes, own=True), self._buffers(graph, shapes)
            weights = self._engines.bind(context, buffers.inputs | buffers.outputs)
            # own memory, so that a failure cannot spoil that of the decoder's steps; torch allocates nothing in it
            captured = capture(partial(self._engines.enqueue, context), self._device)
            self._captured[key] = GraphOfEncoder(buffers, context, weights, captured)
            while sum(shapes.B * shapes.S for _, shapes in self._captured) > TOKENS_KEPT:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _buffers(self, graph: str, shapes: Shapes) -> EncoderBuffers:
        arch, rows, tokens = self._arch, shapes.B, shapes.S
        new = partial(torch.zeros, device=self._device)
        mask = new((rows, tokens), dtype=torch.int32)
        hidden = new((rows, tokens, arch.d_model), dtype=self._dtype)
        cross = new((arch.decoder_layers, 2, rows, arch.num_heads, tokens, arch.d_kv), dtype=self._dtype)
        source = {"inputs_embeds": hidden.clone()} if graph == ENCODER_EMBEDS else {"input_ids": mask.clone()}
        return EncoderBuffers({"attention_mask": mask, **source}, {"encoder_hidden_states": hidden, "cross_kv": cross})
