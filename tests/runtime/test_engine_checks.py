"""The comparison of new TensorRT engines with the reference, on a stand-in engine: which engines pass and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from t5_trt import BackendError, TRTT5ForConditionalGeneration
from t5_trt.graph.signature import GRAPHS
from t5_trt.tools.verify import block_errors, verify
from tests.stand_in_tensorrt import StandInContext, stand_in_session
from tests.tiny_models import batch, make_hugging_face


def checked_session(monkeypatch: pytest.MonkeyPatch) -> Any:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, reference=ours.session)
    return ours


def test_new_engines_are_compared_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checked_session(monkeypatch)
    engines, errors = ours.session.engines, {}
    measure = engines._check
    engines._check = lambda graph, shapes: errors.setdefault((graph, shapes), measure(graph, shapes))
    hugging_face = make_hugging_face("t5-v1.1")
    request = {**batch(), "num_beams": 2, "max_new_tokens": 9, "decoder_input_ids": torch.tensor([[0, 5, 6]] * 3)}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    states = hugging_face.get_encoder()(**batch()).last_hidden_state.detach()
    ours(encoder_outputs=(states,), attention_mask=batch()["attention_mask"], decoder_input_ids=torch.tensor([[0]] * 3))
    embeds = hugging_face.shared(batch()["input_ids"]).detach()
    ours(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], decoder_input_ids=torch.tensor([[0]] * 3))
    assert {graph for graph, _ in errors} == set(GRAPHS)
    assert all(0 <= found.error < 1e-4 for found in errors.values()), errors


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("logits", "logits"),
        ("new_qkv_1", "new_[kv]_1"),
        ("cross_kv", r"cross_[kv]_\d"),
        ("encoder_hidden_states", "encoder_hidden_states"),
    ],
)
def test_engine_that_mixes_up_rows_is_refused(monkeypatch: pytest.MonkeyPatch, output: str, named: str) -> None:
    """TensorRT 8.5 built such engines: the first row right, the others each other's."""
    right = StandInContext.run

    def wrong(self: Any) -> None:
        right(self)
        for node, is_input in self.engine.io:
            if node.name == output and not is_input:
                rows = self.memory(node, tuple(node.shape)).reshape(-1, node.shape[-1])
                rows[1:] = rows[1:][::-1].copy()

    monkeypatch.setattr(StandInContext, "run", wrong)
    ours = checked_session(monkeypatch)
    with pytest.raises(BackendError, match=rf"computes wrong values: \w+ B4 .* in {named} .*check_engines=False"):
        ours.generate(**batch(), max_new_tokens=5)
    assert len(ours.session.stand_in.discarded) == 1
    monkeypatch.setattr(StandInContext, "run", right)
    expected = make_hugging_face("t5-v1.1").generate(**batch(), max_new_tokens=5)
    assert ours.generate(**batch(), max_new_tokens=5).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("value", "named"), [(np.inf, "inf in logits against"), (np.nan, r"inf in logits \(NaN\) against")]
)
def test_engine_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch, value: float, named: str) -> None:
    """NaN is told from infinity: it has other causes."""
    right = StandInContext.run

    def wrong(self: Any) -> None:
        right(self)
        for node, is_input in self.engine.io:
            if node.name == "logits" and not is_input:
                self.memory(node, tuple(node.shape))[0, :5] = value

    monkeypatch.setattr(StandInContext, "run", wrong)
    with pytest.raises(BackendError, match=named):
        checked_session(monkeypatch).generate(**batch(), max_new_tokens=5)


def test_error_after_every_block(make_pair: Any) -> None:
    """Through the tapped engines, and with a fault in one block the table points at it."""
    _, ours = make_pair("t5-v1.1")
    tokens = torch.tensor([[0, 4, 5, 6]] * 3)
    errors = block_errors(ours, batch(), tokens)
    assert [e.name for e in errors] == ["encoder.block.0", "encoder output", "decoder.block.0", "logits"]
    assert all(e.relative_error < 1e-5 and e.max_error < 1e-3 for e in errors)
    assert verify(ours, [batch(), batch(1, 30)], max_new_tokens=9, num_beams=2).equal == 4
    wrong = ours.session.engines.weights["decoder.block.0.layer.2.DenseReluDense.wo"]
    wrong[3] += 0.5
    errors = block_errors(ours, batch(), tokens)
    assert [e.relative_error > 1e-4 for e in errors] == [False, False, True, True]
    found = verify(ours, [batch()], max_new_tokens=9)
    assert found.equal < 3 and found.first_difference is not None and found.max_logit_error > 0.01
