"""The encoder of the backend "cuda" by our own kernels and cuBLAS; torch operations serve what the kernels do not support."""

from __future__ import annotations

import logging

import torch

from t5_trt.engine.store import EngineStore
from t5_trt.errors import BackendError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import CROSS_KV, EMBEDDING
from t5_trt.kernels.compile import LEAST_CAPABILITY, architecture_name, stored_cubin
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import MOST_CTAS, SOURCE, EncoderKernels, KeyLists, refusal, relative_bias
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.torch_layers import TorchEncoder

logger = logging.getLogger("t5_trt")


class KernelEncoder(TorchEncoder):
    """A `TorchEncoder` with kernels between the matrix products.

    The products of a batch include padding, because results for padding are returned too, as by Hugging Face, and a captured size is
    fixed. Attention skips tiles of keys that are all padding. Packed sources have no padding between them.

    Args:
        kernels: compiled for the model.
        arch, weights, scaling, precision: see `TorchEncoder`.
    """

    name = "encoder (kernels)"
    packs = True

    def __init__(
        self, kernels: EncoderKernels, arch: Architecture, weights: DeviceWeights, scaling: Fp16Scaling, precision: str
    ) -> None:
        super().__init__(arch, weights, scaling, precision)
        self._kernels = kernels

    def run(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor:
        """See `TorchEncoder.run`."""
        if len(mask) > MOST_CTAS:
            return super().run(input_ids, inputs_embeds, mask)
        stream = self._embed(input_ids, inputs_embeds)
        if inputs_embeds is not None:
            # it may be the caller's tensor, and the kernels add to it
            stream = stream.clone(memory_format=torch.contiguous_format)
        return self._layers(stream, self._kernels.list_keys(mask.to(torch.int64).contiguous()))

    def run_packed(self, ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """See `TorchEncoder.run_packed`."""
        return self._layers(self._embed(ids, None), self._kernels.list_packed(mask, starts))

    def _layers(self, stream: torch.Tensor, keys: KeyLists) -> torch.Tensor:
        """Hidden states of a stream, float32 [B, S, E] or [T, E], which is overwritten."""
        arch, weights, kernels = self._arch, self._weights, self._kernels
        shape, stream = stream.shape[:-1], stream.view(-1, arch.d_model)
        dtype, final = weights[EMBEDDING].dtype, weights["encoder.final_layer_norm.weight"]
        made = kernels.add_and_norm(stream, None, 1.0, arch.epsilon, None, dtype)
        biases: dict[
            str, torch.Tensor
        ] = {}  # by name of the table, float32 [H, distances]; made anew, as tables may change
        for layer in range(arch.encoder_layers):
            block, table = f"encoder.block.{layer}.layer", arch.bias_weight("encoder", layer)
            if table not in biases:
                biases[table] = relative_bias(weights[table], self._buckets)
            qkv = (made @ weights[f"{block}.0.SelfAttention.qkv"]).view(*shape, -1)
            mixed = kernels.attend(qkv, keys, biases[table])
            out = f"{block}.0.SelfAttention.o"
            branch = mixed.view(len(stream), -1) @ weights[out]
            made = kernels.add_and_norm(stream, branch, self._scale(out), arch.epsilon, None, dtype)
            inner = kernels.activate(made @ weights[f"{block}.1.DenseReluDense.wi"])
            out = f"{block}.1.DenseReluDense.wo"
            weight = final if layer == arch.encoder_layers - 1 else None
            made = kernels.add_and_norm(stream, inner @ weights[out], self._scale(out), arch.epsilon, weight, dtype)
        return made.view(*shape, -1)

    def cross(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `TorchEncoder.cross`."""
        arch = self._arch
        if not arch.decoder_layers or len(hidden) > MOST_CTAS:
            return super().cross(hidden)
        made = self._kernels.split_heads(hidden.contiguous() @ self._weights[CROSS_KV], 2 * arch.decoder_layers)
        return made.view(arch.decoder_layers, 2, *made.shape[1:])


def open_encoder(
    arch: Architecture,
    weights: DeviceWeights,
    scaling: Fp16Scaling,
    precision: str,
    dtype: torch.dtype,
    store: EngineStore,
) -> TorchEncoder:
    """The encoder by kernels, or by torch if they do not support the model or cannot be compiled (with a warning).

    Args:
        arch: see `TorchEncoder`, as of all but the last two.
        weights: on any device.
        scaling: of the weights.
        precision: of the session.
        dtype: of the weights.
        store: of compiled kernels.
    """
    device = weights.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < LEAST_CAPABILITY or refusal(arch, dtype):
        return TorchEncoder(arch, weights, scaling, precision)
    wanted, (major, minor) = model_constants(arch, dtype), capability
    try:
        cubin = stored_cubin(SOURCE, wanted, architecture_name(major, minor), store)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context current
            kernels = EncoderKernels(cubin, wanted, device)
    except (BackendError, OSError) as error:
        logger.warning("the encoder runs by torch operations, not by our kernels: %s", error)
        return TorchEncoder(arch, weights, scaling, precision)
    return KernelEncoder(kernels, arch, weights, scaling, precision)
