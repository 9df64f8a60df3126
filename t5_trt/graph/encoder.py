"""The encoder graph (with the decoder's cross-attention K/V), and the graph that computes K/V from given states."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from t5_trt.graph.blocks import feed_forward, softmax
from t5_trt.graph.builders import FLOAT, T5GraphBuilder
from t5_trt.graph.ops import Dim
from t5_trt.graph.parameters import CROSS_KV
from t5_trt.graph.precision import mask_value
from t5_trt.graph.relative_bias import RelativeBias
from t5_trt.graph.signature import CROSS, ENCODER, ENCODER_EMBEDS, layered, signature

INT64 = ir.DataType.INT64


def build_encoder(graph: T5GraphBuilder, *, embeds: bool = False) -> ir.Model:
    """Write the encoder: see `t5_trt.graph.signature.signature` for inputs and outputs.

    Args:
        graph: an empty form of the model.
        embeds: take ``inputs_embeds`` instead of ``input_ids``.
    """
    arch = graph.arch
    declared = signature(ENCODER_EMBEDS if embeds else ENCODER, arch, packed=graph.packed)
    source, mask = (graph.input(tensor) for tensor in declared.inputs)
    batch, length = graph.size(mask, 0), graph.size(mask, 1)
    stream = graph.stream(source, (batch, length), embeds=embeds)

    hidden = graph.op("Equal", mask, graph.scalar(0, graph.index))
    hide = graph.op("Where", hidden, graph.scalar(mask_value(graph.real)), graph.scalar(0.0))
    key_bias = graph.reshape(hide, batch, 1, 1, length)
    relative = RelativeBias(graph, bidirectional=True)
    offsets = _clipped_offsets(graph, length, relative.limit)
    biases: dict[str, ir.Value] = {}
    for layer in range(arch.encoder_layers):
        prefix = f"encoder.block.{layer}"
        table = arch.bias_weight("encoder", layer)
        if table not in biases:  # [B, H, S, S], shared by all layers except in UMT5
            rows = graph.op("Unsqueeze", graph.transpose(relative.rows(table, offsets), 2, 0, 1), graph.ints(0))
            biases[table] = graph.op("Add", rows, key_bias)
        with graph.scope(f"{prefix}.layer.0"):
            stream = _self_attention(graph, stream, f"{prefix}.layer.0", (batch, length), biases[table])
        with graph.scope(f"{prefix}.layer.1"):
            stream = feed_forward(graph, stream, f"{prefix}.layer.1")
        graph.tap(prefix, graph.cast(stream, graph.stream_type, FLOAT))
    with graph.scope("encoder.final_layer_norm"):
        states = graph.rms_norm(stream, graph.parameter("encoder.final_layer_norm.weight"))
    outputs = {"encoder_hidden_states": graph.reshape(states, batch, length, arch.d_model)}
    if arch.decoder_layers:
        outputs |= _cross_projections(graph, states, (batch, length))
    return graph.finish(outputs, declared.outputs)


def build_cross(graph: T5GraphBuilder) -> ir.Model:
    """Write the graph that computes cross-attention K/V from given encoder states."""
    declared = signature(CROSS, graph.arch, packed=graph.packed)
    (states,) = (graph.input(tensor) for tensor in declared.inputs)
    outer = (graph.size(states, 0), graph.size(states, 1))
    flat = graph.flat(states, outer, graph.arch.d_model)
    return graph.finish(_cross_projections(graph, flat, outer), declared.outputs)


def _cross_projections(graph: T5GraphBuilder, states: ir.Value, outer: tuple[Dim, Dim]) -> dict[str, ir.Value]:
    """Cross-attention K and V of every decoder layer: one [L, 2, B, H, S, D], or in the host form 2 * L of [B, H, S, D]."""
    arch = graph.arch
    heads = (arch.num_heads, arch.d_kv)
    with graph.scope(CROSS_KV):
        made = graph.project(states, CROSS_KV)
        if made.packed is not None:
            split = graph.reshape(made.packed, *outer, arch.decoder_layers, 2, *heads)
            return {"cross_kv": graph.transpose(split, 2, 3, 0, 4, 1, 5)}
        names = layered("cross", arch.decoder_layers)
        parts = (graph.transpose(graph.reshape(part, *outer, *heads), 0, 2, 1, 3) for part in made.parts)
        return dict(zip(names, parts, strict=True))


def _clipped_offsets(graph: T5GraphBuilder, length: Dim, limit: int) -> ir.Value:
    """Key - query, clipped to +-limit and shifted to start at 0, for all pairs: [S, S]."""
    if isinstance(length, int):
        steps_known = np.arange(length)
        return graph.constant((steps_known[None] - steps_known[:, None]).clip(-limit, limit) + limit, INT64)
    steps = graph.arange(length)  # [S]
    offset = graph.op("Sub", graph.op("Unsqueeze", steps, graph.ints(0)), graph.op("Unsqueeze", steps, graph.ints(1)))
    return graph.op("Add", graph.clip(offset, -limit, limit), graph.scalar(limit, INT64))


def _self_attention(
    graph: T5GraphBuilder, stream: ir.Value, layer: str, outer: tuple[Dim, Dim], bias: ir.Value
) -> ir.Value:
    arch = graph.arch
    attention = f"{layer}.SelfAttention"
    query, key, value = (
        graph.transpose(graph.reshape(part, *outer, arch.num_heads, arch.d_kv), 0, 2, 1, 3)
        for part in graph.project(stream, f"{attention}.qkv").parts
    )  # [B, H, S, D]
    scores = graph.op("MatMul", query, graph.transpose(key, 0, 1, 3, 2))
    mixed = graph.op("MatMul", softmax(graph, graph.op("Add", scores, bias)), value)
    merged = graph.flat(graph.transpose(mixed, 0, 2, 1, 3), outer, arch.num_heads * arch.d_kv)
    return graph.add_branch(stream, merged, f"{attention}.o")
