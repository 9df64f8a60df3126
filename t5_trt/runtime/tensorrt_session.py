"""TensorRT on an NVIDIA GPU: engines by shape bucket, buffers as torch tensors, decoding by kernels or engines.

Engines hold no weights: `DeviceWeights` are bound to all of them. Requests are padded to the engines' shapes; masks make
that exact. The one-token step is a `t5_trt.runtime.step_decoder.StepDecoder`: the library's kernels, or one more engine.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from t5_trt.engine.profiles import Shapes, bucket
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.tensorrt_api import TensorRT
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import EMBEDDING, Weights
from t5_trt.graph.precision import TORCH_TYPES, empty_slot_value, mask_value, real_type
from t5_trt.graph.signature import CROSS, ENCODER, ENCODER_EMBEDS, QUERIES
from t5_trt.runtime.cuda_graph import StreamOrder, taking_turns
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.encoder_forms import EncoderForms
from t5_trt.runtime.engine_check import Deviation, worst_deviation
from t5_trt.runtime.engine_step import EngineSlots, EngineStep, undo_head_factor
from t5_trt.runtime.kernel_decoder import BY_KERNELS, KernelDecoder
from t5_trt.runtime.kernel_rows import KernelRowBuffers
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState
from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.runtime.row_sources import RowSources, Source, common_size, encode_in_turn
from t5_trt.runtime.session import GenerationStep, Session, TokenSelector
from t5_trt.runtime.step_buffers import Slot, cache_rows, made_rows
from t5_trt.runtime.step_decoder import StepDecoder
from t5_trt.runtime.tensorrt_encoder import Encoders
from t5_trt.runtime.tensorrt_engines import TrtEngines
from t5_trt.runtime.torch_layers import TorchEncoder
from t5_trt.runtime.weight_updates import WeightUpdates


class TrtSession:
    """Runs the engines of one model on one GPU; each is loaded or built when it is first needed.

    Args:
        provider: of plans.
        weights: state-dict key -> CPU tensor; kept.
        api: the TensorRT that runs them.
        device: the GPU.
        strict: raise instead of building beyond the configured maxima.
        reference: new engines are compared with it before they are used; None trusts TensorRT.
        precision: of the model, where its engines have another one; None: theirs.
        scaling: factors in the weights; the provider's architecture names those that its graphs undo.
        kernels: decode, unless tokens of the decoder are hidden; None uses engines.
        own_encoder: makes the encoder of the backend "cuda" over the engines' weights, for sizes at which it is faster; None uses engines only.
        background: let it serve sizes whose engine is being built.
    """

    backend = "tensorrt"
    selector_tokens = 512  # a larger buffer costs nothing: a token selector's kernels read only the tokens in use
    batch_size = staticmethod(common_size)

    def __init__(
        self,
        provider: EngineProvider,
        weights: Weights,
        api: TensorRT,
        device: torch.device,
        *,
        strict: bool = False,
        reference: Session | None = None,
        precision: str | None = None,
        scaling: Fp16Scaling | None = None,
        kernels: KernelDecoder | None = None,
        own_encoder: Callable[[DeviceWeights], TorchEncoder] | None = None,
        background: bool = False,
    ) -> None:
        self.updates = 0
        self.arch: Architecture = provider.arch
        self.precision = precision or provider.precision
        self.device = device
        self.real = real_type(provider.precision)
        self.dtype = TORCH_TYPES[self.real]
        self._reference = reference
        # a weak reference avoids a cycle, so that GPU memory is freed when the model is deleted, not at the next garbage collection
        check = None if reference is None else partial(TrtSession._deviation_of_engine, weakref.proxy(self), reference)
        self.scaling = scaling or Fp16Scaling()
        device_weights = DeviceWeights(self.arch, weights, self.dtype, device, self.scaling)
        self.engines = TrtEngines(provider, api, device_weights, strict=strict, check=check)
        if kernels is not None:
            device_weights.share(EMBEDDING, kernels.embedding)
        self._slots = EngineSlots(self.engines, self.arch, self.dtype, device, provider.precision)
        self._engine_step = EngineStep(self.engines, self._slots, self.arch, device) if kernels is None else None
        self._kernels = kernels
        steps = kernels or self._engine_step
        assert steps is not None
        self._steps: StepDecoder = steps
        self._updates = WeightUpdates(self.device)
        self.steps_by = "engine" if kernels is None else "kernels"
        self._encoders = Encoders(self.engines, self.arch, self.dtype, device)
        self._order = StreamOrder(device)
        self._lock = threading.RLock()
        self._forms: EncoderForms | None = None
        if own_encoder is not None:
            turn = partial(TrtSession._at_work, weakref.proxy(self))
            make = partial(own_encoder, device_weights)
            self._forms = EncoderForms(self.engines, self._encoders, make, turn, background=background)

    def encode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor,
        beams: int | None = None,
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`."""
        batch, length = attention_mask.shape
        shapes = self.engines.bucket(B=batch, S=length)
        graph = ENCODER if inputs_embeds is None else ENCODER_EMBEDS
        if self._forms is not None and self._forms.own_serves(graph, shapes):
            with self._at_work():
                return self._forms.own.encode(input_ids, inputs_embeds, attention_mask)
        if beams is not None and self._engine_step is not None:
            with self._lock:
                self.engines.prefetch([(graph, shapes), self._engine_step.wanted(batch, beams, length)])
        with self._at_work():
            return self._encoders.encode(graph, shapes, input_ids, inputs_embeds, attention_mask)

    def project_cross(self, hidden: torch.Tensor) -> CrossStates:
        """See `t5_trt.runtime.session.Session.project_cross`."""
        if self._forms is not None and self._forms.background:
            with self._at_work():  # one product: no engine is worth a build
                return self._forms.own.project(hidden.to(self.dtype))
        batch, length = hidden.shape[:2]
        shapes = self.engines.bucket(B=batch, S=length)
        cross = self._new_cross(shapes, (batch, length))
        inputs = {"encoder_hidden_states": self._pad(hidden, shapes.B, shapes.S)}
        self._run(CROSS, shapes, inputs, {"cross_kv": cross.kv})
        return cross

    def start(
        self, cross: CrossStates, capacity_tokens: int, attention_mask: torch.Tensor | None = None
    ) -> DecoderState:
        """See `t5_trt.runtime.session.Session.start`."""
        if attention_mask is None:
            attention_mask = cross.open_mask()
        with self._at_work():
            return self._steps.start(cross, self.cross_bias(attention_mask, cross), capacity_tokens)

    def cross_bias(self, attention_mask: torch.Tensor, cross: CrossStates) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.cross_bias`; padding of the buffers is hidden too."""
        bias = torch.full((cross.kv.shape[2], 1, 1, cross.kv.shape[4]), mask_value(self.real), device=self.device)
        bias[cross.batch :] = 0  # padding rows may attend to anything
        bias[: cross.batch, 0, 0, : cross.source_length].masked_fill_(attention_mask != 0, 0)
        return bias.to(self.dtype)

    def decode(
        self, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.decode`."""
        rows, queries = input_ids.shape
        with self._at_work():
            state.reserve(queries)
            if key_mask is None and self._kernels is not None:
                return self._kernels.decode(state, input_ids)
            if key_mask is None and queries == 1:
                return self._steps.step(state, input_ids)
            # kernels use another buffer layout: the state stays there, and this engine gets copies
            lease = self._slots.copied(state) if self._engine_step is None else self._slots.home(state)
            return self._queries(lease.slot, state, input_ids, key_mask)[:rows, :queries]

    def layer_outputs(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `t5_trt.runtime.session.Session.layer_outputs`; an engine is built for this and not kept."""
        shapes = _shapes_of(graph, inputs)
        arch, rows = self.arch, shapes.B * shapes.N
        found: dict[str, torch.Tensor] = {}
        with self._at_work():
            context = self.engines.debug_context(graph, shapes)
            if graph == ENCODER:
                found["encoder_hidden_states"] = self._new(shapes.B, shapes.S, arch.d_model)
                rest = {"cross_kv": self._new_cross(shapes, (shapes.B, shapes.S)).kv}
                names, tokens = [f"encoder.block.{layer}" for layer in range(arch.encoder_layers)], shapes.B * shapes.S
            else:
                found["logits"] = torch.empty(
                    (rows, shapes.Q, arch.vocab_size), dtype=torch.float32, device=self.device
                )
                rest = made_rows(self._new(arch.decoder_layers, rows, shapes.Q, 3, arch.num_heads, arch.d_kv))
                names, tokens = [f"decoder.block.{layer}" for layer in range(arch.decoder_layers)], rows * shapes.Q
            found |= {
                name: torch.zeros((tokens, arch.d_model), dtype=torch.float32, device=self.device) for name in names
            }
            sources = {name: (t.int() if t.dtype == torch.int64 else t).contiguous() for name, t in inputs.items()}
            self.engines.bind(context, sources | found | rest)
            self.engines.enqueue(context)
            for name in names:
                found[name] /= arch.stream_factor
            if graph != ENCODER:
                undo_head_factor(self.arch, found["logits"])
            torch.cuda.synchronize(self.device) if self.device.type == "cuda" else None
        return found

    def loaded_graphs(self) -> tuple[str, ...]:
        """See `t5_trt.runtime.session.Session.loaded_graphs`."""
        own = () if self._forms is None else self._forms.opened()
        return self.engines.graphs() + own + (() if self._engine_step else (BY_KERNELS,))

    def update_weights(self, changed: Weights) -> bool:
        """See `t5_trt.runtime.session.Session.update_weights`: in place, where engines and captured steps read; 8-bit engines hold weights."""
        if self.engines.provider.precision == "int8":
            return False
        with self._at_work():
            self.updates += 1
            self._updates.apply(changed, self._write)
            if self._reference is not None:
                self._reference.update_weights(changed)
        return True

    def _write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a new value of a weight, where engines and captured steps read."""
        self.engines.weights.update(key, tensor)
        self._steps.update_weight(key, tensor)

    @property
    def weight_bytes(self) -> int:
        """See `t5_trt.runtime.session.Session.weight_bytes`."""
        return self.engines.weights.nbytes + self._steps.weight_bytes

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`."""
        return self._steps.can_compact_batch(state, batch)

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`."""
        return self._steps.decoded_rows(state)

    def generation_step(self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable) -> GenerationStep:
        """See `t5_trt.runtime.session.Session.generation_step`."""
        with self._at_work():
            return self._steps.generation_step(state, make, key)

    def _deviation_of_engine(self, reference: Session, graph: str, shapes: Shapes) -> Deviation:
        try:
            return worst_deviation(self, reference, graph, shapes)
        finally:  # drop captures made with the engine under test
            with self._lock:
                self._slots.forget()
                self._encoders.clear()

    def _queries(
        self, slot: Slot, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        count, used = bucket("Q", input_ids.shape[1]), input_ids.shape[1]
        shapes = replace(slot.shapes, Q=count)
        rows, capacity = slot.kv.shape[2], slot.shapes.T
        bias = torch.zeros((rows, 1, 1, capacity + count), device=self.device, dtype=self.dtype)
        if key_mask is not None:
            hidden = (key_mask == 0)[:, None, None, :]
            for start, part in ((0, hidden[..., : state.length]), (capacity, hidden[..., state.length :])):
                bias[: state.rows, ..., start : start + part.shape[-1]].masked_fill_(part, mask_value(self.real))
            bias[..., capacity + used :] = empty_slot_value(self.real)  # padding of the queries
        logits = torch.empty((rows, count, self.arch.vocab_size), dtype=torch.float32, device=self.device)
        qkv = self._new(self.arch.decoder_layers, rows, count, 3, self.arch.num_heads, self.arch.d_kv)
        inputs = slot.cache_tensors() | {
            "decoder_input_ids": self._pad(input_ids.int(), rows, count),
            "position": torch.full((1,), state.length, device=self.device, dtype=torch.int32),
            "key_bias": bias,
        }
        self._run(QUERIES, shapes, inputs, {"logits": logits} | made_rows(qkv))
        undo_head_factor(self.arch, logits)
        state.append(cache_rows(qkv)[:, :, : state.kv.shape[2], :, :used])
        return logits

    def rows_refusal(self) -> str | None:
        """See `t5_trt.runtime.row_buffers.RowSession.rows_refusal`."""
        if self._kernels is not None:
            return None
        return (
            f"its decoder step (precision {self.precision!r}) is a TensorRT engine, which has one position for all rows. Load the model "
            "with decode='kernels' and precision='fp16', 'bf16', 'fp32' or 'int8', or with backend='cuda'"
        )

    def row_buffers(self, rows: int) -> RowBuffers:
        """See `t5_trt.runtime.row_buffers.RowSession.row_buffers`."""
        assert self._kernels is not None
        with self._at_work():
            return self._kernels.row_buffers(rows)

    def encode_rows(self, sources: Sequence[Source]) -> RowSources:
        """See `t5_trt.runtime.row_buffers.RowSession.encode_rows`."""
        return encode_in_turn(self, sources, common_size)

    def step_rows(self, rows: RowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """See `t5_trt.runtime.row_buffers.RowSession.step_rows`."""
        assert self._kernels is not None and isinstance(rows, KernelRowBuffers)
        with self._at_work():
            return self._kernels.step_rows(rows, best_only=best_only)

    def _at_work(self) -> AbstractContextManager[None]:
        """See `t5_trt.runtime.cuda_graph.taking_turns`."""
        return taking_turns(self._lock, self._order, self._let_go)

    def _forget(self) -> None:
        """Free idle buffers and all that was captured over them."""
        self._slots.forget()
        self._steps.forget()
        self._encoders.clear()
        if self._forms is not None:
            self._forms.clear()

    def _let_go(self) -> None:
        self._forget()
        self.engines.drop_contexts()

    def _run(
        self, graph: str, shapes: Shapes, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
    ) -> None:
        with self._at_work():
            context = self.engines.context(graph, shapes)
            self.engines.bind(context, inputs | outputs)
            self.engines.enqueue(context)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _new_cross(self, shapes: Shapes, used: tuple[int, int]) -> CrossStates:
        arch = self.arch
        return CrossStates(self._new(arch.decoder_layers, 2, shapes.B, arch.num_heads, shapes.S, arch.d_kv), used=used)

    def _pad(self, tensor: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        """Pad the rows and tokens of a request with zeros."""
        if tensor.shape[:2] == (rows, tokens):
            return tensor.contiguous()
        padded = tensor.new_zeros((rows, tokens, *tensor.shape[2:]))
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        return padded


def _shapes_of(graph: str, inputs: dict[str, torch.Tensor]) -> Shapes:
    if graph == ENCODER:
        batch, length = inputs["attention_mask"].shape
        return Shapes(B=batch, S=length)
    rows, queries = inputs["decoder_input_ids"].shape
    batch, length = inputs["cross_bias"].shape[0], inputs["cross_bias"].shape[3]
    return Shapes(B=batch, N=rows // batch, S=length, T=inputs["past_k_0"].shape[2], Q=queries)
