"""The decoder step for ONNX Runtime on a CPU, in its fused operators; `t5_trt.graph.decoder` has the plain form of the same step.

GroupQueryAttention writes the new K and V into the cache itself and reads no further than each row's position, so its present K/V
must be bound to the memory of the past ones. MultiHeadAttention is the cross-attention, with beams as query positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.blocks import activated
from t5_trt.graph.builders import CONTRIB, HostGraphBuilder
from t5_trt.graph.ops import Dim
from t5_trt.graph.parameters import LM_HEAD
from t5_trt.graph.relative_bias import RelativeBias
from t5_trt.graph.signature import STEP, signature

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


def can_fuse(arch: Architecture) -> bool:
    """Whether ONNX Runtime's fused operators take a model: GroupQueryAttention wants heads of a multiple of 8 columns."""
    return arch.d_kv % 8 == 0 and not arch.wide_stream


@dataclass(frozen=True)
class _Frame:
    """What all layers share."""

    rows: Dim  # R
    batch: Dim  # B
    positions: ir.Value  # int32 [R]: tokens in the cache of each row
    room: ir.Value  # int32 [1]: T
    cross_bias: ir.Value  # [B, H, N, S]


def build_fused_step(graph: HostGraphBuilder) -> ir.Model:
    """Write the step; see `t5_trt.graph.signature.signature` for inputs and outputs.

    Args:
        graph: an empty form of a model that `can_fuse` allows.
    """
    arch = graph.arch
    declared = signature(STEP, arch, in_place=True)
    inputs = {tensor.name: graph.input(tensor) for tensor in declared.inputs}
    frame = _frame(graph, inputs)
    relative = RelativeBias(graph, bidirectional=False)
    distances = _distances(graph, inputs, relative.limit)
    biases: dict[str, ir.Value] = {}
    stream = graph.stream(inputs["decoder_input_ids"], (frame.rows, 1))  # [R, E]
    branch: ir.Value | None = None
    outputs: dict[str, ir.Value] = {}
    for layer in range(arch.decoder_layers):
        block = f"decoder.block.{layer}.layer"
        table = arch.bias_weight("decoder", layer)
        if table not in biases:
            rows = graph.transpose(relative.rows(table, distances), 0, 2, 1)  # [P, H, T]
            biases[table] = graph.op("Unsqueeze", rows, graph.ints(2))
        with graph.scope(f"{block}.0"):
            group = f"{block}.0.SelfAttention.qkv"
            normed, stream = _add_and_norm(graph, stream, branch, group)
            past = (inputs[f"past_k_{layer}"], inputs[f"past_v_{layer}"])
            mixed, *present = _self_attention(
                graph, frame, graph.products(normed, group, together=True), past, biases[table]
            )
            outputs |= {f"present_{kind}_{layer}": value for kind, value in zip("kv", present, strict=True)}
            (branch,) = graph.products(mixed, f"{block}.0.SelfAttention.o")
        with graph.scope(f"{block}.1"):
            normed, stream = _add_and_norm(graph, stream, branch, f"{block}.1.EncDecAttention.q")
            cross = (inputs[f"cross_k_{layer}"], inputs[f"cross_v_{layer}"])
            branch = _cross_attention(graph, frame, normed, f"{block}.1.EncDecAttention", cross)
        with graph.scope(f"{block}.2"):
            dense = f"{block}.2.DenseReluDense"
            normed, stream = _add_and_norm(graph, stream, branch, f"{dense}.wi")
            inner = activated(graph, graph.products(normed, f"{dense}.wi"))
            (branch,) = graph.products(inner, f"{dense}.wo")
    with graph.scope(LM_HEAD):
        normed, _ = _add_and_norm(graph, stream, branch, LM_HEAD)
        (logits,) = graph.products(normed, LM_HEAD)
        outputs["logits"] = graph.reshape(logits, -1, 1, arch.vocab_size)
    return graph.finish(outputs, declared.outputs)


def _frame(graph: HostGraphBuilder, inputs: dict[str, ir.Value]) -> _Frame:
    tokens, bias = inputs["decoder_input_ids"], inputs["cross_bias"]
    rows, batch = graph.size(tokens, 0), graph.size(bias, 0)
    beams = graph.divide(rows, batch)
    positions = graph.op("Expand", graph.cast(inputs["position"], graph.index, INT32), graph.vector(rows))
    return _Frame(
        rows=rows,
        batch=batch,
        positions=positions,
        room=graph.cast(graph.vector(graph.size(inputs["past_k_0"], 2)), INT64, INT32),
        # a bias that is broadcast over heads but not over the batch is misread by some releases
        cross_bias=graph.op("Expand", bias, graph.vector(1, graph.arch.num_heads, beams, 1)),
    )


def _distances(graph: HostGraphBuilder, inputs: dict[str, ir.Value], limit: int) -> ir.Value:
    """Clipped distances from each position to each cache entry, [P, T]; those of later entries are not used."""
    slots = graph.arange(graph.size(inputs["past_k_0"], 2))
    position = graph.op("Unsqueeze", graph.cast(inputs["position"], graph.index, INT64), graph.ints(1))
    return graph.clip(graph.op("Sub", position, slots), 0, limit)


def _add_and_norm(
    graph: HostGraphBuilder, stream: ir.Value, branch: ir.Value | None, group: str
) -> tuple[ir.Value, ir.Value]:
    """Add a layer's output to the stream, and apply the norm and scale before a group of matrices; give both results."""
    parameter = graph.groups[group]
    assert parameter.norm is not None
    weight = graph.parameter(parameter.norm)
    if branch is None:
        normed = graph.rms_norm(stream, weight)
    else:  # the second and third outputs are not computed on a CPU
        normed, _, _, stream = graph.foreign(
            CONTRIB, "SkipSimplifiedLayerNormalization", 4, stream, branch, weight, epsilon=graph.arch.epsilon
        )
    if parameter.scale != 1.0:
        normed = graph.op("Mul", normed, graph.scalar(parameter.scale))
    return normed, stream


def _self_attention(
    graph: HostGraphBuilder, frame: _Frame, made: Sequence[ir.Value], past: tuple[ir.Value, ir.Value], bias: ir.Value
) -> Sequence[ir.Value]:
    """Self-attention of one token for each row: [R, H * D], and the cache's K and V with the new token in them.

    Args:
        graph: to add the node to.
        frame: of the step.
        made: q, k and v, [R, H * D] each, or all of them side by side as one value.
        past: K and V, [R, H, T, D].
        bias: relative bias, [P, H, 1, T].
    """
    heads, width = graph.arch.num_heads, graph.arch.num_heads * graph.arch.d_kv
    if len(made) == 3:
        query, key, value = (graph.reshape(part, -1, 1, width) for part in made)
    else:
        query, key, value = graph.reshape(made[0], -1, 1, 3 * width), None, None
    unused = (None, None, None)  # rotary embeddings
    mixed, *present = graph.foreign(
        CONTRIB,
        "GroupQueryAttention",
        3,
        *(query, key, value, *past, frame.positions, frame.room, *unused, bias),
        num_heads=heads,
        kv_num_heads=heads,
        scale=1.0,
    )
    return graph.reshape(mixed, -1, width), *present


def _cross_attention(
    graph: HostGraphBuilder, frame: _Frame, normed: ir.Value, attention: str, cross: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """Cross-attention without norm and residual, [R, E]; beams are the query positions of a batch entry."""
    heads, width = graph.arch.num_heads, graph.arch.num_heads * graph.arch.d_kv
    (query,) = graph.products(normed, f"{attention}.q")
    (mixed,) = graph.foreign(
        CONTRIB,
        "MultiHeadAttention",
        1,
        *(graph.reshape(query, frame.batch, -1, width), *cross, None, None, frame.cross_bias),
        num_heads=heads,
        scale=1.0,
    )
    (branch,) = graph.products(graph.reshape(mixed, -1, width), f"{attention}.o")
    return branch
