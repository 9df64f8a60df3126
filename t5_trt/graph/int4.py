"""The decoder's matrices in 4 bits for ONNX Runtime on a CPU, and host graphs that multiply by them.

They are what a step with few rows reads. All other matrices are as in 8 bits: the output matrix, whose rounding decides between tokens,
and those that multiply many rows, where products in 8 bits are faster. Weights are rounded symmetrically with a scale for every `BLOCK`
inputs of an output; the operator rounds activations to 8 bits likewise, so a row's result does not depend on other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir
import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.builders import CONTRIB
from t5_trt.graph.int8 import Int8HostGraphBuilder, quantize_group
from t5_trt.graph.parameters import CROSS_KV, LM_HEAD, Parameter, Weights, parameters

#: name of a group's matrix and of its scales among the tensors that `quantize_to_4_bits` makes
MATRIX4, SCALE4 = "{}.int4", "{}.int4_scale"
#: inputs that share a scale; with 32, a step takes a quarter longer
BLOCK = 128


def has_4_bits(quantized: Collection[str]) -> bool:
    """Whether some of these tensors, by name, are matrices in 4 bits."""
    return any(name.endswith(MATRIX4.format("")) for name in quantized)


def quantize_to_4_bits(arch: Architecture, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the matrices of a model: those of the decoder's layers to 4 bits, the others to 8.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.

    Yields:
        Names as in `MATRIX4` with uint8 [out, blocks, BLOCK / 2], two weights in a byte, and as in `SCALE4` with float32
        [out * blocks]; for other groups see `t5_trt.graph.int8.quantize`.
    """
    for name, parameter in parameters(arch).items():
        if not parameter.is_matrix:
            continue
        if name.startswith("decoder.") and name not in (CROSS_KV, LM_HEAD):
            yield from quantize_group_to_4_bits(name, parameter, weights)
        else:
            yield from quantize_group(name, parameter, weights)


def quantize_group_to_4_bits(name: str, parameter: Parameter, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the matrices of one group; see `quantize_to_4_bits`."""
    rounded, scales = zip(*(round_blocks(weights[key].detach().float()) for key in parameter.parts), strict=True)
    yield MATRIX4.format(name), torch.cat(rounded)
    yield SCALE4.format(name), torch.cat(scales)


def round_blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix [out, in] in 4 bits, and its scales; shapes and types as in `quantize_to_4_bits`.

    The number of the largest magnitude in a block becomes -8, so all 16 values are used.
    """
    blocks = -(-matrix.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(matrix, (0, blocks * BLOCK - matrix.shape[1])).view(-1, blocks, BLOCK)
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    scales = torch.where(largest == 0, 1.0, largest / -8)
    values = ((padded / scales).round_().clamp_(-8, 7) + 8).to(torch.uint8)
    return values[..., ::2] | (values[..., 1::2] << 4), scales.flatten()


class Int4HostGraphBuilder(Int8HostGraphBuilder):
    """Products with matrices in 4 bits by ONNX Runtime's MatMulNBits, and the others in 8 bits.

    Arguments as for `Int8HostGraphBuilder`; `quantized` is what `quantize_to_4_bits` made.
    """

    def products(self, stream: ir.Value, group: str, *, together: bool = False) -> Sequence[ir.Value]:
        """See `HostGraphBuilder.products`: one product for the whole group."""
        if MATRIX4.format(group) not in self._quantized:
            return super().products(stream, group, together=together)
        width = self.groups[group].shape[1]
        (packed,) = self.foreign(
            CONTRIB,
            "MatMulNBits",
            1,
            *(stream, self._stored(MATRIX4.format(group)), self._stored(SCALE4.format(group))),
            K=self.groups[group].inputs,
            N=width,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # activations in 8 bits
        )
        return self._parts(packed, group, width, together=together)
