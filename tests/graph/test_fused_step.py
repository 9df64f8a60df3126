"""The decoder step in ONNX Runtime's fused operators: equal to the plain form, in few operators."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.graph.build_graph import build_host_graph
from t5_trt.graph.fused_step import can_fuse
from t5_trt.graph.int8 import quantize
from t5_trt.graph.signature import STEP
from t5_trt.runtime import onnxruntime_session
from t5_trt.runtime.kv_buffers import DecoderState
from t5_trt.runtime.onnxruntime_session import OrtSession
from tests.row_cases import LENGTHS, Alone, step
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face


def of_kind(kind: str, **settings: Any) -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind, **settings)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


def sessions(ours: Any, monkeypatch: pytest.MonkeyPatch, *, int8: bool) -> tuple[OrtSession, OrtSession]:
    """The fused step and the plain one over the same weights."""
    arch, weights = ours.architecture, ours.state_dict()
    made = dict(quantize(arch, weights)) if int8 else None
    fused = OrtSession(arch, weights, num_threads=1, quantized=made)
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime_session, "can_fuse", lambda arch: False)
        return fused, OrtSession(arch, weights, num_threads=1, quantized=made)


def start(session: OrtSession, beams: int, prompt: torch.Tensor) -> DecoderState:
    """A cache of two sources, one of them padded, that holds a prompt."""
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    _, cross = session.encode(ids, None, mask)
    state = session.start(cross.for_beams(beams), 8, mask)
    session.decode(state, prompt)
    return state


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_equal_those_of_the_plain_form(
    kind: str, beams: int, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = of_kind(kind)
    both = sessions(ours, monkeypatch, int8=int8)
    tokens = torch.randint(2, VOCAB, (2 * beams, 70), generator=torch.Generator().manual_seed(0))
    states = [start(session, beams, tokens[:, :3]) for session in both]
    parents = (torch.arange(beams).roll(1)[None] + torch.arange(2)[:, None] * beams).flatten()
    for place in range(3, 70):  # past the first 64 slots of the cache
        found, expected = (
            session.decode(state, tokens[:, place : place + 1]) for session, state in zip(both, states, strict=True)
        )
        # in 8 bits a difference in the last bit becomes one of a rounding step
        assert float((found - expected).norm()) <= (0.03 if int8 else 1e-5) * float(expected.norm())
        if place % 7 == 0:
            for state in states:
                state.reorder(parents)
    assert states[0].length == states[1].length == 70
    if not int8:
        kept = [state.kv[..., :70, :] for state in states]
        torch.testing.assert_close(*kept, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5-v1.0", "umt5"])
@torch.no_grad()
def test_rows_at_positions_of_their_own_in_the_plain_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form's rows are compared in ``tests/runtime/test_row_positions.py``; here both forms meet."""
    _, ours = of_kind(kind)
    fused, plain = sessions(ours, monkeypatch, int8=False)
    for of_rows, alone in ((plain, fused), (fused, plain)):
        rows, inside = of_rows.row_buffers(3), []
        for seed, length in enumerate(LENGTHS[:3]):
            inside.append(Alone(alone, length, seed))
            inside[-1].enter(rows)
            for _ in range(3):
                step(of_rows, rows, inside)


@torch.no_grad()
def test_heads_that_the_operators_refuse_take_the_plain_form() -> None:
    hugging_face, ours = of_kind("t5-v1.1", d_kv=12)
    assert not can_fuse(ours.architecture)
    for settings in ({}, {"num_beams": 3}):
        expected = hugging_face.generate(**batch(), max_new_tokens=9, **settings)
        assert torch.equal(ours.generate(**batch(), max_new_tokens=9, **settings), expected)


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1"])
def test_a_layer_takes_few_operators(kind: str, int8: bool) -> None:
    _, ours = of_kind(kind)
    arch, weights = ours.architecture, ours.state_dict()
    made = dict(quantize(arch, weights)) if int8 else None
    model = build_host_graph(STEP, arch, weights, ir.DataType.FLOAT, quantized=made, fused=True)
    layers, count = arch.decoder_layers, Counter(node.op_type for node in model.graph)
    assert count["GroupQueryAttention"] == count["MultiHeadAttention"] == layers
    assert count["SkipSimplifiedLayerNormalization"] == 3 * layers
    products = "DynamicQuantizeMatMul" if int8 else "Gemm"
    of_a_layer = 6 if int8 else 9 if arch.gated else 8  # q, k and v are one product in 8 bits
    assert count[products] == of_a_layer * layers + 1
    inside_of_activations = 0 if arch.activation == "relu" else 12
    assert count.total() <= layers * (of_a_layer + 13 + inside_of_activations) + 40
