"""Keeping half precision in range without changing what a model computes.

T5's norms are RMS norms: they do not see a factor on the whole residual stream. So the stream may be kept at s times its value
by writing s into the embedding and into every matrix that adds to it (``o``, ``wo``), and s^2 into epsilon. The inside of a
feed-forward layer may be kept at t times its value by writing t into ``wi`` (relu) or ``wi_1`` (gated) and 1/t into ``wo``. With
powers of two nothing is rounded by that. Checkpoints whose activations go beyond 65504, the largest float16, then stay
within it (T5 v1.1, Flan-T5 and mT5 are known for them; huggingface/transformers issue 9295).

The factors come from bounds that hold for every input, derived from the weights by Cauchy and Schwarz, or from the largest
activations that some text has shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from t5_trt.architecture import Architecture
from t5_trt.graph.parameters import EMBEDDING, LM_HEAD, Weights

LIMIT = 2.0**15  # half of what float16 holds
#: how small factors may make weights and the embedding (root mean square): below 2^-14 float16 has an absolute error of 3e-8,
#: here 0.2%, which is what half precision costs anyway
_LEAST = 2.0**-16
#: how much larger than what was seen activations of other texts may be
HEADROOM = 8.0


@dataclass(frozen=True)
class Ranges:
    """Largest absolute values of activations.

    Attributes:
        stream: of the residual streams, embedding included.
        inner: by feed-forward layer (its state-dict prefix, such as "encoder.block.0.layer.1"), of what ``wo`` multiplies.
    """

    stream: float
    inner: Mapping[str, float]


@dataclass(frozen=True)
class Folding:
    """Powers of two to write into the weights.

    Attributes:
        stream: s.
        inner: t by feed-forward layer; 1 where it is left out.
        certain: no input can leave the range; False where that would have cost too much precision.
    """

    stream: float = 1.0
    inner: Mapping[str, float] = field(default_factory=dict)
    certain: bool = True

    def architecture(self, arch: Architecture) -> Architecture:
        """The architecture whose graphs compute with folded weights: epsilon goes with the square of the stream."""
        return replace(arch, epsilon=arch.epsilon * self.stream**2)

    def factor_in(self, group: str) -> Callable[[str], float]:
        """`factor` for the tensors of a group of `t5_trt.graph.parameters`; a tied head shares the embedding's key."""
        return (lambda key: 1.0) if group == LM_HEAD else self.factor

    def factor(self, key: str) -> float:
        """What the tensor of a state-dict key is multiplied by."""
        if key == EMBEDDING:
            return self.stream
        layer, _, name = key.removesuffix(".weight").rpartition(".")
        if name == "o":
            return self.stream
        owner = layer.removesuffix(".DenseReluDense")
        if name == "wo":
            return self.stream / self.inner.get(owner, 1.0)
        return self.inner.get(owner, 1.0) if name in ("wi", "wi_1") else 1.0


def fold(arch: Architecture, weights: Weights, seen: Ranges | None = None) -> Folding:
    """Choose the factors for half precision.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.
        seen: largest activations of some texts; None goes by the weights alone.
    """
    bounds = bound(arch, weights) if seen is None else seen
    inner, certain = {}, True
    for layer, largest in bounds.inner.items():
        matrix = weights[f"{layer}.DenseReluDense.{'wi_1' if arch.gated else 'wi'}.weight"]
        factor, holds = _power(largest, _LEAST / _rms(matrix), seen is not None)
        certain &= holds
        if factor < 1.0:
            inner[layer] = factor
    branches = [weights[key] for key in weights if key.endswith((".o.weight", ".wo.weight"))]
    stream, holds = _power(bounds.stream, _LEAST / min(map(_rms, [*branches, weights[EMBEDDING]])), seen is not None)
    return Folding(stream, inner, certain and holds)


def bound(arch: Architecture, weights: Weights) -> Ranges:
    """Values that no activation exceeds, whatever the input.

    A normed stream has length sqrt(E) before its weight g, so its product with a row w is at most |w * g| sqrt(E), and that with a
    matrix W at most as long as the largest singular value of W diag(g) times sqrt(E). A mix of values is no longer than the
    longest, in every head; no activation function makes a value larger.
    """
    root, inner, streams = math.sqrt(arch.d_model), {}, []
    for stack, layers in (("encoder", arch.encoder_layers), ("decoder", arch.decoder_layers)):
        stream = float(weights[EMBEDDING].detach().float().abs().max())
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            stream += _attention(arch, weights, f"{block}.0.SelfAttention", f"{block}.0.layer_norm", root)
            if stack == "decoder":  # its K and V come from the encoder's output, normed by the encoder's last norm
                norm = "encoder.final_layer_norm"
                stream += _attention(arch, weights, f"{block}.1.EncDecAttention", norm, root)
            name = f"{block}.{2 if stack == 'decoder' else 1}"
            inner[name], output = _feed_forward(arch, weights, name, root)
            stream += output
        streams.append(stream)
    if not arch.gated and arch.activation != "relu":
        inner = {}  # the non-linearity lies between wi and wo and does not scale
    return Ranges(max(streams), inner)


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
    """Of [.., rows, columns], by power iteration; 5% more than was found, because it comes from below."""
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
    """(the power of two that brings a value under `LIMIT`, whether it does so for every input).

    A value that was seen gets `HEADROOM`, as far as the factor does not fall below `least`. A bound is followed down to
    `least`, but not further: it is often far from what happens.
    """
    if not math.isfinite(largest) or largest <= 0.0:
        return 1.0, math.isfinite(largest)
    wanted, needed = LIMIT / (largest * HEADROOM), LIMIT / largest
    factor = max(wanted, min(least, needed)) if seen else max(needed, least)
    return 2.0 ** min(math.floor(math.log2(factor)), 0), seen or needed >= least
