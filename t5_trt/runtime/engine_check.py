"""Checks a newly built engine: one run on random inputs, compared with ONNX Runtime on the CPU.

TensorRT has silently built engines that mix up the rows of a batch (docs/performance.md; NVIDIA/TensorRT issues 2808, 3689,
4853 are of the same kind). Such an engine must not reach a user, so every engine is checked once, when it is built. The rows
of a batch do not depend on each other, so comparing three of them is enough and costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from t5_trt.engine.profiles import Shapes
from t5_trt.graph.signature import CROSS, ENCODER, ENCODER_EMBEDS, QUERIES, layered
from t5_trt.runtime.kv_buffers import CrossStates
from t5_trt.runtime.session import Session

#: largest relative error (L2 over a row) that counts as rounding; a wrong row has about 1
LIMITS = {"fp32": 5e-3, "tf32": 0.05, "fp16": 0.1, "bf16": 0.3, "int8": 0.3}


class Deviation(NamedTuple):
    """Relative L2 error of the worst row of an output; infinite if a value is not finite."""

    error: float
    output: str


def worst_deviation(session: Session, reference: Session, graph: str, shapes: Shapes, seed: int = 0) -> Deviation:
    """Run one engine of a session at its full shapes and compare three batch entries with another session.

    Args:
        session: under test.
        reference: of the same weights, on the CPU in float32.
        graph: one of `t5_trt.graph.signature.GRAPHS`.
        shapes: of the engine.
        seed: of the random inputs.

    Returns:
        The deviation of the worst output.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = torch.tensor(sorted({0, shapes.B // 2, shapes.B - 1}))
    check = _encoder if graph in (ENCODER, ENCODER_EMBEDS, CROSS) else _decoder
    found = []
    for name, got, expected in check(session, reference, graph, shapes, entries, generator):
        got, expected = got.float().cpu().flatten(1), expected.flatten(1)
        error = (got - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)
        kind = " (NaN)" if got.isnan().any() else ""
        found.append(Deviation(float(error.masked_fill(error.isnan(), torch.inf).max()), name + kind))
    return max(found, key=lambda each: each.error)


Compared = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


def _encoder(
    session: Session,
    reference: Session,
    graph: str,
    shapes: Shapes,
    entries: torch.Tensor,
    generator: torch.Generator,
) -> Compared:
    arch = session.arch
    ids = torch.randint(0, arch.vocab_size, (shapes.B, shapes.S), generator=generator)
    embeds = torch.randn(shapes.B, shapes.S, arch.d_model, generator=generator)
    lengths = torch.randint(1, shapes.S + 1, (shapes.B,), generator=generator)
    mask = (torch.arange(shapes.S) < lengths[:, None]).long()  # every row has padding of its own
    keep = mask[entries, :, None]

    def run(on: Session, rows: torch.Tensor) -> tuple[torch.Tensor, CrossStates]:
        if graph == CROSS:
            states = embeds[rows].to(on.device, on.dtype)
            return states, on.project_cross(states)
        if graph == ENCODER:
            return on.encode(ids[rows].to(on.device), None, mask[rows].to(on.device))
        return on.encode(None, embeds[rows].to(on.device), mask[rows].to(on.device))

    hidden, cross = run(session, torch.arange(shapes.B))
    expected, expected_cross = run(reference, entries)
    yield (
        "encoder_hidden_states",
        hidden[entries.to(hidden.device)] * keep.to(hidden.device, hidden.dtype),
        expected * keep,
    )
    hide = keep[:, None]  # [entries, 1, S, 1]
    for name, got, wanted in _by_layer("cross", cross.kv, expected_cross.kv):
        yield name, got[entries.to(got.device)].cpu() * hide, wanted * hide


def _decoder(
    session: Session,
    reference: Session,
    graph: str,
    shapes: Shapes,
    entries: torch.Tensor,
    generator: torch.Generator,
) -> Compared:
    arch = session.arch
    count = shapes.Q if graph == QUERIES else 1
    length = max((shapes.T - count) // 2, 0)
    kv_shape = (arch.decoder_layers, 2, shapes.B * shapes.N, arch.num_heads, length, arch.d_kv)
    cross_shape = (arch.decoder_layers, 2, shapes.B, arch.num_heads, shapes.S, arch.d_kv)
    kv = 0.5 * torch.randn(kv_shape, generator=generator)
    cross_kv = 0.5 * torch.randn(cross_shape, generator=generator)
    tokens = torch.randint(0, arch.vocab_size, (shapes.B * shapes.N, count), generator=generator)
    lengths = torch.randint(1, shapes.S + 1, (shapes.B,), generator=generator)
    mask = (torch.arange(shapes.S) < lengths[:, None]).long()

    def run(on: Session, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        beams = (rows[:, None] * shapes.N + torch.arange(shapes.N)).flatten()
        cross = CrossStates(cross_kv[:, :, rows].to(on.device, on.dtype), shapes.N)
        state = on.start(cross, shapes.T)
        state.hide_keys(on.cross_bias(mask[rows].to(on.device), cross))
        state.append(kv[:, :, beams].to(on.device, on.dtype))
        key_mask = torch.ones((len(beams), length + count), dtype=torch.long, device=on.device)
        logits = on.decode(state, tokens[beams].to(on.device), key_mask if graph == QUERIES else None)
        return logits, state.kv[:, :, : len(beams), :, length : length + count]

    logits, new = run(session, torch.arange(shapes.B))
    expected, expected_new = run(reference, entries)
    beams = (entries[:, None] * shapes.N + torch.arange(shapes.N)).flatten().to(logits.device)
    yield "logits", logits[beams], expected
    for name, got, wanted in _by_layer("new", new, expected_new):
        yield name, got[beams], wanted


def _by_layer(prefix: str, got: torch.Tensor, wanted: torch.Tensor) -> Compared:
    """K and V of each layer, out of [L, 2, ..], with their names in graphs."""
    yield from zip(layered(prefix, len(got)), got.flatten(0, 1), wanted.flatten(0, 1), strict=True)
