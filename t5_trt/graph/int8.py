"""Matrices in 8 bits: rounding them, and the graphs that multiply by them.

On a CPU (ONNX Runtime) activations are rounded too; on a GPU (TensorRT 10 and newer) only the weights are, which halves what
a step reads; such engines hold the weights. Weights are rounded symmetrically with one scale per output column (per channel). The
operator rounds activations when it runs, with one scale per product (dynamic quantization). Norms, softmax, attention products,
biases and the embedding are not quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.builders import CONTRIB, DeviceGraphBuilder, HostGraphBuilder
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.ops import Dim
from t5_trt.graph.parameters import LM_HEAD, Parameter, Weights, materialize, parameters

#: name of a group's matrix and of its scales among the tensors that `quantize` makes
MATRIX, SCALE = "{}.int8", "{}.scale"

#: output columns are padded to a multiple of this: for a remainder of 8 and 32 rows or more, ONNX Runtime 1.23 returns wrong values
#: on processors with AMX
COLUMNS = 16
#: output columns that are rounded at once
_AT_ONCE = 4096
#: the first opset in which a scale, and so the dequantized matrix, may be half precision
WEIGHT_ONLY_OPSET = 19


def quantize(arch: Architecture, weights: Weights, *, head: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the matrices of a model, one group of `t5_trt.graph.parameters` after the other.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.
        head: the output matrix too.

    Yields:
        Names as in `MATRIX` with int8 [in, out], and as in `SCALE` with float32 [out]; out is a multiple of `COLUMNS`, with
        zero columns after the matrix.
    """
    for name, parameter in parameters(arch).items():
        if parameter.is_matrix and (name != LM_HEAD or head):
            yield from quantize_group(name, parameter, weights)


def quantize_group(name: str, parameter: Parameter, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the matrices of one group; see `quantize`."""
    columns_made = -(-parameter.shape[1] // COLUMNS) * COLUMNS
    rounded = torch.zeros((parameter.shape[0], columns_made), dtype=torch.int8)
    scales = torch.ones(columns_made)
    for key in parameter.parts:
        matrix, first = weights[key].detach(), parameter.place(key).start
        for start in range(0, len(matrix), _AT_ONCE):  # little extra memory
            part = matrix[start : start + _AT_ONCE].float().t()
            place = slice(first + start, first + start + part.shape[1])
            rounded[:, place], scales[place] = round_columns(part)
    yield MATRIX.format(name), rounded
    yield SCALE.format(name), scales


def quantize_for_device(
    arch: Architecture, weights: Weights, scaling: Fp16Scaling
) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the matrices as device graphs read them, with norm weights and range factors in them.

    Yields:
        As `quantize`.
    """
    for name, parameter in parameters(arch).items():
        if parameter.is_matrix:
            matrix = materialize(parameter, weights, torch.float32, torch.device("cpu"), partial(scaling.factor, name))
            rounded, scales = round_columns(matrix)
            yield MATRIX.format(name), rounded
            yield SCALE.format(name), scales


def round_columns(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix [in, out] in int8, and the scale of every column, float32 [out]."""
    scales = matrix.abs().amax(0).clamp_min(1e-30) / 127.0
    return (matrix / scales).round_().to(torch.int8), scales


class Int8HostGraphBuilder(HostGraphBuilder):
    """Products with matrices in 8 bits by ONNX Runtime's DynamicQuantizeMatMul.

    Args:
        name: of the graph.
        arch: of the model.
        weights: state-dict key -> CPU tensor, for what is not quantized.
        quantized: what `quantize` made, as int8 or, for processors whose 8-bit products of mixed sign saturate, shifted
            by 128 as uint8.
        inputs: see `HostGraphBuilder`; names of `quantized` too.
    """

    def __init__(
        self,
        name: str,
        arch: Architecture,
        weights: Weights,
        quantized: Mapping[str, torch.Tensor],
        inputs: Collection[str] = (),
    ) -> None:
        super().__init__(name, arch, weights, ir.DataType.FLOAT, inputs=inputs)
        self._quantized = quantized

    def products(self, stream: ir.Value, group: str, *, together: bool = False) -> Sequence[ir.Value]:
        """See `HostGraphBuilder.products`: one product for the whole group."""
        if MATRIX.format(group) not in self._quantized:
            return super().products(stream, group)
        matrix, stored = self._stored(MATRIX.format(group)), self._quantized[MATRIX.format(group)]
        made = stored.shape[1]
        unsigned = stored.dtype == torch.uint8
        zero_points = self.constant(np.full(made, 128 if unsigned else 0), _byte_type(stored))
        scales = self._stored(SCALE.format(group))
        (packed,) = self.foreign(CONTRIB, "DynamicQuantizeMatMul", 1, stream, matrix, scales, zero_points)
        return self._parts(packed, group, made, together=together)

    def _parts(self, packed: ir.Value, group: str, made: int, *, together: bool) -> Sequence[ir.Value]:
        """The products of a group out of one value of `made` columns."""
        parameter = self.groups[group]
        ends = [parameter.shape[1]] if together else np.cumsum(parameter.widths).tolist()
        if ends == [made]:
            return [packed]
        return [self._columns(packed, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _columns(self, value: ir.Value, start: Dim, end: Dim) -> ir.Value:
        return self.op("Slice", value, self.vector(start), self.vector(end), self.ints(1))

    def _stored(self, name: str) -> ir.Value:
        tensor = self._quantized[name]
        if name in self._changing:
            kind = ir.DataType.FLOAT if tensor.is_floating_point() else _byte_type(tensor)
            return self.weight_input(name, kind, tensor.shape)
        return self.initializer(name, ir.tensor_adapters.TorchTensor(tensor, name=name))


def _byte_type(tensor: torch.Tensor) -> ir.DataType:
    return ir.DataType.UINT8 if tensor.dtype == torch.uint8 else ir.DataType.INT8


class Int8DeviceGraphBuilder(DeviceGraphBuilder):
    """Products with matrices stored in 8 bits and dequantized when used (weight-only quantization).

    Args:
        name: of the graph.
        arch: of the model.
        real: compute type.
        quantized: matrices of `quantize_for_device`; they become part of the graph.
        fixed: axis letter -> size.
    """

    def __init__(
        self,
        name: str,
        arch: Architecture,
        real: ir.DataType,
        quantized: Mapping[str, torch.Tensor],
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name, arch, real, fixed=fixed)
        self._domains[""] = WEIGHT_ONLY_OPSET
        self._quantized = quantized

    def matrix(self, group: str) -> ir.Value:
        """See `DeviceGraphBuilder.matrix`."""
        stored, scales = (self._quantized[name.format(group)] for name in (MATRIX, SCALE))
        name = MATRIX.format(group)
        matrix = self.initializer(name, ir.tensor_adapters.TorchTensor(stored, name=name))
        scale = self.constant(scales.numpy(), self.real)
        return self.op("DequantizeLinear", matrix, scale, axis=1)
