"""The decoder's weights of one model in the kernels' order, made once from the checkpoint's tensors."""

from __future__ import annotations

from functools import partial

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import (
    CROSS_KV,
    EMBEDDING,
    LM_HEAD,
    DeviceNorms,
    Weights,
    folded_part,
    in_float32_on,
    materialize,
    parameters,
)
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels.step_memory import LayerWeights, StepWeights
from t5_trt.kernels.weights import pack_gated, pack_head, pack_matrix, pack_stack, unpack_matrix


class StepWeightsMaker:
    """Creates `StepWeights`, and converts single matrices back to their ordinary layout.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor, anywhere.
        dtype: of the embedding, and of stored matrices unless they are in 8 bits: float16, bfloat16 or float32.
        device: that computes and holds the result.
        scaling: the fp16 factors to fold into the matrices.
        int8: round the matrices to 8 bits; `dtype` is float16.
    """

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        scaling: Fp16Scaling,
        *,
        int8: bool = False,
    ) -> None:
        self.arch, self._weights, self.dtype, self.device, self.scaling = arch, weights, dtype, device, scaling
        self.int8 = int8
        # matrices are rounded once: to float16 on the way to 8 bits would be twice
        self._made_in, self._packed = (torch.float32, torch.int8) if int8 else (dtype, dtype)
        self._parameters = parameters(arch)
        self._norms = DeviceNorms(weights, device)

    def make(self) -> StepWeights:
        """All of a step's weights."""
        layers = tuple(self._layer(layer) for layer in range(self.arch.decoder_layers))
        head = pack_head(self._matrix(LM_HEAD), self._packed)
        head_scale = 1.0 / self.scaling.branches.get(LM_HEAD, 1.0)
        return StepWeights(self._made(EMBEDDING, self.dtype), layers, head, head_scale)

    def update(self, made: StepWeights, key: str, tensor: torch.Tensor) -> None:
        """Write a new value of a checkpoint tensor into weights of `make`, in place, where captured steps read it.

        Args:
            made: the weights, changed in place.
            key: of the state dict; what it maps to has changed, too.
            tensor: on the device.
        """
        self._norms.forget(key)
        if key == EMBEDDING:
            made.embedding.copy_(tensor.float() * self.scaling.factor(EMBEDDING, EMBEDDING))
        elif key == self.arch.head_weight:
            made.head.copy_(pack_head(self._part(key, tensor), self._packed))
        elif key == "decoder.final_layer_norm.weight":
            made.head.copy_(pack_head(self._matrix(LM_HEAD), self._packed))
        if not key.startswith("decoder.block.") or key in self._parameters[CROSS_KV].parts:
            return
        layer = int(key.split(".")[2])
        place = self._place(made.layers[layer], key)
        if place is not None:
            place.copy_(pack_matrix(self._part(key, tensor), self._packed))
            return
        for index, own in enumerate(made.layers):  # a norm of one layer, or a bias table of one or of all of them
            if index == layer or "relative_attention_bias" in key:
                for name, value in vars(self._layer(index)).items():
                    if isinstance(value, torch.Tensor):
                        getattr(own, name).copy_(value)

    def _place(self, own: LayerWeights, key: str) -> torch.Tensor | None:
        """A view of the part of a layer's weights that holds a single packed matrix; None if the key is not one of those."""
        _, _, _, _, _, part, name, _ = key.split(".") if key.count(".") == 7 else ("",) * 8
        if part == "SelfAttention" and name in "qkv":
            return own.qkv.chunk(3)["qkv".index(name)]
        single = {
            "SelfAttention.o": own.self_out, "EncDecAttention.q": own.query, "EncDecAttention.o": own.cross_out,
            "DenseReluDense.wi": own.wi, "DenseReluDense.wo": own.wo,
        }  # fmt: skip
        if name in ("wi_0", "wi_1"):
            return own.wi.view(-1, 2, *own.wi.shape[1:])[:, int(name[-1])]
        return single.get(f"{part}.{name}")

    def _part(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """One matrix of a group as it is packed, [outputs, inputs]."""
        name, parameter = next(entry for entry in self._parameters.items() if key in entry[1].parts)
        norm = self._norms.before(parameter)
        return folded_part(parameter, tensor.float(), norm, self.scaling.factor(name, key)).to(self._made_in)

    def _layer(self, layer: int) -> LayerWeights:
        arch, block = self.arch, f"decoder.block.{layer}.layer"
        dense = f"{block}.2.DenseReluDense"
        wi = self._matrix(f"{dense}.wi")
        gate, up = wi[: arch.d_ff], wi[arch.d_ff :]
        undo = {name: 1.0 / self.scaling.branches.get(name, 1.0) for name in branch_names(layer)}
        table = in_float32_on(self._weights[arch.bias_weight("decoder", layer)], self.device)
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=False).to(self.device)
        return LayerWeights(
            qkv=pack_stack(list(self._matrix(f"{block}.0.SelfAttention.qkv").chunk(3)), self._packed),
            self_out=pack_matrix(self._matrix(f"{block}.0.SelfAttention.o"), self._packed),
            query=pack_matrix(self._matrix(f"{block}.1.EncDecAttention.q"), self._packed),
            cross_out=pack_matrix(self._matrix(f"{block}.1.EncDecAttention.o"), self._packed),
            wi=pack_gated(gate, up, self._packed) if arch.gated else pack_matrix(wi, self._packed),
            wo=pack_matrix(self._matrix(f"{dense}.wo"), self._packed),
            bias=table[buckets].t().contiguous(),
            self_scale=undo[f"{block}.0.SelfAttention.o"],
            cross_scale=undo[f"{block}.1.EncDecAttention.o"],
            wo_scale=undo[f"{dense}.wo"],
        )

    def _matrix(self, name: str) -> torch.Tensor:
        """[outputs, inputs]."""
        return self._made(name, self._made_in).t()

    def _made(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        factor = partial(self.scaling.factor, name)
        return materialize(self._parameters[name], self._weights, dtype, self.device, factor)


def branch_names(layer: int) -> tuple[str, str, str]:
    """Names of the modules whose output a decoder layer adds to the stream."""
    block = f"decoder.block.{layer}.layer"
    return f"{block}.0.SelfAttention.o", f"{block}.1.EncDecAttention.o", f"{block}.2.DenseReluDense.wo"


def unpacked_layer(arch: Architecture, own: LayerWeights) -> dict[str, torch.Tensor]:
    """The matrices of a layer as [outputs, inputs], under the names of `LayerWeights`; copies."""
    size, inner = arch.d_model, arch.num_heads * arch.d_kv
    thirds = [unpack_matrix(part, inner, size) for part in own.qkv.chunk(3)]
    if arch.gated:
        pairs = own.wi.view(-1, 2, *own.wi.shape[1:])
        wi = torch.cat([unpack_matrix(pairs[:, i].contiguous(), arch.d_ff, size) for i in (0, 1)])
    else:
        wi = unpack_matrix(own.wi, arch.d_ff, size)
    return {
        "qkv": torch.cat(thirds),
        "self_out": unpack_matrix(own.self_out, size, inner),
        "query": unpack_matrix(own.query, inner, size),
        "cross_out": unpack_matrix(own.cross_out, size, inner),
        "wi": wi,
        "wo": unpack_matrix(own.wo, size, arch.d_ff),
    }
