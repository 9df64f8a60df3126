"""The decoder graph over a static K/V cache, for one query position (a step) or several (prompts, verification).

The engine reads the cache in place and returns only the new K/V rows, which the session writes. A step puts the score of the new
key at the cache's first free entry, so that one softmax over T scores is enough; several query positions have their new scores
after the cached ones (split softmax). Beams are query positions of the cross-attention,
so the encoder's K/V are never repeated per beam.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from t5_trt.graph.blocks import feed_forward, softmax
from t5_trt.graph.builders import FLOAT, Projection, T5GraphBuilder
from t5_trt.graph.ops import Dim
from t5_trt.graph.parameters import LM_HEAD
from t5_trt.graph.precision import empty_slot_value, mask_value
from t5_trt.graph.relative_bias import RelativeBias
from t5_trt.graph.signature import QUERIES, STEP, signature

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class _Frame:
    """Sizes and positions shared by all layers."""

    single: bool  # Q = 1
    batch: Dim  # B
    beams: Dim  # N * Q, the query positions of each batch entry
    rows: Dim  # R
    queries: Dim  # Q
    cached: Dim  # T
    source: Dim  # S
    past_index: ir.Value  # [P, T] (device form: [T]) or [Q, T] clipped distances from query to cached key
    new_index: ir.Value | None  # [Q, Q] clipped distances from query to new key
    past_mask: ir.Value  # as past_index, or [R, 1, 1, T]
    new_mask: ir.Value | None  # [R, 1, Q, Q]
    here: ir.Value | None  # bool [P, 1, 1, T] (device form: [T]), true at the entry of the new key

    @property
    def streams(self) -> tuple[Dim, Dim]:
        """Leading axes of the residual stream."""
        return self.batch, self.beams


def build_decoder(graph: T5GraphBuilder, *, queries: bool = False) -> ir.Model:
    """Write the decoder: see `t5_trt.graph.signature.signature` for inputs and outputs.

    Args:
        graph: an empty form of the model.
        queries: several query positions (Q) instead of one.
    """
    arch = graph.arch
    declared = signature(QUERIES if queries else STEP, arch, packed=graph.packed)
    inputs = {tensor.name: graph.input(tensor) for tensor in declared.inputs}
    relative = RelativeBias(graph, bidirectional=False)
    frame = (_queries_frame if queries else _step_frame)(graph, inputs, relative.limit)
    biases: dict[str, list[ir.Value]] = {}
    stream = graph.stream(inputs["decoder_input_ids"], frame.streams)
    outputs: dict[str, ir.Value] = {}
    for layer in range(arch.decoder_layers):
        block = f"decoder.block.{layer}.layer"
        table = arch.bias_weight("decoder", layer)
        if table not in biases:
            biases[table] = _masked_biases(graph, relative, table, frame)
        past = (inputs[f"past_k_{layer}"], inputs[f"past_v_{layer}"])
        cross = (inputs[f"cross_k_{layer}"], inputs[f"cross_v_{layer}"])
        with graph.scope(f"{block}.0"):
            made = graph.project(stream, f"{block}.0.SelfAttention.qkv")
            attention = _queries_attention if queries else _step_attention
            mixed = attention(graph, frame, made, past, biases[table])
            outputs |= _new_rows(graph, frame, made, layer)
            stream = graph.add_branch(stream, mixed, f"{block}.0.SelfAttention.o")
        with graph.scope(f"{block}.1"):
            stream = _cross_attention(graph, frame, stream, f"{block}.1", cross, inputs["cross_bias"])
        with graph.scope(f"{block}.2"):
            stream = feed_forward(graph, stream, f"{block}.2")
        graph.tap(f"decoder.block.{layer}", graph.cast(stream, graph.stream_type, FLOAT))
    with graph.scope(LM_HEAD):
        (flat,) = graph.project(stream, LM_HEAD).parts
        logits = graph.reshape(flat, frame.rows, frame.queries, arch.vocab_size)
        outputs["logits"] = graph.cast(logits, graph.real, FLOAT)
    return graph.finish(outputs, declared.outputs)


def _sizes(graph: T5GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, Dim]:
    tokens, past, cross = inputs["decoder_input_ids"], inputs["past_k_0"], inputs["cross_k_0"]
    rows, queries, batch = graph.size(tokens, 0), graph.size(tokens, 1), graph.size(cross, 0)
    beams = graph.divide(graph.multiply(rows, queries), batch)
    sizes = {"rows": rows, "queries": queries, "batch": batch, "beams": beams}
    return sizes | {"cached": graph.size(past, 2), "source": graph.size(cross, 2)}


def _step_frame(graph: T5GraphBuilder, inputs: dict[str, ir.Value], limit: int) -> _Frame:
    sizes = _sizes(graph, inputs)
    slots = graph.arange(sizes["cached"])  # [T]
    position = graph.by_rows(graph.cast(inputs["position"], graph.index, INT64))  # [P, 1] (device form: (1,))
    later = graph.op("Greater", slots, position)
    return _Frame(
        single=True,
        **sizes,
        past_index=graph.clip(graph.op("Sub", position, slots), 0, limit),
        new_index=None,
        past_mask=graph.op("Where", later, graph.scalar(mask_value(graph.real)), graph.scalar(0.0)),
        new_mask=None,
        here=graph.slots_of_rows(graph.op("Equal", slots, position)),
    )


def _queries_frame(graph: T5GraphBuilder, inputs: dict[str, ir.Value], limit: int) -> _Frame:
    sizes = _sizes(graph, inputs)
    slots, queries = graph.arange(sizes["cached"]), graph.arange(sizes["queries"])  # [T], [Q]
    position = graph.cast(inputs["position"], graph.index, INT64)  # (1,)
    hide, keep = graph.scalar(mask_value(graph.real)), graph.scalar(0.0)
    column = graph.op("Unsqueeze", queries, graph.ints(1))  # [Q, 1]
    past_distance = graph.op("Sub", graph.op("Add", column, position), slots)  # [Q, T]
    new_distance = graph.op("Sub", column, queries)  # [Q, Q]
    empty = graph.scalar(empty_slot_value(graph.real))
    past_mask = graph.op("Where", graph.op("Less", slots, position), keep, empty)  # [T]
    new_mask = graph.op("Where", graph.op("Less", new_distance, graph.scalar(0, INT64)), hide, keep)  # [Q, Q]
    pads, end = inputs["key_bias"], graph.vector(sizes["cached"])
    past_pad = graph.op("Slice", pads, graph.ints(0), end, graph.ints(3))
    new_pad = graph.op("Slice", pads, end, graph.ints(2**31 - 1), graph.ints(3))
    return _Frame(
        single=False,
        **sizes,
        past_index=graph.clip(past_distance, 0, limit),
        new_index=graph.clip(new_distance, 0, limit),
        past_mask=graph.op(
            "Min", past_mask, past_pad
        ),  # not a sum, because -60000 plus a bias may leave float16's range
        new_mask=graph.op("Min", new_mask, new_pad),
        here=None,
    )


def _masked_biases(graph: T5GraphBuilder, relative: RelativeBias, table: str, frame: _Frame) -> list[ir.Value]:
    """Relative bias plus mask. A step: [P, H, 1, T] (device form: [H, T]). Several: over cached keys [R, H, Q, T], new [R, H, Q, Q]."""
    if frame.single:
        return [graph.bias_of_rows(relative.rows(table, frame.past_index), frame.past_mask)]
    assert frame.new_index is not None and frame.new_mask is not None
    biases = []
    for index, mask in ((frame.past_index, frame.past_mask), (frame.new_index, frame.new_mask)):
        rows = graph.transpose(relative.rows(table, index), 2, 0, 1)  # [H, Q, keys]
        biases.append(graph.op("Add", graph.op("Unsqueeze", rows, graph.ints(0)), mask))
    return biases


def _step_attention(
    graph: T5GraphBuilder, frame: _Frame, made: Projection, past: tuple[ir.Value, ir.Value], biases: list[ir.Value]
) -> ir.Value:
    """Self-attention of one new token for each row. Shapes are the host form's; for the device form's see `T5GraphBuilder.by_heads`."""
    assert frame.here is not None
    query, key, value = (graph.by_heads(part, frame.streams) for part in made.parts)  # [R, H, 1, D]
    cached = graph.row_scores(query, past[0], frame.streams, frame.cached)  # [R, H, 1, T]
    new = graph.op("ReduceSum", graph.op("Mul", query, key), graph.ints(3), keepdims=1)  # [R, H, 1, 1]
    weights = softmax(graph, graph.op("Add", graph.op("Where", frame.here, new, cached), biases[0]))
    zero = graph.scalar(0.0)
    new_weight = graph.op("ReduceSum", graph.op("Where", frame.here, weights, zero), graph.ints(3), keepdims=1)
    past_weights = graph.op("Where", frame.here, zero, weights)
    mixed = graph.row_mixture(past_weights, past[1], frame.streams, frame.cached)  # [R, H, 1, D]
    mixed = graph.op("Add", mixed, graph.op("Mul", new_weight, value))
    return graph.flat(mixed, frame.streams, graph.arch.num_heads * graph.arch.d_kv)


def _queries_attention(
    graph: T5GraphBuilder, frame: _Frame, made: Projection, past: tuple[ir.Value, ir.Value], biases: list[ir.Value]
) -> ir.Value:
    """Self-attention of Q new tokens for each row."""
    arch = graph.arch
    heads, width = arch.num_heads, arch.d_kv
    split = (graph.reshape(part, frame.rows, frame.queries, heads, width) for part in made.parts)
    query, key, value = (graph.transpose(part, 0, 2, 1, 3) for part in split)  # [R, H, Q, D]
    past_scores = graph.op("Add", graph.op("MatMul", query, graph.transpose(past[0], 0, 1, 3, 2)), biases[0])
    new_scores = graph.op("Add", graph.op("MatMul", query, graph.transpose(key, 0, 1, 3, 2)), biases[1])
    weights = softmax(graph, graph.op("Concat", past_scores, new_scores, axis=-1))
    end = graph.vector(frame.cached)
    past_weights = graph.op("Slice", weights, graph.ints(0), end, graph.ints(3))
    new_weights = graph.op("Slice", weights, end, graph.ints(2**31 - 1), graph.ints(3))
    mixed = graph.op("Add", graph.op("MatMul", past_weights, past[1]), graph.op("MatMul", new_weights, value))
    return graph.flat(graph.transpose(mixed, 0, 2, 1, 3), frame.streams, heads * width)


def _new_rows(graph: T5GraphBuilder, frame: _Frame, made: Projection, layer: int) -> dict[str, ir.Value]:
    """K and V of the new tokens: as they come out of the product, or in the host form [R, H, Q, D] each."""
    arch = graph.arch
    if made.packed is not None:
        width = 3 * arch.num_heads * arch.d_kv
        return {f"new_qkv_{layer}": graph.reshape(made.packed, frame.rows, frame.queries, width)}
    rows = {}
    for kind, part in zip("kv", made.parts[1:], strict=True):
        if frame.single:  # no transpose
            rows[f"new_{kind}_{layer}"] = graph.by_heads(part, frame.streams)
            continue
        split = graph.reshape(part, frame.rows, frame.queries, arch.num_heads, arch.d_kv)
        rows[f"new_{kind}_{layer}"] = graph.transpose(split, 0, 2, 1, 3)
    return rows


def _cross_attention(
    graph: T5GraphBuilder, frame: _Frame, stream: ir.Value, layer: str, cross: tuple[ir.Value, ir.Value], bias: ir.Value
) -> ir.Value:
    """Cross-attention with residual; all beams and query positions of a batch entry are queries of one product."""
    arch = graph.arch
    heads, width = arch.num_heads, arch.d_kv
    attention = f"{layer}.EncDecAttention"
    one = frame.beams == 1
    flat = graph.reshape(graph.linear(stream, f"{attention}.q"), *frame.streams, heads, width)  # [B, N*Q, H, D]
    query = flat if one else graph.transpose(flat, 0, 2, 1, 3)
    sizes = (frame.batch, heads, frame.beams)
    scores = graph.product(query, cross[0], sizes, width, frame.source, transposed=True)  # [B, H, N*Q, S]
    weights = softmax(graph, graph.op("Add", scores, bias))
    mixed = graph.product(weights, cross[1], sizes, frame.source, width)  # [B, H, N*Q, D]
    if not one:
        mixed = graph.transpose(mixed, 0, 2, 1, 3)
    return graph.add_branch(stream, graph.flat(mixed, frame.streams, heads * width), f"{attention}.o")
