"""The weights of a T5 under the names of its graphs: groups of checkpoint tensors, and their layout for an engine.

A group is a matrix product of the model: "qkv" stands for three checkpoint matrices that multiply the same normed stream.
The host form of a graph multiplies by each of them in place; the device form takes the whole group as one matrix,
stacked, scaled by the weight of the norm before it (exact algebra: W (n * g) = (W * g) n) and laid out [in, out], the layout
that TensorRT multiplies by without transposing it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from t5_trt.graph.architecture import Architecture

CROSS_KV = "decoder.cross_kv"
LM_HEAD = "lm_head"
EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"  # if it is not the embedding
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Parameter:
    """One weight input of a device graph.

    Attributes:
        parts: state-dict keys of the stacked tensors, in order.
        widths: output columns of each part.
        inputs: columns of the checkpoint matrices; 0 for a vector.
        norm: state-dict key of the norm whose weight is folded in, or None.
        is_matrix: multiplied by (and so transposed) rather than looked up or added.
        scale: a factor of the architecture on the product, folded in.
    """

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: int
    norm: str | None = None
    is_matrix: bool = True
    scale: float = 1.0

    def place(self, key: str) -> slice:
        """Columns of a part."""
        part = self.parts.index(key)
        start = sum(self.widths[:part])
        return slice(start, start + self.widths[part])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the engine reads."""
        rows = sum(self.widths)
        return (self.inputs, rows) if self.is_matrix else (rows, self.inputs) if self.inputs else (rows,)


def parameters(arch: Architecture) -> dict[str, Parameter]:
    """Every weight of a model under the name that graphs use, with the checkpoint tensors behind it."""
    size, inner = arch.d_model, arch.num_heads * arch.d_kv
    made = {EMBEDDING: Parameter((EMBEDDING,), (arch.vocab_size,), size, is_matrix=False)}

    def attention(layer: str, kind: str, parts: str) -> None:
        keys = tuple(f"{layer}.{kind}.{part}.weight" for part in parts)
        made[f"{layer}.{kind}.{parts}"] = Parameter(keys, (inner,) * len(parts), size, f"{layer}.layer_norm.weight")
        made[f"{layer}.{kind}.o"] = Parameter((f"{layer}.{kind}.o.weight",), (size,), inner)

    def feed_forward(layer: str) -> None:
        dense = f"{layer}.DenseReluDense"
        names = ("wi_0", "wi_1") if arch.gated else ("wi",)
        keys = tuple(f"{dense}.{name}.weight" for name in names)
        made[f"{dense}.wi"] = Parameter(keys, (arch.d_ff,) * len(keys), size, f"{layer}.layer_norm.weight")
        made[f"{dense}.wo"] = Parameter((f"{dense}.wo.weight",), (size,), arch.d_ff)

    for stack, layers in (("encoder", arch.encoder_layers), ("decoder", arch.decoder_layers)):
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            attention(f"{block}.0", "SelfAttention", "qkv")
            if stack == "decoder":
                attention(f"{block}.1", "EncDecAttention", "q")
            feed_forward(f"{block}.{2 if stack == 'decoder' else 1}")
            table = arch.bias_weight(stack, layer)
            made[table] = Parameter((table,), (arch.num_buckets,), arch.num_heads, is_matrix=False)
    norm = "encoder.final_layer_norm.weight"
    made[norm] = Parameter((norm,), (size,), 0, is_matrix=False)
    keys = tuple(
        f"decoder.block.{layer}.layer.1.EncDecAttention.{kind}.weight"
        for layer in range(arch.decoder_layers)
        for kind in "kv"
    )
    if not keys:  # an encoder-only model
        return made
    made[CROSS_KV] = Parameter(keys, (inner,) * len(keys), size)
    norm = "decoder.final_layer_norm.weight"
    made[LM_HEAD] = Parameter((arch.head_weight,), (arch.vocab_size,), size, norm, scale=arch.output_scale)
    return made


def step_groups(arch: Architecture) -> set[str]:
    """The groups of matrices that a decoder step multiplies by; empty without a decoder."""
    made = parameters(arch)
    return {name for name in made if name.startswith("decoder.block.") and made[name].is_matrix} | (
        {LM_HEAD} & made.keys()
    )


def encoder_groups(arch: Architecture) -> set[str]:
    """The groups of matrices that the encoder multiplies by, those for the decoder's cross-attention K and V among them."""
    made = parameters(arch)
    return {name for name in made if name.startswith("encoder.block.") and made[name].is_matrix} | (
        {CROSS_KV} & made.keys()
    )


def step_matrices(arch: Architecture) -> set[str]:
    """State-dict keys of the matrices of `step_groups`."""
    made = parameters(arch)
    return {key for name in step_groups(arch) for key in made[name].parts}


def materialize(
    parameter: Parameter,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    factor: Callable[[str], float] = lambda key: 1.0,
) -> torch.Tensor:
    """Create the tensor that a device graph reads.

    Args:
        parameter: of `parameters`.
        weights: state-dict key -> tensor, anywhere and of any floating type.
        dtype: of the result; stacking and scaling are done in float32.
        device: of the result, where the work is done.
        factor: state-dict key -> factor on its tensor.

    Returns:
        Contiguous, of the shape `Parameter.shape`, in memory of its own.
    """
    width = 0 if not parameter.inputs else parameter.inputs
    if not parameter.is_matrix:
        key = parameter.parts[0]
        source, by = weights[key].detach(), factor(key)
        tensor = source.to(device)
        made = (tensor if by == 1.0 else tensor.float() * by).to(dtype).contiguous()
        return made.clone() if made.data_ptr() == source.data_ptr() else made  # it may be written into
    stacked = torch.empty((width, sum(parameter.widths)), dtype=dtype, device=device)
    norm = norm_before(parameter, weights, device)
    for key in parameter.parts:  # one part at a time: little extra memory
        part = in_float32_on(weights[key], device)
        stacked[:, parameter.place(key)] = folded_part(parameter, part, norm, factor(key)).t()
    return stacked


def norm_before(parameter: Parameter, weights: Weights, device: torch.device) -> torch.Tensor | None:
    """The weight of the norm before a group, float32 [inputs]; None if it has none."""
    return None if parameter.norm is None else in_float32_on(weights[parameter.norm], device)


def in_float32_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A weight in float32 on a device, where it is converted: the host holds no copy, and what is moved is not larger than the checkpoint."""
    return tensor.detach().to(device).float()


class DeviceNorms:
    """Weights of norms on a device, each brought there once.

    Args:
        weights: state-dict key -> tensor, anywhere.
        device: of the results.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._made: dict[str, torch.Tensor | None] = {}

    def before(self, parameter: Parameter) -> torch.Tensor | None:
        """See `norm_before`."""
        if parameter.norm is not None and parameter.norm not in self._made:
            self._made[parameter.norm] = norm_before(parameter, self._weights, self._device)
        return None if parameter.norm is None else self._made[parameter.norm]

    def forget(self, key: str) -> None:
        """A weight has changed, which may be a norm's."""
        self._made.pop(key, None)


def folded_part(parameter: Parameter, part: torch.Tensor, norm: torch.Tensor | None, factor: float) -> torch.Tensor:
    """A checkpoint matrix of a group with all factors folded in, [outputs, inputs].

    Args:
        parameter: the group.
        part: float32 [outputs, inputs].
        norm: of `norm_before`.
        factor: see `materialize`.
    """
    if (by := factor * parameter.scale) != 1.0:
        part = part * by
    return part if norm is None else part * norm
