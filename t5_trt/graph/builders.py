"""The two forms in which T5's graphs are written: for ONNX Runtime on the host and for TensorRT on a device.

Host: weights are initializers under their state-dict keys in the checkpoint's layout, so that the memory of the torch
parameters is read in place; all axes may be symbolic.

Device: weights are inputs of the graph, see `t5_trt.graph.parameters`. An engine then holds no weights: it builds in a
fraction of the time, is a few megabytes on disk, serves every checkpoint of an architecture, and all engines of a model share
one copy in GPU memory. Inputs and outputs are two-dimensional: for more dimensions TensorRT 8.5 chooses vectorized
layouts inside and copies every K/V buffer in each step (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.ops import Dim, GraphBuilder
from t5_trt.graph.parameters import EMBEDDING, Parameter, Weights, parameters
from t5_trt.graph.precision import TORCH_TYPES
from t5_trt.graph.signature import Tensor

FLOAT = ir.DataType.FLOAT
#: the domain of ONNX Runtime's own operators
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Projection:
    """Products of a stream with the matrices of one group.

    Attributes:
        parts: one value for each matrix, of the stream's leading axes.
        packed: all of them side by side along the last axis; None in the host form.
    """

    parts: Sequence[ir.Value]
    packed: ir.Value | None


class T5GraphBuilder(GraphBuilder):
    """Builds the graph of one architecture from T5's operations; see the two subclasses."""

    packed: bool

    def __init__(
        self, name: str, arch: Architecture, real: ir.DataType, index: ir.DataType, fixed: Mapping[str, int] | None
    ) -> None:
        super().__init__(name, real, index, fixed)
        self.arch = arch
        self.groups = parameters(arch)

    def parameter(self, name: str) -> ir.Value:
        """A weight that is used as a lookup table or added."""
        raise NotImplementedError

    def project(self, stream: ir.Value, group: str) -> Projection:
        """The products of a group, with its norm and scale applied."""
        raise NotImplementedError

    def flat(self, value: ir.Value, outer: Sequence[Dim], width: int) -> ir.Value:
        """Reshape a value for products: [outer .., width], or [rows, width] on the host."""
        raise NotImplementedError

    def by_heads(self, value: ir.Value, streams: Sequence[Dim]) -> ir.Value:
        """One token of each row, [rows, H * D], by heads: [R, H, 1, D], or on a device, whose rows stay apart, [B, N, H, D].

        In both, the last axis is what a row's product with its cache runs over, so the same nodes follow.
        """
        raise NotImplementedError

    def by_rows(self, position: ir.Value) -> ir.Value:
        """Positions in a shape that broadcasts with cache slots [T]: host form [P, 1], for every row or for all of them; device (1,)."""
        raise NotImplementedError

    def slots_of_rows(self, slots: ir.Value) -> ir.Value:
        """Values of cache slots, as `by_rows` made them, in a shape that broadcasts with scores of `row_scores`."""
        raise NotImplementedError

    def bias_of_rows(self, bias: ir.Value, mask: ir.Value) -> ir.Value:
        """A bias [.., T, H] plus a mask [.., T], as `by_rows` made them, in a shape that broadcasts with scores of `row_scores`."""
        raise NotImplementedError

    def row_scores(self, query: ir.Value, keys: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """Queries as of `by_heads` times each row's cached keys [R, H, T, D]; the last axis becomes T."""
        raise NotImplementedError

    def row_mixture(self, weights: ir.Value, values: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """Weights as of `row_scores` times each row's cached values [R, H, T, D]; the last axis becomes D."""
        raise NotImplementedError

    def product(
        self, left: ir.Value, right: ir.Value, sizes: Sequence[Dim], inner: Dim, width: Dim, *, transposed: bool = False
    ) -> ir.Value:
        """The product over the last two axes, [B, H, rows, inner] times [B, H, inner, width] (or its transpose).

        Args:
            left: the last axis is `inner`; on a device those before it may be in any order that flattens to B, H, rows.
            right: [B, H, inner, width], or if `transposed` [B, H, width, inner].
            sizes: B, H, rows.
            inner: the axis that is summed over.
            width: last axis of the result.
            transposed: multiply by the transpose of `right`.
        """
        raise NotImplementedError

    @property
    def stream_type(self) -> ir.DataType:
        """The type of residual streams: the compute type, or float32 if sums over layers could leave its range."""
        return FLOAT if self.arch.wide_stream else self.real

    def stream(self, source: ir.Value, outer: Sequence[Dim], *, embeds: bool = False) -> ir.Value:
        """Start a residual stream with the embeddings of token ids, or with embeddings."""
        embedded = source if embeds else self.op("Gather", self.parameter(EMBEDDING), source, axis=0)
        return self.cast(self.flat(embedded, outer, self.arch.d_model), self.real, self.stream_type)

    def add_branch(self, stream: ir.Value, inner: ir.Value, group: str) -> ir.Value:
        """A layer's output, ``stream + linear(inner, group)``, in the units of the stream: see `Architecture.branch_factors`."""
        branch = self.cast(self.linear(inner, group), self.real, self.stream_type)
        if not self.arch.wide_stream:
            return self.op("Add", stream, branch)
        factor = self.arch.stream_factor / self.arch.branch_factors.get(group, 1.0)
        with self.wide():
            if factor != 1.0:
                branch = self.op("Mul", branch, self.scalar(factor, FLOAT))
            return self.op("Add", stream, branch)

    def linear(self, stream: ir.Value, group: str) -> ir.Value:
        """The product of a group with a single matrix."""
        return self.project(stream, group).parts[0]

    def rms_norm(self, stream: ir.Value, weight: ir.Value | None) -> ir.Value:
        """T5's layer norm (no mean, no bias), computed in float32 whatever the compute type."""
        wide = self.cast(stream, self.stream_type, FLOAT)
        with self.wide():
            square = self.op("Pow", wide, self.scalar(2.0, FLOAT))
            mean = self.mean(square)
            root = self.op(
                "Sqrt", self.op("Add", mean, self.scalar(self.arch.epsilon * self.arch.stream_factor**2, FLOAT))
            )
            normed = self.op("Div", wide, root)
            if weight is not None:  # ONNX Runtime fuses exactly this chain into SimplifiedLayerNormalization
                normed = self.op("Mul", normed, self.cast(weight, self.real, FLOAT))
        return self.cast(normed, FLOAT, self.real)


class HostGraphBuilder(T5GraphBuilder):
    """Weights as initializers.

    Args:
        name: of the graph.
        arch: of the model.
        weights: state-dict key -> CPU tensor, read only when the model is saved or bound.
        real: compute type.
        index: type of ids, positions and masks.
        fixed: axis letter -> size, for axes of fixed size.
        inputs: names of weights that are inputs of the graph instead, because their values change.
    """

    packed = False

    def __init__(
        self,
        name: str,
        arch: Architecture,
        weights: Weights,
        real: ir.DataType,
        index: ir.DataType = ir.DataType.INT64,
        fixed: Mapping[str, int] | None = None,
        inputs: Collection[str] = (),
    ) -> None:
        super().__init__(name, arch, real, index, fixed)
        self._weights, self._changing = weights, inputs

    def parameter(self, name: str) -> ir.Value:
        """See `T5GraphBuilder.parameter`."""
        return self._weight(name)

    def project(self, stream: ir.Value, group: str) -> Projection:
        """See `T5GraphBuilder.project`."""
        parameter = self.groups[group]
        if parameter.norm is not None:
            stream = self.rms_norm(stream, self._weight(parameter.norm))
        if parameter.scale != 1.0:
            stream = self.op("Mul", stream, self.scalar(parameter.scale))
        return Projection(self.products(stream, group), None)

    def products(self, stream: ir.Value, group: str, *, together: bool = False) -> Sequence[ir.Value]:
        """The products of a normed and scaled stream with each matrix of a group, in the checkpoint's own layout.

        Args:
            stream: [rows, in].
            group: of `t5_trt.graph.parameters`.
            together: give one value with all products side by side where the matrices are stored as one.
        """
        return [self.op("Gemm", stream, self._weight(key), transB=1) for key in self.groups[group].parts]

    def flat(self, value: ir.Value, outer: Sequence[Dim], width: int) -> ir.Value:
        """See `T5GraphBuilder.flat`: [rows, width], as Gemm wants it."""
        return self.reshape(value, -1, width)

    def by_heads(self, value: ir.Value, streams: Sequence[Dim]) -> ir.Value:
        """See `T5GraphBuilder.by_heads`."""
        return self.reshape(value, -1, self.arch.num_heads, 1, self.arch.d_kv)

    def by_rows(self, position: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.by_rows`."""
        return self.op("Unsqueeze", position, self.ints(1))

    def slots_of_rows(self, slots: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.slots_of_rows`: [P, T] as [P, 1, 1, T]."""
        return self.op("Unsqueeze", slots, self.ints(1, 2))

    def bias_of_rows(self, bias: ir.Value, mask: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.bias_of_rows`: [P, T, H] as [P, H, 1, T]."""
        by_heads = self.op("Unsqueeze", self.transpose(bias, 0, 2, 1), self.ints(2))
        return self.op("Add", by_heads, self.slots_of_rows(mask))

    def row_scores(self, query: ir.Value, keys: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """See `T5GraphBuilder.row_scores`."""
        return self.op("MatMul", query, self.transpose(keys, 0, 1, 3, 2))

    def row_mixture(self, weights: ir.Value, values: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """See `T5GraphBuilder.row_mixture`."""
        return self.op("MatMul", weights, values)

    def product(
        self, left: ir.Value, right: ir.Value, sizes: Sequence[Dim], inner: Dim, width: Dim, *, transposed: bool = False
    ) -> ir.Value:
        """See `T5GraphBuilder.product`."""
        return self.op("MatMul", left, self.transpose(right, 0, 1, 3, 2) if transposed else right)

    def _weight(self, key: str) -> ir.Value:
        source = self._weights[key]
        if key in self._changing:
            return self.weight_input(key, self.real, source.shape)

        def read() -> ir.TensorProtocol:
            tensor = source.detach().to(TORCH_TYPES[self.real])
            return ir.tensor_adapters.TorchTensor(tensor.contiguous(), name=key)

        return self.initializer(key, ir.LazyTensor(read, dtype=self.real, shape=ir.Shape(source.shape), name=key))


class DeviceGraphBuilder(T5GraphBuilder):
    """Weights as inputs, known shapes, flat inputs and outputs. Arguments as for `HostGraphBuilder`."""

    packed = True

    def __init__(
        self,
        name: str,
        arch: Architecture,
        real: ir.DataType,
        index: ir.DataType = ir.DataType.INT32,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(name, arch, real, index, fixed)
        self._read: dict[str, ir.Value] = {}

    def parameter(self, name: str) -> ir.Value:
        """See `T5GraphBuilder.parameter`."""
        if name not in self._read:
            shape = ir.Shape(self.groups[name].shape)
            self._read[name] = ir.Value(name=name, type=ir.TensorType(self.real), shape=shape)
        return self._read[name]

    def project(self, stream: ir.Value, group: str) -> Projection:
        """See `T5GraphBuilder.project`: one product for the whole group, with the norm's weight and the scale already in the matrix."""
        parameter: Parameter = self.groups[group]
        if parameter.norm is not None:
            stream = self.rms_norm(stream, None)
        packed = self.op("MatMul", stream, self.matrix(group))
        if len(parameter.parts) == 1:
            return Projection([packed], packed)
        ends = [sum(parameter.widths[: part + 1]) for part in range(len(parameter.parts))]
        starts = [0, *ends[:-1]]
        last = self.ints(2)  # streams have three axes
        parts = [
            self.op("Slice", packed, self.ints(start), self.ints(end), last)
            for start, end in zip(starts, ends, strict=True)
        ]
        return Projection(parts, packed)

    def matrix(self, group: str) -> ir.Value:
        """The matrix of a group, [in, out]."""
        return self.parameter(group)

    def flat(self, value: ir.Value, outer: Sequence[Dim], width: int) -> ir.Value:
        """See `T5GraphBuilder.flat`: the leading axes are kept apart.

        Merging them makes TensorRT 8.5 mix up rows where a transposed product follows (docs/performance.md).
        """
        return self.reshape(value, *outer, width)

    def by_heads(self, value: ir.Value, streams: Sequence[Dim]) -> ir.Value:
        """See `T5GraphBuilder.by_heads`."""
        return self.reshape(value, *streams, self.arch.num_heads, self.arch.d_kv)

    def by_rows(self, position: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.by_rows`."""
        return position

    def slots_of_rows(self, slots: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.slots_of_rows`."""
        return slots

    def bias_of_rows(self, bias: ir.Value, mask: ir.Value) -> ir.Value:
        """See `T5GraphBuilder.bias_of_rows`: [T, H] as [H, T]."""
        return self.op("Add", self.transpose(bias, 1, 0), mask)

    def row_scores(self, query: ir.Value, keys: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """See `T5GraphBuilder.row_scores`."""
        single, of_heads = (self.reshape(part, -1, rows, self.arch.d_kv) for part, rows in ((query, 1), (keys, cached)))
        return self.reshape(self.key_product(single, of_heads), *streams, self.arch.num_heads, cached)

    def key_product(self, query: ir.Value, keys: ir.Value) -> ir.Value:
        """Queries [R*H, 1, D] times keys [R*H, T, D], as [R*H, T, 1].

        In this order TensorRT 8.5 calls a matrix-vector kernel. With the query first it multiplies and sums by itself,
        which takes 560 us against 498 in three layers of T5-base with 128 rows (``benchmarks/experiments/key_product.py``).
        """
        return self.op("MatMul", keys, self.reshape(query, -1, self.arch.d_kv, 1))

    def row_mixture(self, weights: ir.Value, values: ir.Value, streams: Sequence[Dim], cached: Dim) -> ir.Value:
        """See `T5GraphBuilder.row_mixture`."""
        width = self.arch.d_kv
        mixed = self.op("MatMul", self.reshape(weights, -1, 1, cached), self.reshape(values, -1, cached, width))
        return self.reshape(mixed, *streams, self.arch.num_heads, width)

    def product(
        self, left: ir.Value, right: ir.Value, sizes: Sequence[Dim], inner: Dim, width: Dim, *, transposed: bool = False
    ) -> ir.Value:
        """See `T5GraphBuilder.product`: over three axes, which TensorRT 8.5 does without reformats."""
        left = self.reshape(left, -1, sizes[-1], inner)
        if transposed:
            right = self.transpose(self.reshape(right, -1, width, inner), 0, 2, 1)
        else:
            right = self.reshape(right, -1, inner, width)
        return self.reshape(self.op("MatMul", left, right), *sizes, width)

    def input(self, tensor: Tensor) -> ir.Value:
        """Declare an input in flattened form, and return it in its own shape."""
        shape = self.shape_of(tensor)
        known = [size for size in shape if isinstance(size, int)]
        if len(shape) < 3 or len(known) < len(shape):
            return super().input(tensor)
        value = self.reshape(super().input(self._flat(tensor)), *known)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(self._dtype(tensor.kind))
        return value

    def finish(self, outputs: Mapping[str, ir.Value], declared: Sequence[Tensor]) -> ir.Model:
        """Flatten the outputs, and append the weights to the inputs."""
        flat = [self._flat(tensor) for tensor in declared]
        values = dict(outputs)
        for tensor in flat:
            sizes = [axis for axis in tensor.axes if isinstance(axis, int)]
            if len(sizes) == len(tensor.axes):
                values[tensor.name] = self.reshape(outputs[tensor.name], *sizes)
        self._inputs += self._read.values()
        return super().finish(values, flat)

    def _flat(self, tensor: Tensor) -> Tensor:
        shape = self.shape_of(tensor)
        known = [size for size in shape if isinstance(size, int)]
        if len(shape) < 3 or len(known) < len(shape):
            return tensor
        return Tensor(tensor.name, tensor.kind, (math.prod(known[:-1]), known[-1]))
