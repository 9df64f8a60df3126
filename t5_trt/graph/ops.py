"""A thin layer over onnx-ir: collects the nodes and initializers of a graph.

It is independent of T5; `t5_trt.graph.builders` adds that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from t5_trt.graph.signature import INDEX, SINGLE, WIDE_MARK, Tensor

OPSET = 17  # the newest that TensorRT 8.5 reads
IR_VERSION = 8  # of the release with opset 17
Dim = int | ir.Value


class GraphBuilder:
    """Collects one ONNX graph.

    Args:
        name: of the graph.
        real: ONNX type of weights and activations.
        index: ONNX type of ids, positions and masks.
        fixed: axis letter -> size, for axes of fixed size: arithmetic on them is done here and not in the graph.
    """

    def __init__(
        self,
        name: str,
        real: ir.DataType,
        index: ir.DataType = ir.DataType.INT64,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self._fixed = dict(fixed or {})
        self.real = real
        self.index = index
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._weight_inputs: dict[str, ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._domains: dict[str, int] = {"": OPSET}
        self._scope = ""
        self._serial = 0
        self._debug_outputs: dict[str, ir.Value] | None = None

    def add_debug_outputs(self) -> None:
        """Make every value named by `tap` an output of the graph."""
        self._debug_outputs = {}

    def tap(self, name: str, value: ir.Value) -> None:
        """Name a value that can become a debug output."""
        if self._debug_outputs is not None:
            self._debug_outputs[name] = value

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes created inside, so that an engine's layers can be matched to the checkpoint."""
        outer, self._scope = self._scope, f"{name}/"
        yield
        self._scope = outer

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Mark nodes created inside as float32 arithmetic, for builders that would otherwise choose half precision."""
        outer, self._scope = self._scope, f"{self._scope}{WIDE_MARK}"
        yield
        self._scope = outer

    def input(self, tensor: Tensor) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(self._dtype(tensor.kind)), shape=ir.Shape(self.shape_of(tensor))
        )
        self._inputs.append(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node and return its only output."""
        return self.multi(op_type, 1, *inputs, **attributes)[0]

    def multi(self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """Append a node and return its outputs."""
        return self._append("", op_type, outputs, inputs, attributes)

    def foreign(
        self, domain: str, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node of another domain than ONNX's, such as "com.microsoft", and return its outputs."""
        self._domains[domain] = 1
        return self._append(domain, op_type, outputs, inputs, attributes)

    def _append(
        self,
        domain: str,
        op_type: str,
        outputs: int,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
    ) -> Sequence[ir.Value]:
        self._serial += 1
        name = f"{self._scope}{op_type}_{self._serial}"
        node = ir.Node(
            domain, op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=outputs, name=name
        )
        for number, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}:{number}"
        self._nodes.append(node)
        return node.outputs

    def initializer(self, key: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer of that name, made from `tensor` the first time."""
        if key not in self._initializers:
            self._initializers[key] = ir.Value(
                name=key, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[key]

    def weight_input(self, key: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The graph input of that name for a weight, declared the first time."""
        if key not in self._weight_inputs:
            value = ir.Value(name=key, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self._weight_inputs[key] = value
            self._inputs.append(value)
        return self._weight_inputs[key]

    def constant(self, array: Any, dtype: ir.DataType) -> ir.Value:
        """A small constant of the given type; equal constants are shared."""
        data = np.asarray(array)
        content = hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()
        key = f"const_{dtype.name}_{'x'.join(map(str, data.shape))}_{content}"
        return self.initializer(key, ir.tensor(data.astype(dtype.numpy()), dtype=dtype, name=key))

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector, as shape arguments are."""
        return self.constant(np.array(values, dtype=np.int64), ir.DataType.INT64)

    def scalar(self, value: float, dtype: ir.DataType | None = None) -> ir.Value:
        """A rank-0 constant of the compute type, or of `dtype`."""
        return self.constant(np.array(value), dtype or self.real)

    def cast(self, value: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
        """Cast, unless both types are the same."""
        return value if source == target else self.op("Cast", value, to=int(target))

    def reshape(self, value: ir.Value, *shape: Dim) -> ir.Value:
        """Reshape; 0 keeps the input's size of that axis, -1 infers it."""
        return self.op("Reshape", value, self.vector(*shape))

    def transpose(self, value: ir.Value, *order: int) -> ir.Value:
        """Permute the axes."""
        return self.op("Transpose", value, perm=order)

    def size(self, value: ir.Value, axis: int) -> Dim:
        """One dimension of a graph input: a number if it is fixed, else an int64 vector of length 1."""
        assert value.shape is not None
        known = value.shape[axis]
        if isinstance(known, int):
            return known
        # not Shape's start and end: older parsers ignore them
        return self.op("Gather", self.op("Shape", value), self.ints(axis), axis=0)

    def multiply(self, left: Dim, right: Dim) -> Dim:
        """The product of two dimensions."""
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        return left if right == 1 else self.op("Mul", self.vector(left), self.vector(right))

    def divide(self, left: Dim, right: Dim) -> Dim:
        """The quotient of two dimensions, which must be an integer."""
        if isinstance(left, int) and isinstance(right, int):
            return left // right
        return self.op("Div", self.vector(left), self.vector(right))

    def vector(self, *dims: Dim) -> ir.Value:
        """Dimensions as one int64 vector, which is never marked as float32 arithmetic."""
        if all(isinstance(dim, int) for dim in dims):
            return self.ints(*(dim for dim in dims if isinstance(dim, int)))
        parts = (self.ints(dim) if isinstance(dim, int) else dim for dim in dims)
        outer, self._scope = self._scope, self._scope.replace(WIDE_MARK, "")
        made = self.op("Concat", *parts, axis=0)
        self._scope = outer
        return made

    def arange(self, length: Dim) -> ir.Value:
        """0, 1, .. length - 1 as int64."""
        if isinstance(length, int):
            return self.ints(*range(length))
        end = self.op("Squeeze", length, self.ints(0))
        return self.op("Range", self.scalar(0, ir.DataType.INT64), end, self.scalar(1, ir.DataType.INT64))

    def mean(self, value: ir.Value) -> ir.Value:
        """The mean over the last axis, which is kept with size 1."""
        if self._domains[""] >= 18:  # the axes became an input
            return self.op("ReduceMean", value, self.ints(-1), keepdims=1)
        return self.op("ReduceMean", value, axes=[-1], keepdims=1)

    def clip(self, value: ir.Value, low: int, high: int) -> ir.Value:
        """Limit int64 values (Clip itself takes no integers in TensorRT 8)."""
        return self.op(
            "Min",
            self.op("Max", value, self.scalar(low, ir.DataType.INT64)),
            self.scalar(high, ir.DataType.INT64),
        )

    def finish(self, outputs: Mapping[str, ir.Value], declared: Sequence[Tensor]) -> ir.Model:
        """Name the outputs, give them their declared types and shapes, and return the model."""
        results = []
        for tensor in declared:
            value = outputs[tensor.name]
            if value.name in self._initializers or value in results or value.producer() is None:
                value = self.op("Identity", value)
            value.name, value.type = tensor.name, ir.TensorType(self._dtype(tensor.kind))
            value.shape = ir.Shape(self.shape_of(tensor))
            results.append(value)
        for name, source in (self._debug_outputs or {}).items():
            value = self.op("Identity", source)
            value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
            results.append(value)
        graph = ir.Graph(
            inputs=self._inputs,
            outputs=results,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._domains,
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="t5_trt")

    def shape_of(self, tensor: Tensor) -> list[int | str]:
        """The declared axes, with sizes for those that are fixed."""
        return [self._fixed.get(axis, axis) if isinstance(axis, str) else axis for axis in tensor.axes]

    def _dtype(self, kind: str) -> ir.DataType:
        return self.index if kind == INDEX else ir.DataType.FLOAT if kind == SINGLE else self.real
