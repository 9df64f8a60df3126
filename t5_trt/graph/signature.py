"""Names, dtypes and axes of every input and output of the ONNX graphs, written once for graphs, sessions and tests.

Axes, here and everywhere: B batch, N beams per row, R = B * N decoder rows, S source length, Q query positions,
T cache length, P positions, H heads, D = d_kv, E = d_model, V vocabulary. A dynamic axis is its letter, a fixed one its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from t5_trt.graph.architecture import Architecture

#: part of every engine's cache key: raise it when a change in `t5_trt.graph` changes a graph's computation or names
GRAPH_REVISION = 9

INDEX = "index"  # token ids, positions and masks: int64 (int32 for TensorRT 8)
REAL = "real"  # the compute type of the engine: float32, float16 or bfloat16
SINGLE = "single"  # always float32

#: in a node's name: its arithmetic stays in float32 whatever the engine's precision
WIDE_MARK = "fp32:"

ENCODER = "encoder"
ENCODER_EMBEDS = "encoder_embeds"
CROSS = "cross"
STEP = "decoder_step"
QUERIES = "decoder_queries"
#: every graph: the encoder on ids, the encoder on embeddings, cross K/V of given encoder states, the decoder with one
#: query position, the decoder with several
GRAPHS = (ENCODER, ENCODER_EMBEDS, CROSS, STEP, QUERIES)


@dataclass(frozen=True)
class Tensor:
    """One input or output: its name, dtype kind (`INDEX`, `REAL` or `SINGLE`) and axes."""

    name: str
    kind: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one graph, in order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def layered(prefix: str, layers: int) -> list[str]:
    """Names of a per-layer K and V pair: ``prefix_k_0, prefix_v_0, prefix_k_1, ...``."""
    return [f"{prefix}_{kind}_{layer}" for layer in range(layers) for kind in "kv"]


def signature(graph: str, arch: Architecture, *, packed: bool = False, in_place: bool = False) -> Signature:
    """The signature of one of `GRAPHS` for a model.

    encoder:          input_ids [B,S], attention_mask [B,S] -> encoder_hidden_states [B,S,E], cross_{k,v}_l [B,H,S,D]
    encoder_embeds:   the same with inputs_embeds [B,S,E] in place of input_ids
    cross:            encoder_hidden_states [B,S,E] -> cross_{k,v}_l [B,H,S,D]
    decoder_step:     decoder_input_ids [R,1], position [P], cross_bias [B,1,1,S], past_{k,v}_l [R,H,T,D],
                      cross_{k,v}_l [B,H,S,D] -> logits [R,1,V], new_{k,v}_l [R,H,1,D]
    decoder_queries:  the same with Q query positions, position [1] and, besides, key_bias [R,1,1,K], K = T + Q (padding of the
                      decoder's own keys, cached ones first)

    The device form is `packed`: cross_kv [L,2,B,H,S,D] stands for all cross_{k,v}_l that leave an encoder, and
    new_qkv_l [R,Q,3*H*D] (q, k and v of each new token side by side) for new_{k,v}_l.

    A decoder_step in ONNX Runtime's fused operators writes `in_place`: present_{k,v}_l [R,H,T,D], bound to the memory of
    past_{k,v}_l, stands for new_{k,v}_l.

    An encoder without a decoder makes no cross K/V. ``position`` is the number of tokens already in the cache; cached entries from
    there on are ignored. P is 1, for all rows, or R, for each of them; the device form takes one. The biases are added to
    attention scores: 0 keeps a key, `t5_trt.graph.precision.mask_value` (-30000 in float16, else -1e30) hides it.
    """
    heads, width, size, layers = arch.num_heads, arch.d_kv, arch.d_model, arch.decoder_layers
    cross = tuple(Tensor(name, REAL, ("B", heads, "S", width)) for name in layered("cross", layers))
    made = (Tensor("cross_kv", REAL, (layers, 2, "B", heads, "S", width)),) if packed and layers else cross
    hidden = Tensor("encoder_hidden_states", REAL, ("B", "S", size))
    mask = Tensor("attention_mask", INDEX, ("B", "S"))
    if graph == ENCODER:
        return Signature((Tensor("input_ids", INDEX, ("B", "S")), mask), (hidden, *made))
    if graph == ENCODER_EMBEDS:
        embeds = Tensor("inputs_embeds", REAL, ("B", "S", size))
        return Signature((embeds, mask), (hidden, *made))
    if graph == CROSS:
        return Signature((hidden,), made)
    queries: str | int = 1 if graph == STEP else "Q"
    past = tuple(Tensor(name, REAL, ("R", heads, "T", width)) for name in layered("past", layers))
    new = tuple(Tensor(name, REAL, ("R", heads, queries, width)) for name in layered("new", layers))
    if in_place:
        new = tuple(Tensor(name, REAL, ("R", heads, "T", width)) for name in layered("present", layers))
    if packed:
        new = tuple(Tensor(f"new_qkv_{layer}", REAL, ("R", queries, 3 * heads * width)) for layer in range(layers))
    inputs = [
        Tensor("decoder_input_ids", INDEX, ("R", queries)),
        Tensor("position", INDEX, ("P" if graph == STEP and not packed else 1,)),
        Tensor("cross_bias", REAL, ("B", 1, 1, "S")),
    ]
    if graph == QUERIES:
        inputs.append(Tensor("key_bias", REAL, ("R", 1, 1, "K")))
    logits = Tensor("logits", SINGLE, ("R", queries, arch.vocab_size))
    return Signature((*inputs, *past, *cross), (logits, *new))
