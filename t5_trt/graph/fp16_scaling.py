"""Keeping half precision in range without changing what a model computes.

If sums over layers could leave the range, the residual streams are float32. Within a layer, three kinds of factors are folded into
the weights:

- t scales the inside of a feed-forward layer: ``wi`` (relu) or ``wi_1`` (gated) is multiplied by t, and ``wo`` by 1/t.
- u scales what an ``o`` or ``wo`` adds to the stream, or the logits: the matrix is multiplied by u, and the result is divided by u in
  float32, where the graph adds it, or after the engine for logits.
- e scales an embedding that is out of range, and so the whole stream; the norms cancel it.

Power-of-two scaling is exact. Activations of checkpoints that exceed 65504, the largest float16, then stay in range (T5 v1.1, Flan-T5
and mT5 are known for this; huggingface/transformers issue 9295).

The factors come from bounds for every input, derived from the weights by the Cauchy-Schwarz inequality, or from the largest activations
measured on texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.parameters import EMBEDDING, LM_HEAD, Weights

LIMIT = 2.0**15  # half of float16's largest value
#: smallest root mean square of a scaled matrix: below 2^-14 float16 has an absolute error of 3e-8, here 0.05%
_LEAST = 2.0**-14
#: allowance for other texts: their activations may be this many times larger than the measured ones
HEADROOM = 8.0


@dataclass(frozen=True)
class Ranges:
    """Largest absolute values of activations.

    Attributes:
        branches: by module name, of the output of an ``o`` or ``wo`` (added to the residual stream), and of the logits as "lm_head".
        inner: by feed-forward layer (its state-dict prefix, such as "encoder.block.0.layer.1"), of the input of ``wo``.
    """

    branches: Mapping[str, float]
    inner: Mapping[str, float]


@dataclass(frozen=True)
class Fp16Scaling:
    """Factors that keep a checkpoint in float16's range: powers of two to fold into the weights, 1 if not named.

    Attributes:
        wide_stream: the residual streams must be float32; they also are if one of `branches` is added to them.
        embedding: e; if it is not 1 the streams are float32.
        branches: u by module name of an ``o`` or ``wo``, or "lm_head".
        inner: t by feed-forward layer.
        certain: no input can leave the range; False if that would have cost too much precision.
    """

    wide_stream: bool = False
    embedding: float = 1.0
    branches: Mapping[str, float] = field(default_factory=dict)
    inner: Mapping[str, float] = field(default_factory=dict)
    certain: bool = True

    def architecture(self, arch: Architecture) -> Architecture:
        """The architecture whose graphs compute with folded weights."""
        return replace(
            arch,
            wide_stream=self.wide_stream,
            stream_factor=self.embedding,
            branch_factors=dict(self.branches),
        )

    def factor(self, group: str, key: str) -> float:
        """The factor on the tensor of a state-dict key in one of `t5_trt.graph.parameters.parameters`."""
        if group in (EMBEDDING, LM_HEAD):  # many checkpoints share this tensor with the embedding
            return self.embedding if group == EMBEDDING else self.branches.get(LM_HEAD, 1.0)
        module = key.removesuffix(".weight")
        layer, _, name = module.rpartition(".")
        owner = layer.removesuffix(".DenseReluDense")
        if name in ("o", "wo"):
            return self.branches.get(module, 1.0) / (self.inner.get(owner, 1.0) if name == "wo" else 1.0)
        return self.inner.get(owner, 1.0) if name in ("wi", "wi_1") else 1.0


def find_scaling(arch: Architecture, weights: Weights, seen: Ranges | None = None) -> Fp16Scaling:
    """Choose the factors for half precision.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.
        seen: largest activations of texts; None uses bounds from the weights alone.
    """
    bounds = bound(arch, weights) if seen is None else seen
    inner, branches, certain = {}, {}, True
    for layer, largest in bounds.inner.items() if _scales_inside(arch) else ():
        matrix = weights[f"{layer}.DenseReluDense.{'wi_1' if arch.gated else 'wi'}.weight"]
        size = _rms(_normed(matrix, weights[f"{layer}.layer_norm.weight"]))
        factor, holds = _power(largest, _LEAST / size, seen is not None)
        certain &= holds
        if factor < 1.0:
            inner[layer] = factor
    for module, largest in bounds.branches.items():
        size = _size(arch, weights, module) / inner.get(module.removesuffix(".DenseReluDense.wo"), 1.0)
        factor, holds = _power(largest, _LEAST / size, seen is not None)
        certain &= holds
        if factor < 1.0:
            branches[module] = factor
    room = LIMIT if seen is None else LIMIT / HEADROOM
    embedding = float(weights[EMBEDDING].detach().float().abs().max())
    wide = bool(branches.keys() - {LM_HEAD}) or embedding + _largest_sum(bounds) > room
    return Fp16Scaling(wide, _power(embedding, 0.0, seen=False)[0], branches, inner, certain)


def _size(arch: Architecture, weights: Weights, module: str) -> float:
    """Root mean square of a matrix as the engine reads it."""
    if module == LM_HEAD:
        return _rms(_head(arch, weights)) * arch.output_scale
    return _rms(weights[f"{module}.weight"])


def _head(arch: Architecture, weights: Weights) -> torch.Tensor:
    return _normed(weights[arch.head_weight], weights["decoder.final_layer_norm.weight"])


def _largest_sum(bounds: Ranges) -> float:
    """A bound on the sum of everything that the layers of a stack add to its residual stream."""
    stacks = ("encoder.", "decoder.")
    return max(sum(v for name, v in bounds.branches.items() if name.startswith(stack)) for stack in stacks)


def bound(arch: Architecture, weights: Weights) -> Ranges:
    """Bounds on activations for every input.

    A normed stream has length sqrt(E) before its weight g, so its product with a row w is at most |w * g| sqrt(E), and that with a
    matrix W at most as long as the largest singular value of W diag(g) times sqrt(E). A weighted mean of values is no longer than the
    longest one, in every head; no activation function increases a value.
    """
    root, inner, branches = math.sqrt(arch.d_model), {}, {}
    for stack, layers in (("encoder", arch.encoder_layers), ("decoder", arch.decoder_layers)):
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            attention = f"{block}.0.SelfAttention"
            branches[f"{attention}.o"] = _attention(arch, weights, attention, f"{block}.0.layer_norm", root)
            if stack == "decoder":  # K and V come from the encoder's output after its last norm
                attention, norm = f"{block}.1.EncDecAttention", "encoder.final_layer_norm"
                branches[f"{attention}.o"] = _attention(arch, weights, attention, norm, root)
            name = f"{block}.{2 if stack == 'decoder' else 1}"
            inner[name], branches[f"{name}.DenseReluDense.wo"] = _feed_forward(arch, weights, name, root)
    if arch.decoder_layers:
        branches[LM_HEAD] = float(_head(arch, weights).norm(dim=1).max() * root * arch.output_scale)
    return Ranges(branches, inner if _scales_inside(arch) else {})


def _scales_inside(arch: Architecture) -> bool:
    """Whether a factor on ``wi`` (or ``wi_1``) carries over to the input of ``wo``: there is no non-linearity but relu in between."""
    return arch.gated or arch.activation == "relu"


def _attention(arch: Architecture, weights: Weights, attention: str, norm: str, root: float) -> float:
    """Largest value that an attention layer adds to the stream."""
    heads = _normed(weights[f"{attention}.v.weight"], weights[f"{norm}.weight"]).view(arch.num_heads, arch.d_kv, -1)
    output = _normed(weights[f"{attention}.o.weight"]).norm(dim=1).max()
    return float(output * _largest_singular_value(heads).norm() * root)


def _feed_forward(arch: Architecture, weights: Weights, layer: str, root: float) -> tuple[float, float]:
    """(largest value inside, largest value added to the stream)."""
    dense, norm = f"{layer}.DenseReluDense", weights[f"{layer}.layer_norm.weight"]
    matrices = [
        _normed(weights[f"{dense}.{name}.weight"], norm) for name in (("wi_0", "wi_1") if arch.gated else ("wi",))
    ]
    rows = [matrix.norm(dim=1) * root for matrix in matrices]
    length = _largest_singular_value(matrices[-1]) * root
    if arch.gated:
        length = length * rows[0].max()
    output = _normed(weights[f"{dense}.wo.weight"]).norm(dim=1).max()
    return float(torch.stack(rows).prod(0).max()), float(output * length)


def _normed(matrix: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
    """A matrix with the weight of the norm before it, float32."""
    rows = matrix.detach().float()
    return rows if norm is None else rows * norm.detach().float()


def _largest_singular_value(matrix: torch.Tensor) -> torch.Tensor:
    """The largest singular value of [.., rows, columns] by power iteration, plus 5%, because the iteration converges from below."""
    start = torch.randn(matrix.shape[-1], generator=torch.Generator().manual_seed(0))
    vector = start.to(matrix.device).expand(*matrix.shape[:-2], -1)[..., None]
    found = matrix.new_zeros(matrix.shape[:-2])
    for _ in range(12):
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp_min(1e-30)
        product = matrix @ vector
        found = product.norm(dim=-2)[..., 0]
        vector = matrix.mT @ product
    return 1.05 * found


def _rms(tensor: torch.Tensor) -> float:
    return max(float(tensor.detach().float().square().mean().sqrt()), 1e-12)


def _power(largest: float, least: float, seen: bool) -> tuple[float, bool]:
    """(the power of two that brings a value below `LIMIT`, whether it does so for every input).

    A measured value is multiplied by `HEADROOM`, unless the factor would fall below `least`. A bound gives no factor below
    `least`: it is often far above actual values.
    """
    if not math.isfinite(largest) or largest <= 0.0:
        return 1.0, math.isfinite(largest)
    wanted, needed = LIMIT / (largest * HEADROOM), LIMIT / largest
    factor = max(wanted, min(least, needed)) if seen else max(needed, least)
    return 2.0 ** min(math.floor(math.log2(factor)), 0), seen or needed >= least
