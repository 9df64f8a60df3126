"""T5's encoder, and its decoder for tokens of which some are hidden, as torch operations on a GPU (or a CPU, for tests).

Used without TensorRT. Matrices have the session's type, the residual stream and the norms are float32. The decoder without hidden tokens is
in `t5_trt.kernels`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.parameters import CROSS_KV, EMBEDDING
from t5_trt.graph.precision import empty_slot_value, mask_value, real_type
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels.reference import activate_inner
from t5_trt.kernels.step_memory import StepWeights
from t5_trt.kernels.step_weights import unpacked_layer
from t5_trt.kernels.weights import unpack_matrix
from t5_trt.runtime.device_weights import DeviceWeights

#: value in a mask where a padded input has no token; users' masks never have it
NO_KEY = -(1 << 62)


class TorchEncoder:
    """The encoder and the decoder's cross-attention keys and values.

    Args:
        arch: of the model.
        weights: in the session's type, with the norms' weights and the fp16 factors in the matrices, [inputs, outputs].
        scaling: those factors.
        precision: of the session.

    Attributes:
        packs: whether it takes packed sources.
    """

    name = "encoder (torch)"
    packs = False

    def __init__(self, arch: Architecture, weights: DeviceWeights, scaling: Fp16Scaling, precision: str) -> None:
        self._arch, self._weights, self._scaling = arch, weights, scaling
        self._hidden, self._empty = mask_value(real_type(precision)), empty_slot_value(real_type(precision))
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True)
        self._buckets = buckets.to(weights.device)  # copied here, as a copy from the host cannot be captured

    def run(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, S, E] of int64 [B, S] or float32 [B, S, E]; mask int64 [B, S], 0 hides a token.

        `NO_KEY` marks places without a token: a row whose tokens are all hidden attends equally to them, but never to such places.
        """
        arch, weights = self._arch, self._weights
        stream = self._embed(input_ids, inputs_embeds)
        dtype = weights[EMBEDDING].dtype
        steps = torch.arange(mask.shape[1], device=mask.device)
        limit = len(self._buckets) // 2
        offsets = (steps[None] - steps[:, None]).clamp(-limit, limit) + limit
        buckets = self._buckets[offsets]
        hide = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, self._hidden)
        hide = hide.masked_fill_(mask == NO_KEY, self._empty)[:, None, None]
        biases: dict[str, torch.Tensor] = {}
        for layer in range(arch.encoder_layers):
            block, table = f"encoder.block.{layer}.layer", arch.bias_weight("encoder", layer)
            if table not in biases:
                biases[table] = (weights[table].float()[buckets].permute(2, 0, 1)[None] + hide).to(dtype)
            qkv = normed(stream, arch.epsilon, dtype) @ weights[f"{block}.0.SelfAttention.qkv"]
            q, k, v = qkv.view(*qkv.shape[:2], 3, arch.num_heads, arch.d_kv).permute(2, 0, 3, 1, 4)
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=biases[table], scale=1.0)
            stream = self._add(stream, mixed.transpose(1, 2).flatten(2), f"{block}.0.SelfAttention.o")
            inner = normed(stream, arch.epsilon, dtype) @ weights[f"{block}.1.DenseReluDense.wi"]
            stream = self._add(stream, activated(arch, inner), f"{block}.1.DenseReluDense.wo")
        return (
            normed(stream, arch.epsilon, torch.float32)
            .mul(weights["encoder.final_layer_norm.weight"].float())
            .to(dtype)
        )

    def run_packed(self, ids: torch.Tensor, mask: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] of sources that lie one behind another; those of tokens that belong to none are undefined.

        Args:
            ids: int64 [T].
            mask: int64 [T], as of `run`.
            starts: int64 [R + 1], the first token of each source, and behind the last token of all; a source may have none.
        """
        raise NotImplementedError(f"the {self.name} takes batches of padded sources only; see `packs`")

    def cross(self, hidden: torch.Tensor) -> torch.Tensor:
        """Cross-attention keys and values [L, 2, B, H, S, D] of hidden states [B, S, E]."""
        arch = self._arch
        if not arch.decoder_layers:
            return hidden.new_zeros((0, 2, len(hidden), arch.num_heads, hidden.shape[1], arch.d_kv))
        made = hidden @ self._weights[CROSS_KV]
        split = made.view(*made.shape[:2], arch.decoder_layers, 2, arch.num_heads, arch.d_kv)
        return split.permute(2, 3, 0, 4, 1, 5).contiguous()

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """The residual stream float32 [B, S, E] before the first layer; may return the given embeddings themselves."""
        if inputs_embeds is not None:
            return inputs_embeds.float()
        assert input_ids is not None
        stream = self._weights[EMBEDDING][input_ids].float()
        return stream if self._scaling.embedding == 1.0 else stream / self._scaling.embedding

    def _scale(self, name: str) -> float:
        """The factor of a product that is added to the stream."""
        return 1.0 / self._scaling.branches.get(name, 1.0)

    def _add(self, stream: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
        # one kernel adds the two types; the result is float32
        return torch.add(stream, value @ self._weights[name], alpha=self._scale(name))


class TorchDecoder:
    """The decoder for Q new tokens of every row, over the weights of the one-token step, unpacked layer by layer.

    Args:
        arch: of the model.
        weights: of the step.
        scaling: the fp16 factors in them.
        precision: of the session.
    """

    def __init__(self, arch: Architecture, weights: StepWeights, scaling: Fp16Scaling, precision: str) -> None:
        self._arch, self._weights, self._embedding = arch, weights, scaling.embedding
        self._hidden = mask_value(real_type(precision))

    def run(
        self,
        tokens: torch.Tensor,
        cached: torch.Tensor,
        cross: torch.Tensor,
        cross_bias: torch.Tensor,
        beams: int,
        key_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode the new tokens.

        Args:
            tokens: int64 [R, Q].
            cached: [L, 2, R, H, length, D].
            cross: [L, 2, B, H, S, D].
            cross_bias: float32 [B, 1, 1, S].
            beams: rows of each source.
            key_mask: int64 [R, length + Q], 0 hides a token; None hides none.

        Returns:
            Logits float32 [R, Q, V], and the new keys and values [L, 2, R, H, Q, D].
        """
        arch, weights = self._arch, self._weights
        length, queries = cached.shape[4], tokens.shape[1]
        dtype = weights.embedding.dtype
        stream = weights.embedding[tokens].float() / self._embedding
        distance = torch.arange(length, length + queries, device=tokens.device)[:, None] - torch.arange(
            length + queries, device=tokens.device
        )
        hide = distance.lt(0)[None, None]
        if key_mask is not None:
            hide = hide | (key_mask == 0)[:, None, None]
        distance = distance.clamp(0, weights.layers[0].bias.shape[1] - 1)
        sources = cross_bias.repeat_interleave(beams, 0).to(dtype)
        made = []
        for layer, own in enumerate(weights.layers):
            matrices = unpacked_layer(arch, own)
            qkv = normed(stream, arch.epsilon, dtype) @ matrices["qkv"].t()
            q, k, v = qkv.view(*qkv.shape[:2], 3, arch.num_heads, arch.d_kv).permute(2, 0, 3, 1, 4)
            made.append(torch.stack((k, v)))
            keys, values = (torch.cat((cached[layer, i], new), 2) for i, new in enumerate((k, v)))
            bias = own.bias[:, distance][None].masked_fill(hide, self._hidden).to(dtype)
            mixed = scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=1.0)
            stream = _added(stream, mixed, matrices["self_out"], own.self_scale)
            q = normed(stream, arch.epsilon, dtype) @ matrices["query"].t()
            q = q.view(*q.shape[:2], arch.num_heads, arch.d_kv).transpose(1, 2)
            keys, values = (part.repeat_interleave(beams, 0) for part in cross[layer])
            mixed = scaled_dot_product_attention(q, keys, values, attn_mask=sources, scale=1.0)
            stream = _added(stream, mixed, matrices["cross_out"], own.cross_scale)
            inner = activated(arch, normed(stream, arch.epsilon, dtype) @ matrices["wi"].t())
            stream = torch.add(stream, inner @ matrices["wo"].t(), alpha=own.wo_scale)
        head = unpack_matrix(weights.head, arch.vocab_size, arch.d_model)
        logits = (normed(stream, arch.epsilon, dtype) @ head.t()).float() * weights.head_scale
        return logits, torch.stack(made)


def _added(stream: torch.Tensor, mixed: torch.Tensor, matrix: torch.Tensor, scale: float) -> torch.Tensor:
    """The stream [R, Q, E] plus attention's output matrix times the heads' results [R, H, Q, D]."""
    return torch.add(stream, mixed.transpose(1, 2).flatten(2) @ matrix.t(), alpha=scale)


def normed(stream: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm without its weight (Zhang and Sennrich 2019), in float32, rounded to a type."""
    return rms_norm(stream, stream.shape[-1:], eps=epsilon).to(dtype)


def activated(arch: Architecture, inner: torch.Tensor) -> torch.Tensor:
    """The activation of a feed-forward layer, with its gate if it has one."""
    return activate_inner(inner, arch.activation, gated=arch.gated)
