"""A CPU: ONNX Runtime's graphs, which are also the reference for other engines, and our own C code where it is compiled.

The matrices are not copied: ONNX Runtime reads the memory of the torch parameters, which for a float32
safetensors checkpoint is the mapped file. Inputs and outputs are bound to torch tensors, so a step allocates its logits
and nothing else.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from t5_trt.errors import BackendError, raise_hidden_interrupt
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.build_graph import build_host_graph
from t5_trt.graph.fused_step import can_fuse
from t5_trt.graph.int4 import has_4_bits
from t5_trt.graph.parameters import Weights
from t5_trt.graph.precision import mask_value
from t5_trt.graph.signature import CROSS, ENCODER, ENCODER_EMBEDS, QUERIES, STEP
from t5_trt.runtime.cpu_generation_step import CpuGenerationStep
from t5_trt.runtime.cpu_steps import CpuRowBuffers, CpuSteps, rounded_to_bf16
from t5_trt.runtime.int8_weights import round_anew, rounded_names
from t5_trt.runtime.kv_buffers import SMALLEST_BUCKET, CrossStates, DecoderState, layer_views
from t5_trt.runtime.onnxruntime_binding import BoundRows, BoundStep, LoadedGraph, bind
from t5_trt.runtime.open_graph import open_graph
from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.runtime.row_sources import RowSources, Source, encode_in_turn, own_size
from t5_trt.runtime.session import TokenSelector
from t5_trt.runtime.top_tokens import best


class OrtSession:
    """Runs the graphs of one model with ONNX Runtime; each is loaded when it is first needed.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; it is kept, and its memory read, for as long as the session lives.
        num_threads: of every operator; None takes torch's.
        thread_spinning: see `t5_trt.config.RuntimeConfig`.
        prepack_weights: see `t5_trt.config.RuntimeConfig`.
        quantized: matrices in 8 bits or fewer, see `t5_trt.runtime.int8_weights.load_int8_weights`; None computes in float32.
        changing: keys of `weights` that are overwritten before calls of `update_weights`: graphs take them as inputs, so that
            ONNX Runtime keeps no packed copies of them.
        library: the C code, see `t5_trt.kernels.cpu_compile.load_library`; None does without it.
        matrices: torch.bfloat16 makes the C code multiply by matrices in bfloat16; `weights` may then have those in it, too.

    Raises:
        BackendError: onnxruntime cannot be imported.
    """

    backend, batch_size = "onnxruntime", staticmethod(own_size)
    device = torch.device("cpu")
    dtype = torch.float32
    selector_tokens = SMALLEST_BUCKET
    scaling = None
    engines = None

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        *,
        num_threads: int | None = None,
        thread_spinning: bool = True,
        prepack_weights: bool | None = None,
        quantized: dict[str, torch.Tensor] | None = None,
        changing: Collection[str] = (),
        library: ctypes.CDLL | None = None,
        matrices: torch.dtype | None = None,
    ) -> None:
        self.arch = arch
        self.precision = "fp32" if matrices is None else "bf16"
        if quantized is not None:
            self.precision = "int4" if has_4_bits(quantized) else "int8"
        self._quantized = quantized
        self.num_threads = num_threads or torch.get_num_threads()
        self._spinning = thread_spinning
        self._weights, self._changing = weights, frozenset(changing)
        self._in_place = can_fuse(arch)  # the step writes into the cache
        self.updates = 0
        # packed 8-bit matrices take a quarter of float32 ones; matrices in 4 bits are fast only if they are packed
        self._prepack = True if quantized is not None else prepack_weights
        self._ort = import_onnxruntime()
        self._sessions: dict[tuple[str, bool], LoadedGraph] = {}  # by graph, and whether its matrices are packed
        self._shared: dict[str, Any] = {}  # weight name -> OrtValue over the parameter's memory
        self._loading = threading.Lock()
        self._steps: CpuSteps | None = None
        if library is not None:
            options: dict[str, Any] = {"threads": self.num_threads, "spinning": thread_spinning}
            self._steps = CpuSteps(library, arch, weights, quantized, matrices=matrices, **options)
        self.steps_by = "engine" if self._steps is None else "kernels"

    def encode(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor,
        beams: int | None = None,
    ) -> tuple[torch.Tensor, CrossStates]:
        """See `t5_trt.runtime.session.Session.encode`."""
        batch, length = attention_mask.shape
        cross = self._new_cross(batch, length)
        hidden = torch.empty((batch, length, self.arch.d_model), dtype=torch.float32)
        source = input_ids if inputs_embeds is None else inputs_embeds
        assert source is not None
        if self._steps is not None and self._steps.encodes(batch * length):
            self._steps.encode(source, _additive(attention_mask)[:, 0, 0], hidden, cross.kv)
            return hidden, cross
        graph, name = (ENCODER, "input_ids") if inputs_embeds is None else (ENCODER_EMBEDS, "inputs_embeds")
        inputs = {name: source.contiguous(), "attention_mask": attention_mask.contiguous()}
        self._run(graph, inputs, {"encoder_hidden_states": hidden} | layer_views("cross", cross.kv))
        return hidden, cross

    def project_cross(self, hidden: torch.Tensor) -> CrossStates:
        """See `t5_trt.runtime.session.Session.project_cross`."""
        cross = self._new_cross(hidden.shape[0], hidden.shape[1])
        if self._steps is not None and self._steps.encodes(hidden.shape[0] * hidden.shape[1]):
            self._steps.project_cross(hidden, cross.kv)
            return cross
        self._run(CROSS, {"encoder_hidden_states": hidden.contiguous()}, layer_views("cross", cross.kv))
        return cross

    def start(
        self, cross: CrossStates, capacity_tokens: int, attention_mask: torch.Tensor | None = None
    ) -> DecoderState:
        """See `t5_trt.runtime.session.Session.start`."""
        if attention_mask is None:
            attention_mask = cross.open_mask()
        bias = self.cross_bias(attention_mask, cross)
        return DecoderState.allocate(self.arch, cross, bias, capacity_tokens)

    def cross_bias(self, attention_mask: torch.Tensor, cross: CrossStates) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.cross_bias`."""
        return _additive(attention_mask)

    def decode(
        self, state: DecoderState, input_ids: torch.Tensor, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `t5_trt.runtime.session.Session.decode`."""
        rows, queries = input_ids.shape
        state.reserve(queries)
        logits = torch.empty((rows, queries, self.arch.vocab_size), dtype=torch.float32)
        if queries == 1 and key_mask is None:
            self.step(state, input_ids, logits)
            return logits
        if self._steps is not None:
            mask = None if key_mask is None else _additive(key_mask)[:, 0, 0]
            self._steps.several_tokens(state, input_ids, mask, logits)
            return logits
        state.materialize()
        bias = torch.zeros((rows, 1, 1, state.capacity + queries), dtype=torch.float32)
        if key_mask is not None:  # cached keys first, then unused slots (hidden by the graph itself), then new keys
            extra = _additive(key_mask)
            bias[..., : state.length] = extra[..., : state.length]
            bias[..., state.capacity :] = extra[..., state.length :]
        new = torch.empty((*state.kv.shape[:4], queries, self.arch.d_kv), dtype=torch.float32)
        inputs = self._decoder_inputs(state) | {
            "decoder_input_ids": input_ids.contiguous(),
            "position": torch.tensor([state.length]),
            "key_bias": bias,
        }
        self._run(QUERIES, inputs, {"logits": logits} | layer_views("new", new))
        state.append(new)
        return logits

    def can_compact_batch(self, state: DecoderState, batch: int) -> bool:
        """See `t5_trt.runtime.session.Session.can_compact_batch`."""
        return batch < state.cross.batch

    def decoded_rows(self, state: DecoderState) -> int:
        """See `t5_trt.runtime.session.Session.decoded_rows`."""
        return state.rows

    def generation_step(
        self, state: DecoderState, make: Callable[[], TokenSelector], key: Hashable
    ) -> CpuGenerationStep:
        """See `t5_trt.runtime.session.Session.generation_step`; nothing is captured on a CPU."""
        return CpuGenerationStep(self, state, make())

    def rows_refusal(self) -> str | None:
        """See `t5_trt.runtime.row_buffers.RowSession.rows_refusal`."""
        return None

    def row_buffers(self, rows: int) -> RowBuffers:
        """See `t5_trt.runtime.row_buffers.RowSession.row_buffers`."""
        real, hidden = torch.float32, mask_value(ir.DataType.FLOAT)
        kind = RowBuffers if self._steps is None else CpuRowBuffers
        return kind(self.arch, rows, dtype=real, bias_dtype=real, hidden=hidden, device=self.device)

    def encode_rows(self, sources: Sequence[Source]) -> RowSources:
        """See `t5_trt.runtime.row_buffers.RowSession.encode_rows`."""
        return encode_in_turn(self, sources, own_size)

    def step_rows(self, rows: RowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """See `t5_trt.runtime.row_buffers.RowSession.step_rows`."""
        if self._steps is not None:
            logits = self._steps.rows(rows, best_only=best_only)
            return best(logits) if best_only else logits
        count = rows.count
        bound = rows.bindings.get(count)
        if not isinstance(bound, BoundRows):
            graph = self._session(STEP, several_rows=True)
            binding = graph.session.io_binding()
            logits = torch.empty((count, 1, self.arch.vocab_size), dtype=torch.float32)
            inputs = layer_views("past", rows.kv[:, :, :count]) | layer_views("cross", rows.cross[:, :, :count])
            inputs["cross_bias"] = rows.cross_bias[:count]
            inputs["decoder_input_ids"], inputs["position"] = rows.tokens[:count], rows.positions[:count]
            bind(binding.bind_input, inputs | graph.weights)
            written = self._written(rows.kv[:, :, :count], rows.new[:, :, :count])
            bind(binding.bind_output, written | {"logits": logits})
            bound = rows.bindings[count] = BoundRows(graph.session, binding, logits[:, 0])
        self._call(bound.session, bound.io)
        if self._in_place:
            rows.advance()
        else:
            rows.append()
        return best(bound.logits) if best_only else bound.logits

    def layer_outputs(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `t5_trt.runtime.session.Session.layer_outputs`."""
        shared: dict[str, Any] = {}  # until the graph has run
        loaded = self._load(graph, bool(self._prepack), debug_outputs=True, shared=shared)
        names = [node.name for node in loaded.session.get_outputs() if not node.name.startswith(("cross_", "new_"))]
        given = inputs | loaded.weights
        found = loaded.session.run(names, {name: tensor.numpy() for name, tensor in given.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    def update_weights(self, changed: Weights) -> bool:
        """See `t5_trt.runtime.session.Session.update_weights`: in float32 this does nothing, as their memory is read."""
        self.updates += 1
        known = set(changed) <= self._changing
        if not known:  # graphs have copied this memory
            self._sessions.clear()
            self._shared.clear()
        if self._quantized is not None:
            round_anew(self.arch, self._weights, self._quantized, set(changed))
        if self._steps is not None:
            self._steps.update(set(changed) if known else None)
        return True

    @property
    def weight_bytes(self) -> int:
        """See `t5_trt.runtime.session.Session.weight_bytes`."""
        return 0

    def loaded_graphs(self) -> tuple[str, ...]:
        """See `t5_trt.runtime.session.Session.loaded_graphs`."""
        own = () if self._steps is None else self._steps.loaded
        return (*dict.fromkeys(graph for graph, _ in self._sessions), *own)

    def step(
        self,
        state: DecoderState,
        input_ids: torch.Tensor,
        logits: torch.Tensor,
        hidden: torch.Tensor | None = None,
        *,
        best_only: bool = False,
    ) -> None:
        """Decode a token of each row, see `t5_trt.runtime.cpu_steps.CpuSteps.one_token`; ONNX Runtime's logits are always exact."""
        if self._steps is not None:
            self._steps.one_token(state, input_ids, logits, best_only=best_only, hidden=hidden)
            return
        state.materialize()
        bound = state.binding
        if not isinstance(bound, BoundStep) or not bound.of(self):  # a cache may outlive its session
            graph = self._session(STEP, several_rows=state.rows > 1)
            tokens, position = torch.empty((state.rows, 1), dtype=torch.int64), torch.empty(1, dtype=torch.int64)
            binding = graph.session.io_binding()
            inputs = self._decoder_inputs(state) | {"decoder_input_ids": tokens, "position": position}
            bind(binding.bind_input, inputs | graph.weights)
            bind(binding.bind_output, self._written(state.kv, state.new))
            bound = BoundStep(self, graph.session, binding, tokens, position, inputs, state.binding)
            state.binding = bound
        bound.tokens.copy_(input_ids)
        bound.position.fill_(state.length)
        bind(bound.io.bind_output, {"logits": logits})
        self._call(bound.session, bound.io)
        if self._in_place:
            state.length += 1
        else:
            state.append(state.new)

    def _written(self, kv: torch.Tensor, new: torch.Tensor) -> dict[str, torch.Tensor]:
        """The memory that a step writes K and V to: the cache, or where it does not write there, a buffer for the new ones."""
        return layer_views("present", kv) if self._in_place else layer_views("new", new)

    def _decoder_inputs(self, state: DecoderState) -> dict[str, torch.Tensor]:
        buffers = layer_views("past", state.kv) | layer_views("cross", state.cross.kv)
        return buffers | {"cross_bias": state.cross_bias}

    def _new_cross(self, batch: int, length: int) -> CrossStates:
        arch = self.arch
        return CrossStates(
            torch.empty((arch.decoder_layers, 2, batch, arch.num_heads, length, arch.d_kv), dtype=torch.float32)
        )

    def _run(self, graph: str, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        loaded = self._session(graph)
        binding = loaded.session.io_binding()
        bind(binding.bind_input, inputs | loaded.weights)
        bind(binding.bind_output, outputs)
        self._call(loaded.session, binding)

    def _call(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own classes, which derive from Exception only
            raise BackendError(
                f"ONNX Runtime failed while running a graph: {error}. The model stays usable; if memory ran out, use a "
                "smaller batch or fewer beams."
            ) from error

    def _session(self, graph: str, *, several_rows: bool = False) -> LoadedGraph:
        with self._loading:
            packed = bool(self._prepack) or (self._prepack is None and several_rows)
            if self._prepack is None and (graph, True) in self._sessions:
                packed = True  # it is loaded, and as fast for one row
            if (graph, packed) not in self._sessions:
                self._sessions[graph, packed] = self._load(graph, packed)
            return self._sessions[graph, packed]

    def _session_options(self, graph: str, packed: bool) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.log_severity_level = 3
        # one memory block for all results of a run: faster for the many small ones of a step, but changing sizes would fill the arena
        options.enable_mem_pattern = graph == STEP
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not self._spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # spinning threads would slow down torch's threads, which run between two steps
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _load(
        self, graph: str, packed: bool, *, debug_outputs: bool = False, shared: dict[str, Any] | None = None
    ) -> LoadedGraph:
        decodes_in_bf16 = self.precision == "bf16" and graph in (STEP, QUERIES)
        weights = rounded_to_bf16(self.arch, self._weights) if decodes_in_bf16 else self._weights
        changing = self._changing | rounded_names(self.arch, self._quantized or {}, self._changing)
        build = partial(
            build_host_graph,
            graph,
            self.arch,
            weights,
            ir.DataType.FLOAT,
            quantized=self._quantized,
            inputs=changing,
            debug_outputs=debug_outputs,
            fused=graph == STEP and self._in_place and not debug_outputs,
        )
        try:
            options = self._session_options(graph, packed)
            memory = self._shared if shared is None else shared
            session, inputs = open_graph(self._ort, build, options, memory, self._quantized)
        except Exception as error:
            raise_hidden_interrupt(error)
            raise BackendError(
                f"ONNX Runtime {self._ort.__version__} could not load the {graph} graph: {error}. Expected ONNX "
                "Runtime 1.23 or newer; if this one is, please report the message."
            ) from error
        read = weights if self._quantized is None else {**weights, **self._quantized}
        return LoadedGraph(session, {name: read[name] for name in inputs if name in changing})


def import_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        BackendError: it is not installed, or its library does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"the backend 'onnxruntime' needs the package onnxruntime, which did not import ({error}). Install it with "
            "`pip install onnxruntime`, or use a machine with TensorRT and backend='tensorrt'."
        ) from error
    return onnxruntime


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """0 where a mask [rows, keys] is non-zero, else the mask value: [rows, 1, 1, keys]."""
    bias = np.where(mask.numpy() == 0, np.float32(mask_value(ir.DataType.FLOAT)), np.float32(0))
    return torch.from_numpy(bias[:, None, None, :])
