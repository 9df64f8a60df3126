"""The pieces of a T5 layer as graph nodes: RMSNorm, feed-forward, attention scores. Residual streams are [rows, E]."""

from __future__ import annotations

import math

import onnx_ir as ir

from t5_trt.architecture import Architecture
from t5_trt.graph.ops import GraphBuilder

FLOAT = ir.DataType.FLOAT


def rms_norm(graph: GraphBuilder, value: ir.Value, key: str, epsilon: float) -> ir.Value:
    """T5's layer norm (no mean, no bias), computed in float32 whatever the compute type."""
    wide = graph.cast(value, graph.real, FLOAT)
    with graph.wide():
        square = graph.op("Pow", wide, graph.scalar(2.0, FLOAT))
        mean = graph.op("ReduceMean", square, axes=[-1], keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.scalar(epsilon, FLOAT)))
        # this exact chain is what ONNX Runtime fuses into SimplifiedLayerNormalization
        normed = graph.op("Mul", graph.op("Div", wide, root), graph.weight(key, FLOAT))
    return graph.cast(normed, FLOAT, graph.real)


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
        cube = graph.op("Mul", value, graph.op("Mul", value, value))
        inner = graph.op("Add", value, graph.op("Mul", cube, graph.scalar(0.044715)))
        inner = graph.op("Tanh", graph.op("Mul", inner, graph.scalar(math.sqrt(2.0 / math.pi))))
    return graph.op("Mul", half, graph.op("Add", inner, graph.scalar(1.0)))


def feed_forward(graph: GraphBuilder, arch: Architecture, stream: ir.Value, layer: str) -> ir.Value:
    """One feed-forward layer with its norm and residual; `layer` is its state-dict prefix."""
    dense = f"{layer}.DenseReluDense"
    normed = rms_norm(graph, stream, f"{layer}.layer_norm.weight", arch.epsilon)
    if arch.gated:
        gate = activation(graph, arch.activation, graph.linear(normed, f"{dense}.wi_0.weight"))
        inner = graph.op("Mul", gate, graph.linear(normed, f"{dense}.wi_1.weight"))
    else:
        inner = activation(graph, arch.activation, graph.linear(normed, f"{dense}.wi.weight"))
    return graph.op("Add", stream, graph.linear(inner, f"{dense}.wo.weight"))


def scores(graph: GraphBuilder, query: ir.Value, key: ir.Value, bias: ir.Value) -> ir.Value:
    """``query [.., q, D] @ key [.., k, D]^T + bias`` (T5 does not scale by sqrt(D))."""
    return graph.op("Add", graph.op("MatMul", query, graph.transpose(key, 0, 1, 3, 2)), bias)


def softmax(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    """Softmax over the last axis, in float32."""
    wide = graph.cast(value, graph.real, FLOAT)
    with graph.wide():
        weights = graph.op("Softmax", wide, axis=-1)
    return graph.cast(weights, FLOAT, graph.real)


def cross_projections(
    graph: GraphBuilder, arch: Architecture, states: ir.Value, shape: ir.Value
) -> dict[str, ir.Value]:
    """Cross-attention K and V of every decoder layer from encoder states.

    Args:
        graph: to add nodes to.
        arch: of the model.
        states: [B*S, E].
        shape: int64 vector (B, S, H, D).

    Returns:
        ``cross_k_l``, ``cross_v_l`` -> [B, H, S, D].
    """
    made = {}
    for layer in range(arch.decoder_layers):
        prefix = f"decoder.block.{layer}.layer.1.EncDecAttention"
        with graph.scope(prefix):
            for kind in "kv":
                flat = graph.linear(states, f"{prefix}.{kind}.weight")
                made[f"cross_{kind}_{layer}"] = graph.transpose(graph.op("Reshape", flat, shape), 0, 2, 1, 3)
    return made
