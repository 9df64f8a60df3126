"""``torch.compile`` of the model, of its parts and of what contains it: equal results, with a graph break where engines run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel

from t5_trt import TRTT5EncoderModel, TRTT5ForConditionalGeneration
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL, LOGITS_ATOL

LABELS = torch.tensor([[5, 6, 7]] * 3)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair_of(kind: str = "t5-v1.1") -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind, dropout_rate=0.0)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


def whole(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def forward_exchanged(model: Any, backend: str) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def in_place(model: Any, backend: str) -> Any:
    model.compile(backend=backend)
    return model


def by_generate(model: Any, backend: str) -> Any:
    model.generate = torch.compile(model.generate, backend=backend)
    return model


def encoder_in_place(model: Any, backend: str) -> Any:
    model.encoder.compile(backend=backend)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", [whole, forward_exchanged, in_place, by_generate, encoder_in_place])
def test_compiled_models_give_equal_results(way: Callable[..., Any], backend: str) -> None:
    hugging_face, ours = pair_of()
    compiled = way(ours, backend)
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=LABELS)
        out = compiled(**batch(), decoder_input_ids=LABELS)
        torch.testing.assert_close(out.logits, expected.logits, atol=LOGITS_ATOL, rtol=1e-4)
    for more in ({}, {"num_beams": 3}):
        request = {**batch(), "max_new_tokens": 6, **more}
        assert compiled.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    for model in (hugging_face, compiled):
        model(**batch(), labels=LABELS).loss.backward()
    torch.testing.assert_close(ours.shared.weight.grad, hugging_face.shared.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
def test_first_call_of_every_family_can_be_a_compiled_one(kind: str) -> None:
    hugging_face, ours = pair_of(kind)
    request = {**batch(), "max_new_tokens": 4}
    assert (
        torch.compile(ours.generate, backend="eager")(**request).tolist() == hugging_face.generate(**request).tolist()
    )


def test_inside_of_a_compiled_module(tmp_path: Any) -> None:
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path)
    dense = nn.Linear(64, 8)

    class Sentence(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.dense = inner, dense

        def forward(self, **inputs: Any) -> torch.Tensor:
            encoded: torch.Tensor = self.dense(self.inner(**inputs).last_hidden_state.mean(1))
            return encoded

    hugging_face = Sentence(T5EncoderModel.from_pretrained(tmp_path).eval())
    ours = torch.compile(Sentence(TRTT5EncoderModel.from_pretrained(tmp_path, num_threads=1)), backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(**batch()), hugging_face(**batch()), atol=HIDDEN_ATOL, rtol=1e-4)


def test_compiled_models_can_be_copied() -> None:
    _, ours = pair_of()
    ours.compile(backend="eager")
    expected = ours.generate(**batch(), max_new_tokens=4).tolist()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.generate(**batch(), max_new_tokens=4).tolist() == expected
