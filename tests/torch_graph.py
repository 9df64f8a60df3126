"""Runs our own ONNX graphs node by node in torch, in the types that the graph names.

ONNX Runtime on a CPU has no half precision kernels for most of these operators and computes them in float32, which hides
overflow. Torch has them: every node's result is rounded to float16 here, and looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from t5_trt.graph.precision import TORCH_TYPES

F = torch.nn.functional
_TYPES = {**TORCH_TYPES, ir.DataType.BOOL: torch.bool}


class NotFiniteError(AssertionError):
    """A node made an infinity or a NaN."""


class TorchGraph:
    """One graph, ready to run.

    Args:
        model: of operators in `_OPERATORS`.

    Attributes:
        largest: node name -> largest absolute value of its floating point result, over all runs.
    """

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._constants = {
            name: torch.tensor(value.const_value.numpy()) for name, value in model.graph.initializers.items()
        }
        self.inputs = {v.name: (_TYPES[v.dtype], tuple(v.shape.numpy())) for v in model.graph.inputs}
        self.outputs = {v.name: (_TYPES[v.dtype], tuple(v.shape.numpy())) for v in model.graph.outputs if v.shape}
        self.largest: dict[str, float] = {}

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name.

        Raises:
            NotFiniteError: naming the first node whose result is not finite.
        """
        values: dict[str, torch.Tensor] = {**self._constants, **inputs}
        for node in self._graph:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            results = _OPERATORS[node.op_type](*(values[v.name] for v in node.inputs if v is not None), **attributes)
            (output,) = node.outputs
            values[output.name] = results
            if results.is_floating_point() and results.numel():
                largest = float(results.abs().max())
                if not results.isfinite().all():
                    raise NotFiniteError(f"{node.name} of {tuple(results.shape)} {results.dtype} is not finite")
                self.largest[node.name] = max(largest, self.largest.get(node.name, 0.0))
        return {name: values[name] for name in self.outputs}


def _slice(x: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x.narrow(axis, start, min(end, x.shape[axis]) - start)
    return x


_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Sqrt": torch.sqrt,
    "MatMul": torch.matmul,
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Min": torch.minimum,
    "Max": torch.maximum,
    "Where": torch.where,
    "Equal": torch.eq,
    "Less": torch.lt,
    "Greater": torch.gt,
    "Identity": lambda x: x,
    "Gather": lambda x, indices, axis=0: x.index_select(axis, indices.flatten().long()).reshape(
        *x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]
    ),
    "Reshape": lambda x, shape: x.reshape(shape.tolist()),
    "Transpose": lambda x, perm: x.permute(*perm),
    "Unsqueeze": lambda x, axes: x.unsqueeze(int(axes)),
    "Concat": lambda *tensors, axis: torch.cat(tensors, axis),
    "Slice": _slice,
    "Cast": lambda x, to: x.to(_TYPES[ir.DataType(to)]),
    "DequantizeLinear": lambda x, scale, axis: x.to(scale.dtype) * scale,  # columns: the last of two axes
    "Softmax": lambda x, axis: F.softmax(x, axis),
    "ReduceMean": lambda x, axes, keepdims: x.mean(tuple(map(int, axes)), keepdim=bool(keepdims)),
    "ReduceSum": lambda x, axes, keepdims: x.sum(tuple(axes.tolist()), keepdim=bool(keepdims)),
}
