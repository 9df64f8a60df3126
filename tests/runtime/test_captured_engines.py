"""CUDA graphs of TensorRT's encoder and decoder step, on a stand-in engine: what is captured, and requests where that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import BackendError
from t5_trt.compat import CACHE
from t5_trt.runtime import cuda_graph, device_weights, engine_step, tensorrt_encoder
from t5_trt.runtime.cuda_graph import CaptureError
from tests.tiny_models import batch
from tests.tolerances import LOGITS_ATOL


def test_step_that_cannot_be_captured_runs_uncaptured(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs kernel by kernel then."""
    hugging_face, ours = make_pair("t5-v1.1")

    def refuse(work: Any, device: torch.device, memory: Any) -> Any:
        work()
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine_step, "capture", refuse)
    for arguments in ({}, {"num_beams": 2}, {}):
        request = {**batch(), "max_new_tokens": 9, **arguments}
        assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    assert caplog.text.count("the decoder step is not captured") == 2
    assert caplog.text.count("the token selection is not captured") == 2


def test_memory_that_runs_out_while_weights_are_loaded(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured before does not read weights that were given back; the next request works."""
    hugging_face, ours = make_pair("t5-v1.1")
    held = ours(**batch(1), decoder_input_ids=torch.zeros(1, 1, dtype=torch.long))
    real = device_weights.materialize

    def full(parameter: Any, *arguments: Any) -> torch.Tensor:
        if any("decoder.block.1.layer.2" in part for part in parameter.parts):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(parameter, *arguments)

    ours.session.engines.weights._made.clear()
    monkeypatch.setattr(device_weights, "materialize", full)
    monkeypatch.setattr(cuda_graph, "free_unused", lambda: None)
    request = {**batch(), "max_new_tokens": 5}
    with pytest.raises(BackendError, match=r"GPU memory ran out \(the weights take 0.00 GB as float32"):
        ours.generate(**request)
    assert not ours.session._encoders._captured and not ours.session.engines.weights._made
    monkeypatch.setattr(device_weights, "materialize", real)
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    step = {"attention_mask": batch(1)["attention_mask"], "decoder_input_ids": torch.tensor([[7]])}
    with torch.no_grad():
        expected = hugging_face(**batch(1), decoder_input_ids=torch.tensor([[0, 7]])).logits[:, 1:]
    states = (held.encoder_last_hidden_state,)
    got = ours(encoder_outputs=states, **step, **{CACHE: held[CACHE]}).logits
    torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=0)


def encoded(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of tokens that a mask shows, one after the other."""
    with torch.no_grad():
        states = model.get_encoder()(**inputs).last_hidden_state
    return states[inputs["attention_mask"].bool()]


def test_encoders_are_captured_for_short_sources(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each bucket; nothing of a longer source is left to a shorter one, and results stay what they were."""
    hugging_face, ours = make_pair("t5-v1.1")
    captured, capture = [], tensorrt_encoder.capture
    monkeypatch.setattr(tensorrt_encoder, "capture", lambda *args: captured.append(1) or capture(*args))
    sources = [batch(4, 30), batch(3, 11, padding="none"), batch(4, 17, seed=1), batch(1, 5), batch(4, 300)]
    results = [encoded(ours, inputs) for inputs in sources]
    assert len(captured) == 2  # [4, 32] and [1, 32]; [4, 512] is too long
    for inputs, result in zip(sources, results, strict=True):
        torch.testing.assert_close(result, encoded(hugging_face, inputs), atol=LOGITS_ATOL, rtol=0)
    embeds = {
        "inputs_embeds": torch.randn(2, 9, hugging_face.config.d_model),
        "attention_mask": batch(2, 9)["attention_mask"],
    }
    torch.testing.assert_close(encoded(ours, embeds), encoded(hugging_face, embeds), atol=LOGITS_ATOL, rtol=0)


def test_few_captured_encoders_are_kept(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_encoder, "TOKENS_KEPT", 160)  # [1, 32] and [4, 32], not [2, 32] as well
    hugging_face, ours = make_pair("t5-v1.0")
    for rows in (1, 2, 3, 1):
        inputs = batch(rows)
        torch.testing.assert_close(encoded(ours, inputs), encoded(hugging_face, inputs), atol=LOGITS_ATOL, rtol=0)
    assert [shapes.B for _, shapes in ours.session._encoders._captured] == [4, 1]


def test_encoder_that_cannot_be_captured_runs_uncaptured(
    make_pair: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs kernel by kernel then, and recording it is not tried again; without memory it is an error of ours."""
    hugging_face, ours = make_pair("t5-v1.1")
    tries = []

    def refuse(*args: Any) -> Any:
        tries.append(1)
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tensorrt_encoder, "capture", refuse)
    for _ in range(2):
        torch.testing.assert_close(encoded(ours, batch()), encoded(hugging_face, batch()), atol=LOGITS_ATOL, rtol=0)
    assert len(tries) == 1 and caplog.text.count("the encoder is not captured") == 1

    def full(*args: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tensorrt_encoder, "capture", full)
    monkeypatch.setattr(cuda_graph, "free_unused", lambda: None)
    with pytest.raises(BackendError, match="GPU memory ran out"):
        encoded(ours, batch(1))
