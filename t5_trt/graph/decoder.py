"""The decoder graph over a static K/V cache, for one query position (a step) or several (prompts, verification).

Split softmax: scores over the cache and scores over the new keys are concatenated before the softmax and split after
it, so the engine reads the cache where it lies and hands back only the new K/V rows; the session writes those.
Beams are query positions of the cross-attention, so the encoder's K/V are never repeated per beam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from t5_trt.architecture import Architecture
from t5_trt.graph.blocks import FLOAT, feed_forward, rms_norm, scores, softmax
from t5_trt.graph.ops import GraphBuilder, Weights
from t5_trt.graph.precision import mask_value
from t5_trt.graph.relative_bias import RelativeBias, distance_buckets
from t5_trt.signature import QUERIES, STEP, signature

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class _Frame:
    """What every layer shares: shape vectors and the positions of the keys."""

    single: bool  # Q = 1
    cached: ir.Value  # (T,)
    logits_shape: ir.Value  # (R, Q, V)
    heads_shape: ir.Value  # (R, Q, H, D), or (R, H, 1, D) for one query position
    beams_shape: ir.Value  # (B, N*Q, H, D)
    past_index: ir.Value  # [Q, T] clipped distances from query to cached key
    new_index: ir.Value  # [Q, Q] clipped distances from query to new key
    past_mask: ir.Value  # [R or 1, 1, Q or 1, T]
    new_mask: ir.Value  # [R or 1, 1, Q, Q]


def build_decoder(
    arch: Architecture,
    weights: Weights,
    real: ir.DataType,
    index: ir.DataType = INT64,
    fixed: Mapping[str, int] | None = None,
    *,
    queries: bool = False,
) -> ir.Model:
    """Write the decoder: see `t5_trt.signature.signature` for inputs and outputs.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor, read only when the model is saved or bound.
        real: compute type.
        index: type of ids and positions.
        fixed: axis letter -> size, for axes that are known.
        queries: several query positions (Q) instead of one.
    """
    name = QUERIES if queries else STEP
    declared = signature(name, arch)
    graph = GraphBuilder(name, weights, real, index, fixed)
    inputs = {tensor.name: graph.input(tensor) for tensor in declared.inputs}
    frame = _frame(graph, arch, inputs)
    relative = RelativeBias(graph, distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=False))
    biases: dict[str, tuple[ir.Value, ir.Value]] = {}
    embedded = graph.op("Gather", graph.weight("shared.weight"), inputs["decoder_input_ids"], axis=0)
    stream = graph.reshape(embedded, -1, arch.d_model)  # [R*Q, E]
    outputs: dict[str, ir.Value] = {}
    for layer in range(arch.decoder_layers):
        prefix = f"decoder.block.{layer}"
        table = arch.bias_weight("decoder", layer)
        if table not in biases:
            biases[table] = _masked_biases(graph, relative, table, frame)
        past = (inputs[f"past_k_{layer}"], inputs[f"past_v_{layer}"])
        cross = (inputs[f"cross_k_{layer}"], inputs[f"cross_v_{layer}"])
        with graph.scope(f"{prefix}.layer.0"):
            stream, key, value = _self_attention(graph, arch, stream, f"{prefix}.layer.0", frame, past, biases[table])
        outputs |= {f"new_k_{layer}": key, f"new_v_{layer}": value}
        with graph.scope(f"{prefix}.layer.1"):
            bias = inputs["cross_bias"]
            stream = _cross_attention(graph, arch, stream, f"{prefix}.layer.1", frame, cross, bias)
        with graph.scope(f"{prefix}.layer.2"):
            stream = feed_forward(graph, arch, stream, f"{prefix}.layer.2")
    with graph.scope("lm_head"):
        outputs["logits"] = _logits(graph, arch, stream, frame)
    return graph.finish(outputs, declared.outputs)


def _frame(graph: GraphBuilder, arch: Architecture, inputs: dict[str, ir.Value]) -> _Frame:
    tokens, past, cross = inputs["decoder_input_ids"], inputs["past_k_0"], inputs["cross_k_0"]
    rows, query_count, cached = graph.size(tokens, 0), graph.size(tokens, 1), graph.size(past, 2)
    width = (arch.num_heads, arch.d_kv)
    single = "key_bias" not in inputs
    position = graph.cast(inputs["position"], graph.index, INT64)  # (1,)
    slots, queries = graph.arange(cached), graph.arange(query_count)  # [T], [Q]
    hide, keep = graph.scalar(mask_value(graph.real)), graph.scalar(0.0)
    cached_end = graph.vector(cached)

    column = graph.op("Unsqueeze", queries, graph.ints(1))  # [Q, 1]
    past_distance = graph.op("Sub", graph.op("Add", column, position), slots)  # [Q, T]
    past_mask = graph.op("Where", graph.op("Less", slots, position), keep, hide)  # [T]
    past_mask = graph.op("Unsqueeze", past_mask, graph.ints(0, 1, 2))  # [1, 1, 1, T]
    new_distance = graph.op("Sub", column, queries)  # [Q, Q]
    new_mask = graph.op("Where", graph.op("Less", new_distance, graph.scalar(0, INT64)), hide, keep)
    new_mask = graph.op("Unsqueeze", new_mask, graph.ints(0, 1))  # [1, 1, Q, Q]
    if not single:  # Min instead of a sum: two lowest values added would be -inf
        pads = inputs["key_bias"]
        past_pad = graph.op("Slice", pads, graph.ints(0), cached_end, graph.ints(3))
        new_pad = graph.op("Slice", pads, cached_end, graph.ints(2**31 - 1), graph.ints(3))
        past_mask, new_mask = graph.op("Min", past_mask, past_pad), graph.op("Min", new_mask, new_pad)
    return _Frame(
        single=single,
        cached=cached_end,
        logits_shape=graph.vector(rows, query_count, arch.vocab_size),
        heads_shape=graph.vector(rows, arch.num_heads, 1, arch.d_kv)
        if single
        else graph.vector(rows, query_count, *width),
        beams_shape=graph.vector(graph.size(cross, 0), -1, *width),
        past_index=graph.clip(past_distance, 0, arch.max_distance),
        new_index=graph.clip(new_distance, 0, arch.max_distance),
        past_mask=past_mask,
        new_mask=new_mask,
    )


def _masked_biases(graph: GraphBuilder, relative: RelativeBias, table: str, frame: _Frame) -> tuple[ir.Value, ir.Value]:
    """Relative bias plus mask over cached keys [R or 1, H, Q, T] and over new keys [R or 1, H, Q, Q]."""
    biases = []
    for index, mask in ((frame.past_index, frame.past_mask), (frame.new_index, frame.new_mask)):
        rows = graph.transpose(relative.rows(table, index), 2, 0, 1)  # [H, Q, keys]
        biases.append(graph.op("Add", graph.op("Unsqueeze", rows, graph.ints(0)), mask))
    return biases[0], biases[1]


def _self_attention(
    graph: GraphBuilder,
    arch: Architecture,
    stream: ir.Value,
    layer: str,
    frame: _Frame,
    past: tuple[ir.Value, ir.Value],
    biases: tuple[ir.Value, ir.Value],
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Self-attention with residual; returns the stream and the new K and V [R, H, Q, D]."""
    attention = f"{layer}.SelfAttention"
    normed = rms_norm(graph, stream, f"{layer}.layer_norm.weight", arch.epsilon)
    split = (
        graph.op("Reshape", graph.linear(normed, f"{attention}.{part}.weight"), frame.heads_shape) for part in "qkv"
    )
    # with one query position [R, Q, H, D] and [R, H, Q, D] are the same memory: no transpose there
    query, key, value = (part if frame.single else graph.transpose(part, 0, 2, 1, 3) for part in split)
    past_scores = scores(graph, query, past[0], biases[0])
    new_scores = scores(graph, query, key, biases[1])
    weights = softmax(graph, graph.op("Concat", past_scores, new_scores, axis=-1))
    past_weights = graph.op("Slice", weights, graph.ints(0), frame.cached, graph.ints(3))
    new_weights = graph.op("Slice", weights, frame.cached, graph.ints(2**31 - 1), graph.ints(3))
    mixed = graph.op("Add", graph.op("MatMul", past_weights, past[1]), graph.op("MatMul", new_weights, value))
    ordered = mixed if frame.single else graph.transpose(mixed, 0, 2, 1, 3)
    merged = graph.reshape(ordered, -1, arch.num_heads * arch.d_kv)  # [R*Q, H*D]
    return graph.op("Add", stream, graph.linear(merged, f"{attention}.o.weight")), key, value


def _cross_attention(
    graph: GraphBuilder,
    arch: Architecture,
    stream: ir.Value,
    layer: str,
    frame: _Frame,
    cross: tuple[ir.Value, ir.Value],
    bias: ir.Value,
) -> ir.Value:
    """Cross-attention with residual; all beams and query positions of a batch entry are queries of one product."""
    attention = f"{layer}.EncDecAttention"
    normed = rms_norm(graph, stream, f"{layer}.layer_norm.weight", arch.epsilon)
    flat = graph.linear(normed, f"{attention}.q.weight")  # [R*Q, H*D]
    query = graph.transpose(graph.op("Reshape", flat, frame.beams_shape), 0, 2, 1, 3)  # [B, H, N*Q, D]
    mixed = graph.op("MatMul", softmax(graph, scores(graph, query, cross[0], bias)), cross[1])
    merged = graph.reshape(graph.transpose(mixed, 0, 2, 1, 3), -1, arch.num_heads * arch.d_kv)
    return graph.op("Add", stream, graph.linear(merged, f"{attention}.o.weight"))


def _logits(graph: GraphBuilder, arch: Architecture, stream: ir.Value, frame: _Frame) -> ir.Value:
    """The output matrix: [R, Q, V], float32."""
    normed = rms_norm(graph, stream, "decoder.final_layer_norm.weight", arch.epsilon)
    if arch.output_scale != 1.0:
        normed = graph.op("Mul", normed, graph.scalar(arch.output_scale))
    flat = graph.linear(normed, arch.head_weight)
    return graph.cast(graph.op("Reshape", flat, frame.logits_shape), graph.real, FLOAT)
