"""The parts of a T5 layer that encoder and decoder share: feed-forward, softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from t5_trt.graph.builders import FLOAT, T5GraphBuilder
from t5_trt.graph.ops import GraphBuilder


def activation(graph: GraphBuilder, name: str, value: ir.Value) -> ir.Value:
    """The feed-forward's non-linearity, by Transformers' name for it."""
    if name == "relu":
        return graph.op("Relu", value)
    if name == "silu":
        return graph.op("Mul", value, graph.op("Sigmoid", value))
    half = graph.op("Mul", value, graph.scalar(0.5))
    if name == "gelu":
        inner = graph.op("Erf", graph.op("Mul", value, graph.scalar(math.sqrt(0.5))))
    else:  # gelu_new: the tanh approximation of Hendrycks and Gimpel 2016
        if (
            graph.real == ir.DataType.FLOAT16
        ):  # above 10 the tanh is exactly 1, and the cube of values from 41 on leaves float16
            value = graph.op("Max", graph.op("Min", value, graph.scalar(10.0)), graph.scalar(-10.0))
        cube = graph.op("Mul", value, graph.op("Mul", value, value))
        inner = graph.op("Add", value, graph.op("Mul", cube, graph.scalar(0.044715)))
        inner = graph.op("Tanh", graph.op("Mul", inner, graph.scalar(math.sqrt(2.0 / math.pi))))
    return graph.op("Mul", half, graph.op("Add", inner, graph.scalar(1.0)))


def feed_forward(graph: T5GraphBuilder, stream: ir.Value, layer: str) -> ir.Value:
    """One feed-forward layer with its norm and residual; `layer` is its state-dict prefix."""
    dense = f"{layer}.DenseReluDense"
    inner = activated(graph, graph.project(stream, f"{dense}.wi").parts)
    return graph.add_branch(stream, inner, f"{dense}.wo")


def activated(graph: T5GraphBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    """The inner values of a feed-forward layer out of its first product, or of a gated one out of both."""
    first, *linear = parts
    inner = activation(graph, graph.arch.activation, first)
    return graph.op("Mul", inner, linear[0]) if linear else inner


def softmax(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    """Softmax over the last axis, in float32."""
    wide = graph.cast(value, graph.real, FLOAT)
    with graph.wide():
        weights = graph.op("Softmax", wide, axis=-1)
    return graph.cast(weights, FLOAT, graph.real)
