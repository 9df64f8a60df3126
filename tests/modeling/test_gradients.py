"""Gradients of what engines computed in evaluation mode, without labels: those of the Hugging Face class, or an error."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import T5EncoderModel

from t5_trt import InputError, StrictModeError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.modeling.runner import ModelRunner
from tests.tiny_models import batch, make_hugging_face

TARGET = batch(tokens=7, seed=8, padding="none")["input_ids"]


def pair_with_own_weights(kind: str = "t5-v1.1", **options: Any) -> tuple[Any, Any]:
    """A Hugging Face model, and ours over equal weights of its own."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face(kind), num_threads=1, **options)
    return make_hugging_face(kind, attention="eager"), ours


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: Any, hugging_face: Any) -> None:
    expected, got = gradients(hugging_face), gradients(ours)
    assert expected and got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def loss_on_logits(model: Any) -> torch.Tensor:
    decoder_mask = torch.ones_like(TARGET)
    decoder_mask[1, 1:3] = 0
    output = model(**batch(), decoder_input_ids=TARGET, decoder_attention_mask=decoder_mask)
    return output.logits.log_softmax(-1)[:, :, 5].mean() + output.encoder_last_hidden_state.square().mean()


def loss_on_states(model: Any) -> torch.Tensor:
    return model.encoder(**batch())[0].square().mean()  # type: ignore[no-any-return]


def loss_in_two_steps(model: Any) -> torch.Tensor:
    """The encoder's output is handed to two passes of the decoder."""
    request = batch()
    encoded = model.get_encoder()(**request)
    mask = request["attention_mask"]
    logits = [
        model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids).logits
        for ids in (TARGET, TARGET.flip(0))
    ]
    return (logits[0] - logits[1].tanh()).square().mean()


def loss_after_an_adapter(model: Any) -> torch.Tensor:
    encoded = model.get_encoder()(**batch())
    encoded.last_hidden_state = encoded.last_hidden_state * 1.5
    return model(encoder_outputs=encoded, decoder_input_ids=TARGET).logits.square().mean()  # type: ignore[no-any-return]


def loss_of_one_source_and_several_rows(model: Any) -> torch.Tensor:
    states = model.encoder(batch(rows=1)["input_ids"])[0].expand(3, -1, -1)
    return model(encoder_outputs=(states,), decoder_input_ids=TARGET).logits.square().mean()  # type: ignore[no-any-return]


def loss_with_labels_and_own_states(model: Any) -> torch.Tensor:
    return model(encoder_outputs=model.encoder(**batch()), labels=TARGET).loss  # type: ignore[no-any-return]


LOSSES = (
    loss_on_logits, loss_on_states, loss_in_two_steps, loss_after_an_adapter, loss_of_one_source_and_several_rows,
    loss_with_labels_and_own_states,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_hugging_face(kind: str, loss: Callable[[Any], torch.Tensor]) -> None:
    hugging_face, ours = pair_with_own_weights(kind)
    expected, got = loss(hugging_face), loss(ours)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    expected.backward()
    got.backward()
    assert_same_gradients(ours, hugging_face)


def test_frozen_parameters_get_no_gradients() -> None:
    hugging_face, ours = pair_with_own_weights()
    for model in (hugging_face, ours):
        model.encoder.requires_grad_(False)
        assert not model.encoder(**batch())[0].requires_grad
        model.decoder.block[0].requires_grad_(False)
        loss_on_logits(model).backward()
    assert not any(name.startswith(("encoder.", "decoder.block.0.")) for name in gradients(ours))
    assert_same_gradients(ours, hugging_face)


def test_requires_grad_equals_hugging_face() -> None:
    hugging_face, ours = pair_with_own_weights()
    for enabled, frozen in ((True, False), (False, False), (True, True)):
        for model in (hugging_face, ours):
            model.requires_grad_(not frozen)
        with torch.set_grad_enabled(enabled):
            outputs = [model(**batch(), decoder_input_ids=TARGET) for model in (hugging_face, ours)]
        for name in ("logits", "encoder_last_hidden_state"):
            expected, got = (output[name].requires_grad for output in outputs)
            assert got == expected == (enabled and not frozen), name
    with torch.inference_mode():
        assert not ours(**batch(), decoder_input_ids=TARGET).logits.requires_grad


def test_an_encoder_model_is_trained() -> None:
    hugging_face = T5EncoderModel(make_hugging_face("t5-v1.1").config).eval()
    ours = TRTT5EncoderModel.from_model(copy.deepcopy(hugging_face), num_threads=1)
    for model in (hugging_face, ours):
        model(**batch()).last_hidden_state.square().mean().backward()
    assert_same_gradients(ours, hugging_face)


def test_a_custom_loss_trains() -> None:
    """Engines see the weights after every step."""
    _, ours = pair_with_own_weights()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    losses = []
    for _step in range(4):
        optimizer.zero_grad()
        loss = ours(**batch(), decoder_input_ids=TARGET).logits.log_softmax(-1)[:, :, 5].mean().neg()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01


def test_autograd_grad_and_a_retained_graph() -> None:
    hugging_face, ours = pair_with_own_weights()
    found = []
    for model in (hugging_face, ours):
        loss = loss_on_logits(model)
        (first,) = torch.autograd.grad(loss, [model.shared.weight], retain_graph=True)
        (again,) = torch.autograd.grad(loss, [model.shared.weight])
        assert torch.equal(first, again)
        found.append(first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_the_mode_of_the_forward_pass_counts() -> None:
    """Dropout that is switched on before backward() has no effect on gradients, and stays switched on."""
    hugging_face, ours = pair_with_own_weights()
    losses = [loss_on_logits(model) for model in (hugging_face, ours)]
    for model, loss in zip((hugging_face, ours), losses, strict=True):
        model.train()
        loss.backward()
    assert_same_gradients(ours, hugging_face)
    assert all(module.training for module in ours.modules())


def test_logits_may_be_written_to() -> None:
    _, ours = pair_with_own_weights()
    logits = ours(**batch(), decoder_input_ids=TARGET).logits
    assert not logits._is_view() and logits.is_contiguous()
    logits[:, :, 3] = -100.0
    logits.div_(2.0)
    logits.logsumexp(-1).mean().backward()
    assert gradients(ours)


def test_embeddings_that_require_gradients() -> None:
    hugging_face, ours = pair_with_own_weights()
    for model in (hugging_face, ours):
        model.requires_grad_(False)
    found = []
    for model in (hugging_face, ours):
        embeds = model.shared(batch()["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeds, decoder_input_ids=TARGET).logits.square().mean().backward()
        found.append(embeds.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_given_embeddings_train_all_but_the_embedding() -> None:
    hugging_face, ours = pair_with_own_weights()
    for model in (hugging_face, ours):
        embeds = model.shared(batch()["input_ids"]).detach()
        model.encoder(inputs_embeds=embeds)[0].square().mean().backward()
    assert ours.shared.weight.grad is None
    assert_same_gradients(ours, hugging_face)


def test_inference_without_no_grad_stays_on_engines(caplog: pytest.LogCaptureFixture) -> None:
    _, ours = pair_with_own_weights()
    with caplog.at_level(logging.WARNING, "t5_trt"):
        encoded = ours.encoder(**batch())
        output = ours(encoder_outputs=encoded, decoder_input_ids=TARGET, use_cache=True)
        ours(encoder_outputs=encoded, decoder_input_ids=TARGET[:, :1], **{CACHE: output[CACHE]})
        generated = ours.generate(**batch(), max_new_tokens=4)
        assert torch.equal(
            ours.generate(encoder_outputs=encoded, attention_mask=batch()["attention_mask"], max_new_tokens=4),
            generated,
        )
    assert ours._runner._reference is None and not caplog.records


def test_inference_tensors_as_inputs() -> None:
    _, ours = pair_with_own_weights()
    with torch.inference_mode():
        request, target = batch(), TARGET.clone()
    ours(**request, decoder_input_ids=target).logits.mean().backward()
    assert gradients(ours)


def test_changed_inputs_are_noticed() -> None:
    hugging_face, ours = pair_with_own_weights()
    for model in (hugging_face, ours):
        target = TARGET.clone()
        logits = model(**batch(), decoder_input_ids=target).logits
        target[0, 0] = 5
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logits.mean().backward()


def test_changed_weights_are_noticed() -> None:
    _, ours = pair_with_own_weights()
    logits = ours(**batch(), decoder_input_ids=TARGET).logits
    with torch.no_grad():
        ours.shared.weight.mul_(2.0)
    with pytest.raises(InputError, match="weights that have changed"):
        logits.mean().backward()


def test_gradients_through_a_cache_are_refused() -> None:
    _, ours = pair_with_own_weights()
    first = ours(**batch(), decoder_input_ids=TARGET[:, :3], use_cache=True)
    second = ours(
        encoder_outputs=(first.encoder_last_hidden_state,), decoder_input_ids=TARGET[:, 3:], **{CACHE: first[CACHE]}
    )
    assert second.logits.requires_grad
    with pytest.raises(InputError, match="in a cache, which holds no graph"):
        second.logits.mean().backward()


def test_strict_models_refuse_backward() -> None:
    _, ours = pair_with_own_weights(strict=True)
    logits = ours(**batch(), decoder_input_ids=TARGET).logits
    with pytest.raises(StrictModeError, match=r"backward\(\)"):
        logits.mean().backward()


def test_models_on_a_gpu_refuse_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parameters stay on the CPU."""
    _, ours = pair_with_own_weights()
    logits = ours(**batch(), decoder_input_ids=TARGET).logits
    monkeypatch.setattr(ModelRunner, "device", property(lambda self: torch.device("cuda:0")))
    with pytest.raises(InputError, match="on cuda:0, whose gradients would not reach its parameters"):
        logits.mean().backward()
