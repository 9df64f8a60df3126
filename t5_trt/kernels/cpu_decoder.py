"""The decoder on a CPU by our own C code (`t5_trt/kernels/cpu`): calls for rows at positions of their own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import LM_HEAD, Weights, step_groups
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels.cpu_weights import TYPES, CpuTeam, CpuWeights, Group, Layer, Part, packed_bytes

_long, _address = ctypes.c_int64, ctypes.c_void_p


class _Cache(ctypes.Structure):
    _fields_ = [("memory", _address), *((name, _long) for name in ("layer", "kind", "row", "head"))]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("rows", "queries", "beams")),
        *(("tokens", _address), ("positions", _address), ("position_step", _long)),
        ("cache", _Cache),
        *(("ancestors", _address), ("ancestors_row", _long), ("key_bias", _address), ("key_bias_row", _long)),
        ("cross", _Cache),
        *(("cross_bias", _address), ("cross_bias_row", _long), ("source_length", _long)),
        *(("logits", _address), ("logits_row", _long)),
        *(("best_only", _long), ("hidden_count", _long), ("hidden", _address)),
    ]


class _RoughHead(ctypes.Structure):
    _fields_ = [("group", Group), ("errors", _address), ("lengths", _address)]


@dataclass(frozen=True)
class Call:
    """The memory of a step of R rows with Q new tokens each; all tensors are on the CPU.

    Attributes:
        tokens: int64 [R, Q], contiguous.
        positions: int64 [R] or [1], of the first new token.
        kv: float32 [L, 2, R, H, T, D], whose places of a head are contiguous; K and V of the new tokens are written into it.
        cross: float32 [L, 2, B, H, S, D], likewise; R / B rows after one another read the same entry.
        cross_bias: float32 [B, 1, 1, S].
        key_bias: float32 [R, T], added to the scores of the decoder's own tokens; None for none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    kv: torch.Tensor
    cross: torch.Tensor
    cross_bias: torch.Tensor
    key_bias: torch.Tensor | None = None


class CpuDecoder:
    """Runs the decoder of one model. Calls of several threads wait for one another.

    Args:
        team: runs the calls.
        arch: of the model.
        weights: state-dict key -> CPU tensor; the memory of float32 and bfloat16 is read by every call.
        quantized: what `t5_trt.graph.int8.quantize` makes; None multiplies by `weights`.
        matrices: the type to multiply by, see `CpuWeights`.
        after_packing: see `CpuWeights`.

    Raises:
        BackendError: memory ran out.
    """

    def __init__(
        self,
        team: CpuTeam,
        arch: Architecture,
        weights: Weights,
        quantized: Mapping[str, torch.Tensor] | None,
        *,
        matrices: torch.dtype | None = None,
        after_packing: Callable[[str], None] | None = None,
    ) -> None:
        self._team, self._arch = team, arch
        groups = step_groups(arch)
        self.weights = CpuWeights(
            team.library, arch, weights, quantized, groups, matrices=matrices, after_packing=after_packing
        )
        self._rough: _RoughHead | None = None
        self._rounding = threading.Lock()
        self._layers = (Layer * arch.decoder_layers)(*(self._layer(layer) for layer in range(arch.decoder_layers)))
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=False)
        head = self.weights.groups[LM_HEAD]
        model = self.weights.model(arch.decoder_layers, buckets, head.norm)
        model.longest_distance, model.output_scale = len(buckets) - 1, head.scale
        model.head = self.weights.group(LM_HEAD)
        model.layers_of = ctypes.cast(self._layers, ctypes.POINTER(Layer))
        self._decoder = team.open(model)

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._team.library.t5_close(self._decoder)

    def update(self, changed: Collection[str]) -> None:
        """Read weights that have changed in their places, and matrices of them that were rounded anew.

        Args:
            changed: state-dict keys.
        """
        self.weights.update(changed)
        if self._rough is not None and self._arch.head_weight in changed:
            self._make_rough_head()

    def prepare(self, call: Call) -> _Step:
        """The addresses of a call, which may be run as long as its memory stays where it is."""
        rows, queries = call.tokens.shape
        step = _Step(rows=rows, queries=queries, beams=rows // call.cross.shape[2])
        step.tokens, step.positions = call.tokens.data_ptr(), call.positions.data_ptr()
        step.position_step = int(len(call.positions) > 1)
        step.cache, step.cross = _cache(call.kv), _cache(call.cross)
        step.cross_bias, step.cross_bias_row = call.cross_bias.data_ptr(), call.cross_bias.stride(0)
        step.source_length = call.cross.shape[4]
        step.logits_row = self._arch.vocab_size
        if call.key_bias is not None:
            step.key_bias, step.key_bias_row = call.key_bias.data_ptr(), call.key_bias.stride(0)
        return step

    def run(
        self,
        step: _Step,
        logits: torch.Tensor,
        ancestors: torch.Tensor | None = None,
        *,
        best_only: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Decode the tokens of a call and write their K and V.

        Args:
            step: of `prepare`.
            logits: float32 [R, Q, V], contiguous, written.
            best_only: only the largest logit of each row is wanted: others may be off, but stay smaller. In float32 a quarter of the
                output matrix is read then (`t5_trt/kernels/cpu/rough_head.h`).
            hidden: int64, tokens that are then not to be the largest; None for none.
            ancestors: uint8 [R, T + 1], where beams have moved: token t of row i lies in row ``ancestors[i, t]`` of i's batch entry.
                None where rows read their own cache.

        Raises:
            InputError: a token is not in the vocabulary.
            BackendError: memory ran out.
        """
        step.logits = logits.data_ptr()
        step.best_only, step.hidden_count = int(best_only), 0 if hidden is None else len(hidden)
        step.hidden = None if hidden is None else hidden.data_ptr()
        if best_only and self._rough is None and self._has_float32_head:
            with self._rounding:
                if self._rough is None:  # or another thread has made it meanwhile
                    self._make_rough_head()
        step.ancestors = None if ancestors is None else ancestors.data_ptr()
        step.ancestors_row = 0 if ancestors is None else ancestors.stride(0)
        self._team.check(
            self._team.library.t5_decode(self._decoder, ctypes.byref(step)), "decoder", self._arch.vocab_size
        )

    @property
    def _has_float32_head(self) -> bool:
        key, weights = self._arch.head_weight, self.weights
        return LM_HEAD not in weights.packed and key not in weights.rounded and weights.kept[key].dtype == torch.float32

    def _make_rough_head(self) -> None:
        """Round the output matrix for steps that want only the largest logit; its exact rows stay where they are."""
        outputs, inputs = self._arch.vocab_size, self._arch.d_model
        tiles = self.weights.room(packed_bytes(inputs, outputs), torch.uint8)
        scales, errors, lengths = torch.empty((3, outputs), dtype=torch.float32)
        made = (tiles, scales, errors, lengths)
        for name, tensor in zip(("tiles", "scales", "errors", "lengths"), made, strict=True):
            self.weights.keep(f"rough.{name}", tensor)
        head = _address(self.weights.kept[self._arch.head_weight].data_ptr())
        self._team.library.t5_round_head(
            head, _long(inputs), _long(outputs), *(_address(each.data_ptr()) for each in made)
        )
        group = Group(count=1, type=TYPES[torch.int8], inputs=inputs, outputs=outputs)
        group.parts[0] = Part(tiles.data_ptr(), scales.data_ptr(), outputs)
        self._rough = _RoughHead(group, errors.data_ptr(), lengths.data_ptr())
        self._team.library.t5_use_rough_head(self._decoder, ctypes.byref(self._rough))

    def _layer(self, layer: int) -> Layer:
        block = f"decoder.block.{layer}.layer"
        names = {
            "qkv": f"{block}.0.SelfAttention.qkv",
            "self_o": f"{block}.0.SelfAttention.o",
            "cross_q": f"{block}.1.EncDecAttention.q",
            "cross_o": f"{block}.1.EncDecAttention.o",
            "wi": f"{block}.2.DenseReluDense.wi",
            "wo": f"{block}.2.DenseReluDense.wo",
        }
        return self.weights.layer(names, self._arch.bias_weight("decoder", layer))


def _cache(kv: torch.Tensor) -> _Cache:
    return _Cache(kv.data_ptr(), *kv.stride()[:4])
