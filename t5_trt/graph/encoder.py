"""The encoder graph (with the decoder's cross-attention K/V), and the graph that makes K/V from given states."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from t5_trt.architecture import Architecture
from t5_trt.graph.blocks import cross_projections, feed_forward, rms_norm, scores, softmax
from t5_trt.graph.ops import Dim, GraphBuilder, Weights
from t5_trt.graph.precision import mask_value
from t5_trt.graph.relative_bias import RelativeBias, distance_buckets
from t5_trt.signature import CROSS, ENCODER, ENCODER_EMBEDS, signature

INT64 = ir.DataType.INT64


def build_encoder(
    arch: Architecture,
    weights: Weights,
    real: ir.DataType,
    index: ir.DataType = INT64,
    fixed: Mapping[str, int] | None = None,
    *,
    embeds: bool = False,
) -> ir.Model:
    """Write the encoder: see `t5_trt.signature.signature` for inputs and outputs.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor, read only when the model is saved or bound.
        real: compute type.
        index: type of ids and masks.
        fixed: axis letter -> size, for axes that are known.
        embeds: take ``inputs_embeds`` instead of ``input_ids``.
    """
    name = ENCODER_EMBEDS if embeds else ENCODER
    declared = signature(name, arch)
    graph = GraphBuilder(name, weights, real, index, fixed)
    source, mask = (graph.input(tensor) for tensor in declared.inputs)
    embedded = source if embeds else graph.op("Gather", graph.weight("shared.weight"), source, axis=0)
    stream = graph.reshape(embedded, -1, arch.d_model)  # [B*S, E]
    batch, length = graph.size(mask, 0), graph.size(mask, 1)
    split_shape = graph.vector(batch, length, arch.num_heads, arch.d_kv)

    hidden = graph.op("Equal", mask, graph.scalar(0, index))
    hide = graph.op("Where", hidden, graph.scalar(mask_value(real)), graph.scalar(0.0))
    key_bias = graph.reshape(hide, 0, 1, 1, -1)  # [B, 1, 1, S]
    offsets = _clipped_offsets(graph, length, arch.max_distance)
    relative = RelativeBias(graph, distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True))
    biases: dict[str, ir.Value] = {}
    for layer in range(arch.encoder_layers):
        prefix = f"encoder.block.{layer}"
        table = arch.bias_weight("encoder", layer)
        if table not in biases:  # [B, H, S, S], shared by all layers but in UMT5
            rows = graph.op("Unsqueeze", graph.transpose(relative.rows(table, offsets), 2, 0, 1), graph.ints(0))
            biases[table] = graph.op("Add", rows, key_bias)
        with graph.scope(f"{prefix}.layer.0"):
            stream = _self_attention(graph, arch, stream, f"{prefix}.layer.0", split_shape, biases[table])
        with graph.scope(f"{prefix}.layer.1"):
            stream = feed_forward(graph, arch, stream, f"{prefix}.layer.1")
    with graph.scope("encoder.final_layer_norm"):
        stream = rms_norm(graph, stream, "encoder.final_layer_norm.weight", arch.epsilon)
    shape = graph.vector(batch, length, arch.d_model)
    outputs = {"encoder_hidden_states": graph.op("Reshape", stream, shape)}
    outputs |= cross_projections(graph, arch, stream, split_shape)
    return graph.finish(outputs, declared.outputs)


def build_cross(
    arch: Architecture,
    weights: Weights,
    real: ir.DataType,
    index: ir.DataType = INT64,
    fixed: Mapping[str, int] | None = None,
) -> ir.Model:
    """Write the graph that turns precomputed encoder states into cross-attention K/V."""
    declared = signature(CROSS, arch)
    graph = GraphBuilder(CROSS, weights, real, index, fixed)
    (states,) = (graph.input(tensor) for tensor in declared.inputs)
    split_shape = graph.vector(graph.size(states, 0), graph.size(states, 1), arch.num_heads, arch.d_kv)
    flat = graph.reshape(states, -1, arch.d_model)
    return graph.finish(cross_projections(graph, arch, flat, split_shape), declared.outputs)


def _clipped_offsets(graph: GraphBuilder, length: Dim, limit: int) -> ir.Value:
    """Key - query, clipped to +-limit and shifted to start at 0, for all pairs: [S, S]."""
    if isinstance(length, int):
        steps_known = np.arange(length)
        return graph.constant((steps_known[None] - steps_known[:, None]).clip(-limit, limit) + limit, INT64)
    steps = graph.arange(length)  # [S]
    offset = graph.op("Sub", graph.op("Unsqueeze", steps, graph.ints(0)), graph.op("Unsqueeze", steps, graph.ints(1)))
    return graph.op("Add", graph.clip(offset, -limit, limit), graph.scalar(limit, INT64))


def _self_attention(
    graph: GraphBuilder, arch: Architecture, stream: ir.Value, layer: str, split_shape: ir.Value, bias: ir.Value
) -> ir.Value:
    attention = f"{layer}.SelfAttention"
    normed = rms_norm(graph, stream, f"{layer}.layer_norm.weight", arch.epsilon)
    query, key, value = (
        graph.transpose(
            graph.op("Reshape", graph.linear(normed, f"{attention}.{part}.weight"), split_shape), 0, 2, 1, 3
        )
        for part in "qkv"
    )  # [B, H, S, D]
    mixed = graph.op("MatMul", softmax(graph, scores(graph, query, key, bias)), value)
    merged = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), -1, arch.num_heads * arch.d_kv)  # [B*S, H*D]
    return graph.op("Add", stream, graph.linear(merged, f"{attention}.o.weight"))
