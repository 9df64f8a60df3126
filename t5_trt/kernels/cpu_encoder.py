"""The encoder on a CPU by our own C code (`t5_trt/kernels/cpu/encoder.h`), with K and V of the decoder's cross-attention."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import CROSS_KV, Weights, encoder_groups
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels.cpu_weights import CpuTeam, CpuWeights, Group, Layer

_long, _address = ctypes.c_int64, ctypes.c_void_p


class _Sources(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("batch", "length")),
        *((name, _address) for name in ("tokens", "embeddings", "key_bias", "hidden", "cross")),
    ]


class CpuEncoder:
    """Runs the encoder of a model with a decoder. Calls of several threads wait for one another.

    What a source gets depends neither on other sources of its batch nor on hidden tokens behind it.

    Args:
        team: runs the calls.
        arch: of the model.
        weights: state-dict key -> CPU tensor; the memory of float32 and bfloat16 is read by every call.
        quantized: what `t5_trt.graph.int8.quantize` makes; None multiplies by `weights`.
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
        after_packing: Callable[[str], None] | None = None,
    ) -> None:
        self._team, self._arch = team, arch
        self._weights = CpuWeights(
            team.library, arch, weights, quantized, encoder_groups(arch), after_packing=after_packing
        )
        self._layers = (Layer * arch.encoder_layers)(*(self._layer(layer) for layer in range(arch.encoder_layers)))
        cross = self._weights.split_group(CROSS_KV, 2)
        self._cross = (Group * len(cross))(*cross)
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True)
        model = self._weights.model(arch.encoder_layers, buckets, "encoder.final_layer_norm.weight")
        model.longest_distance = len(buckets) // 2
        model.layers_of = ctypes.cast(self._layers, ctypes.POINTER(Layer))
        model.cross_kv, model.cross_groups = ctypes.cast(self._cross, ctypes.POINTER(Group)), len(cross)
        self._encoder = team.open(model)

    def __del__(self) -> None:
        if getattr(self, "_encoder", None):
            self._team.library.t5_close(self._encoder)

    def update(self, changed: Collection[str]) -> None:
        """See `CpuWeights.update`."""
        self._weights.update(changed)

    def encode(self, source: torch.Tensor, key_bias: torch.Tensor, hidden: torch.Tensor, cross: torch.Tensor) -> None:
        """Encode sources.

        Args:
            source: int64 [B, S], or embeddings float32 [B, S, E].
            key_bias: float32 [B, S], added to the scores of a source's tokens.
            hidden: float32 [B, S, E], contiguous, written.
            cross: float32 [L, 2, B, H, S, D], contiguous, written.

        Raises:
            InputError: a token is not in the vocabulary.
            BackendError: memory ran out.
        """
        source, key_bias = source.contiguous(), key_bias.contiguous()
        sources = _Sources(batch=source.shape[0], length=source.shape[1], key_bias=key_bias.data_ptr())
        if source.is_floating_point():
            sources.embeddings = source.data_ptr()
        else:
            sources.tokens = source.data_ptr()
        self._run(sources, hidden, cross)

    def project(self, hidden: torch.Tensor, cross: torch.Tensor) -> None:
        """Compute K and V of given states.

        Args:
            hidden: float32 [B, S, E].
            cross: float32 [L, 2, B, H, S, D], contiguous, written.

        Raises:
            BackendError: memory ran out.
        """
        self._run(_Sources(batch=hidden.shape[0], length=hidden.shape[1]), hidden.contiguous(), cross)

    def _run(self, sources: _Sources, hidden: torch.Tensor, cross: torch.Tensor) -> None:
        sources.hidden, sources.cross = hidden.data_ptr(), cross.data_ptr()
        self._team.check(
            self._team.library.t5_encode(self._encoder, ctypes.byref(sources)), "encoder", self._arch.vocab_size
        )

    def _layer(self, layer: int) -> Layer:
        block = f"encoder.block.{layer}.layer"
        names = {
            "qkv": f"{block}.0.SelfAttention.qkv",
            "self_o": f"{block}.0.SelfAttention.o",
            "wi": f"{block}.1.DenseReluDense.wi",
            "wo": f"{block}.1.DenseReluDense.wo",
        }
        return self._weights.layer(names, self._arch.bias_weight("encoder", layer))
