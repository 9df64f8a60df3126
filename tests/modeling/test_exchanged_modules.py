"""Modules that a user exchanged, shared or resized: what the Hugging Face model serves, ours serves with equal results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from t5_trt import TRTT5EncoderModel, TRTT5ForConditionalGeneration, UnsupportedModelError
from tests.tiny_models import VOCAB, batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL, LOGITS_ATOL

LABELS = torch.tensor([[5, 6, 7]] * 3)
KINDS = ["t5-v1.0", "t5-v1.1", "mt5", "umt5"]


def pair_of(kind: str) -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind, attention="eager", dropout_rate=0.0)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


def resized(model: Any) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCAB + 13)


def shrunk(model: Any) -> None:
    model.resize_token_embeddings(VOCAB - 2)


def _embedding(rows: int) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(rows, 64)


def set_embeddings(model: Any) -> None:
    model.set_input_embeddings(_embedding(VOCAB))


def one_module_for_all(model: Any) -> None:
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared


def tied_head(model: Any) -> None:
    model.set_input_embeddings(_embedding(VOCAB))
    model.lm_head.weight = model.shared.weight


def own_head(model: Any) -> None:
    torch.manual_seed(2)
    model.set_output_embeddings(nn.Linear(64, VOCAB, bias=False))


def no_dropout(model: Any) -> None:
    model.decoder.dropout = nn.Identity()
    for module in model.modules():
        if hasattr(module, "DenseReluDense"):
            module.DenseReluDense.dropout = nn.AlphaDropout(0.0)


def torch_norms(model: Any) -> None:
    for stack in (model.encoder, model.decoder):
        norm = nn.RMSNorm(64, eps=stack.final_layer_norm.variance_epsilon)
        norm.weight = stack.final_layer_norm.weight
        stack.final_layer_norm = norm


CHANGES = [resized, shrunk, set_embeddings, one_module_for_all, tied_head, own_head, no_dropout, torch_norms]


def check_same_results(hugging_face: Any, ours: Any) -> None:
    """Tokens, logits, hidden states, and the loss with its gradients, in both modes."""
    request = {**batch(), "max_new_tokens": 6}
    for more in ({}, {"num_beams": 3}):
        assert ours.generate(**request, **more).tolist() == hugging_face.generate(**request, **more).tolist()
    with torch.no_grad():
        left, right = (
            model(**batch(), decoder_input_ids=LABELS, output_hidden_states=True) for model in (ours, hugging_face)
        )
        plain = ours(**batch(), decoder_input_ids=LABELS)
    torch.testing.assert_close(plain.logits, right.logits, atol=LOGITS_ATOL, rtol=1e-4)
    torch.testing.assert_close(left.decoder_hidden_states, right.decoder_hidden_states, atol=HIDDEN_ATOL, rtol=1e-4)
    for mode in (False, True):
        losses = []
        for model in (hugging_face, ours):
            model.train(mode).zero_grad()
            losses.append(model(**batch(), labels=LABELS).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)
        found = dict(ours.named_parameters())
        for name, parameter in hugging_face.named_parameters():
            torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
        ours.eval(), hugging_face.eval()


@pytest.mark.parametrize("warm", [True, False], ids=["after use", "before use"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_exchanged_modules_give_equal_results(change: Any, warm: bool) -> None:
    kind = KINDS[CHANGES.index(change) % len(KINDS)]
    hugging_face, ours = pair_of(kind)
    if warm:
        ours.generate(**batch(), max_new_tokens=2)
        assert ours.reference is ours.reference
    for model in (hugging_face, ours):
        change(model)
    check_same_results(hugging_face, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_trains_after_a_resize(kind: str) -> None:
    hugging_face, ours = pair_of(kind)
    for step in range(2):
        for model in (hugging_face, ours):
            resized(model) if step == 0 else None
            model.train().zero_grad()
            model(**batch(), labels=LABELS).loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            model.eval()
        assert (
            ours.generate(**batch(), max_new_tokens=6).tolist()
            == hugging_face.generate(**batch(), max_new_tokens=6).tolist()
        )


def test_encoder_model_with_other_embeddings(tmp_path: Any) -> None:
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path)
    from transformers import T5EncoderModel

    hugging_face = T5EncoderModel.from_pretrained(tmp_path).eval()
    ours = TRTT5EncoderModel.from_pretrained(tmp_path, num_threads=1)
    for model in (hugging_face, ours):
        resized(model)
        set_embeddings(model)
    with torch.no_grad():
        expected = hugging_face(**batch(), output_hidden_states=True)
        torch.testing.assert_close(ours(**batch())[0], expected[0], atol=HIDDEN_ATOL, rtol=1e-4)
        inner = ours(**batch(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(inner, expected.hidden_states, atol=HIDDEN_ATOL, rtol=1e-4)


class Doubled(nn.Embedding):
    """An embedding that computes something else."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


class Always(nn.Dropout):
    """Dropout in evaluation mode, too."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(hidden, self.p, training=True)


def _doubled(model: Any) -> None:
    model.shared = Doubled.from_pretrained(model.shared.weight.detach())


def _always(model: Any) -> None:
    model.decoder.dropout = Always(0.5)


def _activation(model: Any) -> None:
    model.encoder.block[0].layer[1].DenseReluDense.act = nn.Tanh()


def _slope(model: Any) -> None:
    model.encoder.final_layer_norm.variance_epsilon = 1e-2


def _norm(model: Any) -> None:
    model.encoder.final_layer_norm = nn.RMSNorm(64, eps=1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_doubled, r"shared got Doubled\(211, 64\); expected Embedding\(211, 64\)"),
        (_always, r"decoder.dropout got Always\(p=0.5"),
        (_activation, r"encoder.block.0.layer.1.DenseReluDense.act got Tanh.*expected NewGELUActivation"),
        (
            _slope,
            r"final_layer_norm got T5LayerNorm\(variance_epsilon=0.01\); expected T5LayerNorm\(variance_epsilon=1e-06",
        ),
        (_norm, r"encoder.final_layer_norm got RMSNorm\(\(64,\), eps=0.01"),
    ],
)
def test_modules_that_compute_something_else_are_refused(change: Any, said: str) -> None:
    _, ours = pair_of("t5-v1.1")
    change(ours)
    with pytest.raises(UnsupportedModelError, match=said):
        ours.generate(**batch(), max_new_tokens=2)


def test_hooks_on_layers_see_a_training_step() -> None:
    """Layers are shared with the Hugging Face model that serves it."""
    _, ours = pair_of("t5-v1.1")
    seen: list[tuple[int, ...]] = []
    ours.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    ours.train()(**batch(), labels=LABELS)
    assert seen == [(3, 3, VOCAB)]
