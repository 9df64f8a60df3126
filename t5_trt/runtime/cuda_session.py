"""The backend for an NVIDIA GPU without TensorRT: the encoder and the decoder step by our own kernels, everything else by torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch

from t5_trt.engine.store import EngineStore
from t5_trt.errors import InputError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import EMBEDDING, Weights
from t5_trt.graph.precision import TORCH_TYPES, mask_value, real_type
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.runtime.cuda_graph import StreamOrder, taking_turns
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.gpu_encoder import GpuEncoder
from t5_trt.runtime.kernel_decoder import BY_KERNELS, KernelDecoder
from t5_trt.runtime.kernel_encoder import open_encoder
from t5_trt.runtime.kernel_rows import KernelRowBuffers
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState
from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.runtime.row_sources import BatchSize, RowSources, Source
from t5_trt.runtime.session import GenerationStep, TokenSelector
from t5_trt.runtime.torch_layers import TorchDecoder
from t5_trt.runtime.weight_updates import WeightUpdates

#: tokens of a call up to which the kernels decode several positions; torch is faster with more (docs/performance.md)
KERNEL_TOKENS = 2048


class CudaSession:
    """Runs one model on one GPU without TensorRT.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; kept.
        device: the GPU.
        precision: "fp32", "fp16", "bf16" or "int8": the decoder's matrices in 8 bits, all else as in "fp16".
        scaling: what keeps float16 in range.
        store: of compiled kernels.
    """

    backend = "cuda"
    selector_tokens = 512  # a larger buffer costs nothing: a token selector's kernels read only the tokens in use
    steps_by = "kernels"
    engines = None

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        device: torch.device,
        precision: str,
        scaling: Fp16Scaling,
        store: EngineStore,
    ) -> None:
        self.arch, self.device, self.precision, self.scaling = arch, device, precision, scaling
        self.dtype = TORCH_TYPES[real_type(precision)]
        self.updates = 0
        self._weights = DeviceWeights(arch, weights, self.dtype, device, scaling)
        self._encoder = GpuEncoder(open_encoder(arch, self._weights, scaling, precision, self.dtype, store), device)
        self._order, self._encoding = StreamOrder(device), StreamOrder(device)  # of the session, of its encoder
        self._lock = threading.RLock()
        self._hidden = mask_value(real_type(precision))
        self._updates = WeightUpdates(device)
        self._queries: TorchDecoder | None = None
        self._steps: KernelDecoder | None = None
        if arch.decoder_layers:
            maker = StepWeightsMaker(arch, weights, self.dtype, device, scaling, int8=precision == "int8")
            steps = KernelDecoder(maker, precision, store)
            self._weights.share(EMBEDDING, steps.embedding)
            self._queries = TorchDecoder(arch, steps.weights, scaling, precision)
            self._steps = steps
        self._encoding.follow()  # weights may still be on their way in this stream

    def encode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor,
        beams: int | None = None,
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`."""
        with self._at_work():
            self._encoding.follow()
            return self._encoder.encode(input_ids, inputs_embeds, attention_mask)

    def project_cross(self, hidden: torch.Tensor) -> CrossStates:
        """See `t5_trt.runtime.session.Session.project_cross`."""
        with self._at_work():
            self._encoding.follow()
            return self._encoder.project(hidden.to(self.dtype))

    def start(
        self, cross: CrossStates, capacity_tokens: int, attention_mask: torch.Tensor | None = None
    ) -> DecoderState:
        """See `t5_trt.runtime.session.Session.start`."""
        if attention_mask is None:
            attention_mask = cross.open_mask()
        assert self._steps is not None
        with self._at_work():
            return self._steps.start(cross, self.cross_bias(attention_mask, cross), capacity_tokens)

    def cross_bias(self, attention_mask: torch.Tensor, cross: CrossStates) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.cross_bias`; float32 in every precision."""
        bias = torch.full((cross.kv.shape[2], 1, 1, cross.kv.shape[4]), self._hidden, device=self.device)
        bias[: cross.batch, 0, 0, : cross.source_length].masked_fill_(attention_mask != 0, 0)
        return bias

    def decode(
        self, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.decode`."""
        assert self._steps is not None and self._queries is not None
        with self._at_work():
            state.reserve(input_ids.shape[1])
            if key_mask is None and input_ids.numel() <= KERNEL_TOKENS:
                return self._steps.decode(state, input_ids)
            cross, source = state.cross, state.cross.source_length
            bias, kv = state.cross_bias[: cross.batch, ..., :source], cross.kv[:, :, : cross.batch, :, :source]
            state.materialize()
            cached = state.kv[:, :, : state.rows, :, : state.length]
            logits, made = self._queries.run(input_ids, cached, kv, bias, cross.beams, key_mask)
            state.append(made)
            return logits

    def layer_outputs(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Not supported: there are no graphs to inspect."""
        raise InputError(
            f"the backend 'cuda' has no graph {graph!r} to look into; compare layers with backend='onnxruntime'."
        )

    def loaded_graphs(self) -> tuple[str, ...]:
        """The names of the parts that compute."""
        encoder = self._encoder.form.name
        return (encoder, BY_KERNELS, "decoder with hidden or many tokens (torch)") if self._steps else (encoder,)

    def update_weights(self, changed: Weights) -> bool:
        """See `t5_trt.runtime.session.Session.update_weights`: in place, where captured graphs read."""
        with self._at_work():
            self._encoding.follow()
            self.updates += 1
            self._updates.apply(changed, self._write)
        return True

    def _write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a new value of a weight, where captured graphs read."""
        self._weights.update(key, tensor)
        if self._steps is not None:
            self._steps.update_weight(key, tensor)

    @property
    def weight_bytes(self) -> int:
        """See `t5_trt.runtime.session.Session.weight_bytes`."""
        return self._weights.nbytes + (self._steps.weight_bytes if self._steps else 0)

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`."""
        assert self._steps is not None
        return self._steps.can_compact_batch(state, batch)

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`."""
        assert self._steps is not None
        return self._steps.decoded_rows(state)

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> GenerationStep:
        """See `t5_trt.runtime.session.Session.generation_step`."""
        assert self._steps is not None
        with self._at_work():
            return self._steps.generation_step(state, make, key)

    def rows_refusal(self) -> str | None:
        """See `t5_trt.runtime.row_buffers.RowSession.rows_refusal`."""
        return None

    def row_buffers(self, rows: int) -> RowBuffers:
        """See `t5_trt.runtime.row_buffers.RowSession.row_buffers`."""
        assert self._steps is not None
        with self._at_work():
            return self._steps.row_buffers(rows)

    @property
    def batch_size(self) -> BatchSize | None:
        """See `t5_trt.runtime.row_buffers.RowSession`."""
        return self._encoder.batch_size

    def encode_rows(self, sources: Sequence[Source]) -> RowSources:
        """See `t5_trt.runtime.row_buffers.RowSession.encode_rows`: in the encoder's stream."""
        with self._encoder.beside.current(), taking_turns(self._lock, self._encoding, self._forget):
            return self._encoder.encode_rows(sources, self._hidden)

    def step_rows(self, rows: RowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """See `t5_trt.runtime.row_buffers.RowSession.step_rows`."""
        assert self._steps is not None and isinstance(rows, KernelRowBuffers)
        with self._at_work():
            return self._steps.step_rows(rows, best_only=best_only)

    def _at_work(self) -> AbstractContextManager[None]:
        """See `t5_trt.runtime.cuda_graph.taking_turns`."""
        return taking_turns(self._lock, self._order, self._forget)

    def _forget(self) -> None:
        """Free idle buffers and all that was captured over them."""
        self._encoder.clear()
        if self._steps is not None:
            self._steps.forget()
