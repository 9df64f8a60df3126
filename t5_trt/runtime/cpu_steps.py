"""What our own C code runs of ONNX Runtime's session: the encoder for few tokens, and decoder steps over a request's cache and over rows
at positions of their own.

How data flows: steps read K and V of the sources as either encoder wrote them, and the cache as the session's states and row
buffers hold it. A step reads no key behind a row's position and none behind the last token of a source that is not hidden, so what
lies there does not matter.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import EMBEDDING, Weights, encoder_groups, step_matrices
from t5_trt.kernels.cpu_decoder import Call, CpuDecoder
from t5_trt.kernels.cpu_encoder import CpuEncoder
from t5_trt.kernels.cpu_weights import CpuTeam, stay_cached
from t5_trt.runtime.kv_buffers import Binding, DecoderState
from t5_trt.runtime.row_buffers import RowBuffers
from t5_trt.runtime.tensor_file import StoredTensors

#: in `t5_trt.runtime.session.Session.loaded_graphs`
ENCODER_BY_C_CODE, BY_C_CODE = "encoder (C code)", "decoder (C code)"
#: tokens of all sources of a call up to which the C code encodes; above, ONNX Runtime's products, in larger blocks, are as fast: with 2
#: threads from 128 tokens on (T5-base shapes, AVX-512)
ENCODED_TOKENS = 96
#: and where each thread takes rows of its own, as matrices stay in caches (`t5_trt.kernels.cpu_weights.CACHED_BYTES`): ONNX Runtime is as
#: fast from 400 tokens on, but its threads do not take over what another one is late with
ENCODED_TOKENS_CACHED = 1024
#: in 8 bits the C code is faster up to 256 tokens and more; not where the processor has AMX, which ONNX Runtime uses and the C code does not
ENCODED_TOKENS_INT8 = 64


@dataclass(frozen=True)
class BoundCall:
    """A `t5_trt.runtime.kv_buffers.Binding`: the one-token step over the addresses of a state.

    Attributes:
        owner: the steps.
        step: addresses for `CpuDecoder.run`.
        call: the memory of these addresses.
        logits: of rows, float32 [count, 1, V].
        earlier: another session's binding, which may have lent the state its memory.
    """

    owner: object
    step: Any
    call: Call
    logits: torch.Tensor | None = None
    earlier: Binding | None = None

    def of(self, owner: object) -> bool:
        """See `t5_trt.runtime.kv_buffers.Binding.of`."""
        return self.owner is owner


class CpuRowBuffers(RowBuffers):
    """As `RowBuffers`; a step reads only what a row has written, and its source up to the last token that is not hidden."""

    reads_empty_places = False

    def add(self, cross: torch.Tensor, cross_bias: torch.Tensor, row: int | None = None) -> int:
        """See `RowBuffers.add`."""
        made = super().add(cross, cross_bias, row)
        self._hide_rest(made)
        return made

    def _move(self, last: int, row: int) -> None:
        super()._move(last, row)
        self._hide_rest(row)

    def _hide_rest(self, row: int) -> None:
        """Hide what is behind a row's source, which earlier sources may have left."""
        self.cross_bias.numpy()[row, ..., int(self._sources[row]) :] = self.hidden


class CpuSteps:
    """Runs the decoder of one model and, for few tokens, its encoder; the weights of each are laid out at its first call.

    Args:
        library: the compiled C code.
        arch: of the model.
        weights: state-dict key -> CPU tensor.
        quantized: matrices in 8 bits, see `t5_trt.graph.int8.quantize`; None multiplies by `weights`.
        matrices: the type of the decoder's matrices, see `CpuDecoder`.
        threads: of a call.
        spinning: whether they may wait busily for one another.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        arch: Architecture,
        weights: Weights,
        quantized: dict[str, torch.Tensor] | None,
        *,
        matrices: torch.dtype | None = None,
        threads: int,
        spinning: bool,
    ) -> None:
        self._arch, self._weights, self._quantized, self._matrices = arch, weights, quantized, matrices
        self._team = CpuTeam(library, threads, spinning)
        self._encoded = ENCODED_TOKENS if quantized is None else ENCODED_TOKENS_INT8
        if stay_cached(arch, encoder_groups(arch), quantized):
            self._encoded = ENCODED_TOKENS_CACHED
        self._made: CpuDecoder | None = None
        self._encoder_made: CpuEncoder | None = None
        self._making = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """What has run, as in `t5_trt.runtime.session.Session.loaded_graphs`."""
        made = {ENCODER_BY_C_CODE: self._encoder_made, BY_C_CODE: self._made}
        return tuple(name for name, each in made.items() if each is not None)

    def encodes(self, tokens: int) -> bool:
        """Whether so many tokens of all sources of a call are for the C code."""
        return tokens <= self._encoded

    def encode(self, source: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor, cross: torch.Tensor) -> None:
        """Encode sources; see `CpuEncoder.encode`."""
        self._encoder().encode(source, bias, hidden, cross)

    def project_cross(self, hidden: torch.Tensor, cross: torch.Tensor) -> None:
        """Compute K and V of given states; see `CpuEncoder.project`."""
        self._encoder().project(hidden, cross)

    def one_token(
        self,
        state: DecoderState,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        *,
        best_only: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Decode a token of each row.

        Args:
            state: of R rows, with room for one more token; it is one longer afterwards.
            tokens: int64 [R, 1].
            logits: float32 [R, 1, V], written.
            best_only: see `CpuDecoder.run`.
            hidden: see `CpuDecoder.run`.
        """
        state.use_ancestors()
        decoder, bound = self._decoder(), state.binding
        if not isinstance(bound, BoundCall) or not bound.of(self):  # a cache may outlive its session
            call = _call(state, torch.empty((state.rows, 1), dtype=torch.int64))
            bound = state.binding = BoundCall(self, decoder.prepare(call), call, earlier=state.binding)
        bound.call.tokens.copy_(tokens)
        bound.call.positions.fill_(state.length)
        decoder.run(bound.step, logits, state.ancestors, best_only=best_only, hidden=hidden)
        state.length += 1

    def several_tokens(
        self, state: DecoderState, tokens: torch.Tensor, key_bias: torch.Tensor | None, logits: torch.Tensor
    ) -> None:
        """Decode Q tokens of each row.

        Args:
            state: of R rows, with room for them; it is Q longer afterwards.
            tokens: int64 [R, Q].
            key_bias: float32 [R, length + Q], added to the scores of the decoder's own tokens; None for none.
            logits: float32 [R, Q, V], written.
        """
        decoder, call = self._decoder(), _call(state, tokens.contiguous(), key_bias)
        call.positions.fill_(state.length)
        decoder.run(decoder.prepare(call), logits, state.ancestors)
        state.length += tokens.shape[1]

    def rows(self, rows: RowBuffers, *, best_only: bool = False) -> torch.Tensor:
        """Decode a token of each row in use; logits, float32 [count, V], good until the next step. For `best_only` see `CpuDecoder.run`."""
        count, decoder = rows.count, self._decoder()
        bound = rows.bindings.get(count)
        if not isinstance(bound, BoundCall) or not bound.of(self):
            logits = torch.empty((count, 1, self._arch.vocab_size), dtype=torch.float32)
            used = slice(count)
            cross, bias = rows.cross[:, :, used], rows.cross_bias[used]
            call = Call(rows.tokens[used], rows.positions[used], rows.kv[:, :, used], cross, bias)
            bound = rows.bindings[count] = BoundCall(self, decoder.prepare(call), call, logits)
        assert bound.logits is not None
        decoder.run(bound.step, bound.logits, best_only=best_only)
        rows.advance()
        return bound.logits[:, 0]

    def update(self, changed: Collection[str] | None) -> None:
        """Follow weights that changed in their memory; None follows any change."""
        with self._making:
            if changed is None:
                self._made = self._encoder_made = None
                return
            for each in (self._made, self._encoder_made):
                if each is not None:
                    each.update(changed)

    def _decoder(self) -> CpuDecoder:
        if self._made is None:
            with self._making:
                if self._made is None:
                    self._made = CpuDecoder(
                        self._team,
                        self._arch,
                        self._weights,
                        self._quantized,
                        matrices=self._matrices,
                        after_packing=self._after_packing,
                    )
        return self._made

    def _encoder(self) -> CpuEncoder:
        if self._encoder_made is None:
            with self._making:
                if self._encoder_made is None:
                    self._encoder_made = CpuEncoder(
                        self._team, self._arch, self._weights, self._quantized, after_packing=self._after_packing
                    )
        return self._encoder_made

    @property
    def _after_packing(self) -> Callable[[str], None] | None:
        return self._quantized.give_back if isinstance(self._quantized, StoredTensors) else None


def rounded_to_bf16(arch: Architecture, weights: Weights) -> Weights:
    """Weights in float32 with which a graph computes what a step does with matrices in bfloat16.

    An output matrix that is the embedding stays as it is, as tokens are looked up in it.
    """
    rounded = step_matrices(arch) - {EMBEDDING}
    return {key: weight.bfloat16().float() if key in rounded else weight for key, weight in weights.items()}


def _call(state: DecoderState, tokens: torch.Tensor, key_bias: torch.Tensor | None = None) -> Call:
    positions = torch.zeros(1, dtype=torch.int64)
    return Call(tokens, positions, state.kv, state.cross.kv, state.cross_bias, key_bias)
