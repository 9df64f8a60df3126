"""Weights that change after a model was loaded: by hand, by training, in other threads; the engines follow."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from t5_trt import (
    StrictModeError,
    TRTT5ForConditionalGeneration,
)
from tests.cases import (
    LABELS,
    exchange_head,
    load_decoder,
    scale_row,
    scale_weights,
    training_step,
    write_data_of_head,
)
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL

REQUEST = {**batch(), "max_new_tokens": 8}


def tokens(model: Any, **more: Any) -> list[list[int]]:
    return model.generate(**{**REQUEST, **more}).tolist()  # type: ignore[no-any-return]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    for parameter in hugging_face.encoder.parameters():
        parameter.requires_grad_(False)
    expected = trainable(hugging_face)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    assert 0 < len(expected) < len(list(hugging_face.parameters())) and trainable(ours) == expected
    ours.save_pretrained(tmp_path)
    ours(**batch(), labels=LABELS, output_attentions=True)
    assert trainable(ours.reference) == trainable(ours) == trainable(hugging_face) == expected


@pytest.mark.parametrize("change", [scale_weights, exchange_head, write_data_of_head, scale_row, load_decoder])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_changed_weights_are_used(own_pair: Any, monkeypatch: pytest.MonkeyPatch, engine: str, change: Any) -> None:
    hugging_face, ours = own_pair
    if engine == "stand-in":
        monkeypatch.setattr("t5_trt.modeling.runner.open_session", lambda *_, **__: stand_in_session(ours, monkeypatch))
    before = tokens(ours), tokens(ours, num_beams=3)
    assert before == (tokens(hugging_face), tokens(hugging_face, num_beams=3))
    session = ours.session
    assert ours.session is session
    for model in (hugging_face, ours):
        change(model)
    after = tokens(ours), tokens(ours, num_beams=3)
    assert after == (tokens(hugging_face), tokens(hugging_face, num_beams=3))
    assert before != after and ours.session is not session
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=LABELS).logits
        torch.testing.assert_close(
            ours(**batch(), decoder_input_ids=LABELS).logits, expected, atol=LOGITS_ATOL, rtol=1e-5
        )
        change(hugging_face), change(ours)
        states = hugging_face.get_encoder()(**batch()).last_hidden_state
        torch.testing.assert_close(ours.get_encoder()(**batch()).last_hidden_state, states, atol=LOGITS_ATOL, rtol=1e-5)


def test_generates_between_training_steps() -> None:
    """The weights of the last step, as ``Seq2SeqTrainer(predict_with_generate=True)`` wants them."""
    hugging_face = make_hugging_face("t5-v1.1", dropout_rate=0.0)
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
    seen = []
    for _ in range(3):
        assert tokens(ours) == tokens(hugging_face)
        seen.append(tokens(ours))
        training_step(hugging_face), training_step(ours)
    assert seen[0] != seen[-1]
    for name, parameter in hugging_face.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], parameter, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_fused_optimizers_are_noticed(own_pair: Any, kind: str) -> None:
    """The default of Transformers' Trainer; they change weights without counting versions."""
    before = [tokens(model) for model in own_pair]
    for model in own_pair:
        model(**batch(), labels=LABELS).loss.backward()
        getattr(torch.optim, kind)(model.parameters(), lr=0.3, fused=True).step()
    assert tokens(own_pair[1]) == tokens(own_pair[0]) != before[0] == before[1]


def test_encoder_outputs_of_another_decoder(own_pair: Any) -> None:
    """K/V that came with encoder outputs are not used after the decoder was trained, nor by another model."""
    hugging_face, ours = own_pair
    other = make_hugging_face("t5-v1.1", seed=3)
    other.encoder.load_state_dict(hugging_face.encoder.state_dict())
    theirs = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(other), num_threads=1)
    outputs = [model.get_encoder()(**batch()) for model in (hugging_face, ours)]
    request = {"attention_mask": batch()["attention_mask"], "max_new_tokens": 8}

    def made(model: Any, states: Any, **more: Any) -> list[list[int]]:
        return model.generate(encoder_outputs=copy.copy(states), **request, **more).tolist()  # type: ignore[no-any-return]

    for beams in (1, 3):
        assert made(theirs, outputs[1], num_beams=beams) == made(other, outputs[0], num_beams=beams)
    with torch.no_grad():
        for model in (hugging_face, ours):
            for parameter in model.decoder.parameters():
                parameter.mul_(1.2)
    assert made(ours, outputs[1]) == made(hugging_face, outputs[0])


def test_training_while_another_thread_generates(own_pair: Any) -> None:
    _, ours = own_pair
    streamer_waits, goes_on = threading.Event(), threading.Event()

    class Waiting:
        def put(self, value: torch.Tensor) -> None:
            streamer_waits.set()
            goes_on.wait(20)

        def end(self) -> None:
            pass

    thread = threading.Thread(
        target=tokens, args=(ours,), kwargs={"streamer": Waiting(), **{k: v[:1] for k, v in batch().items()}}
    )
    thread.start()
    streamer_waits.wait(20)
    try:
        ours.train()
        ours(**batch(), labels=LABELS).loss.backward()
        ours.eval()
        assert ours(**batch(), labels=LABELS).loss.requires_grad
    finally:
        goes_on.set()
        thread.join(20)


def test_gradients_outside_of_training_mode(own_pair: Any) -> None:
    hugging_face, ours = own_pair
    for model in own_pair:
        model(**batch(), labels=LABELS).loss.backward()
    for (name, left), right in zip(hugging_face.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, atol=1e-4, rtol=1e-3, msg=name)
    for model in own_pair:
        states = model.get_encoder()(**batch()).last_hidden_state.detach().requires_grad_()
        model(
            encoder_outputs=(states,), attention_mask=batch()["attention_mask"], decoder_input_ids=LABELS
        ).logits.sum().backward()
        assert states.grad is not None
    with torch.no_grad():
        assert not ours(**batch(), labels=LABELS).loss.requires_grad
    strict = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1, strict=True)
    with pytest.raises(StrictModeError, match=r"backward\(\)"):
        strict(**batch(), labels=LABELS).loss.backward()
    with pytest.raises(StrictModeError, match="training mode"):
        strict.train()(**batch(), labels=LABELS)


def test_dropout_without_gradients(own_pair: Any) -> None:
    """Monte Carlo dropout: training mode under no_grad."""
    _, ours = own_pair
    ours.train()
    with torch.no_grad():
        losses = {float(ours(**batch(), labels=LABELS).loss) for _ in range(3)}
    assert len(losses) == 3


def test_deleted_models_are_freed_at_once() -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1", d_model=256, d_ff=512), num_threads=1)
    for more in ({}, {"num_beams": 3}, {"decoder_input_ids": LABELS}):
        tokens(ours, **more)
    gone = [weakref.ref(ours), weakref.ref(ours.session), *map(weakref.ref, ours.session._weights.values())]
    gc.collect()
    gc.disable()
    try:
        del ours
        assert not any(kept() is not None for kept in gone)
    finally:
        gc.enable()
