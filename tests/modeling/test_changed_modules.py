"""Modules, settings and code that users exchange in a model, and classes derived from ours."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from t5_trt import (
    InputError,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    UnsupportedModelError,
    compare,
)
from tests.cases import (
    LABELS,
)
from tests.tiny_models import batch, make_hugging_face

REQUEST = {**batch(), "max_new_tokens": 8}


def tokens(model: Any, **more: Any) -> list[list[int]]:
    return model.generate(**{**REQUEST, **more}).tolist()  # type: ignore[no-any-return]


def test_code_of_the_users_is_called_in_generate(own_pair: Any) -> None:
    """An exchanged forward(), hooks on the model, prepare_inputs_for_generation: Transformers' loop calls them."""
    hugging_face, ours = own_pair
    expected = tokens(hugging_face)

    def negated(forward: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            out = forward(*arguments, **named)
            out.logits = -out.logits
            return out

        return run

    results = []
    for model in own_pair:
        model.forward = functools.wraps(model.forward)(negated(model.forward))
        results.append(tokens(model))
        del model.forward
    assert results[0] == results[1] != expected
    assert "forward()" in ours.last_generation_path.reason
    calls: list[int] = []
    handle = ours.register_forward_hook(lambda *_: calls.append(1))
    assert tokens(ours) == expected and len(calls) == 8
    handle.remove()
    assert tokens(ours) == expected and ours.last_generation_path.loop == "device"


def test_modes_and_dropout_of_modules(own_pair: Any) -> None:
    """What is set on a module counts for the module of the Hugging Face model as well."""
    _, ours = own_pair
    ours.train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert len({float(ours(**batch(), labels=LABELS).loss.detach()) for _ in range(3)}) == 1
    ours.decoder.gradient_checkpointing = True
    assert ours.reference.decoder.gradient_checkpointing
    ours.encoder.eval()
    assert not ours.reference.encoder.training and ours.reference.decoder.training


def test_exchanged_after_sizes_were_read(own_pair: Any) -> None:
    """Training reads sizes without opening engines; what is exchanged after it counts."""
    hugging_face, ours = own_pair
    for model in own_pair:
        model(**batch(), labels=LABELS, output_attentions=model is ours)
        model.set_output_embeddings(nn.Linear(64, 211, bias=False))
        with torch.no_grad():
            model.lm_head.weight.copy_(hugging_face.shared.weight.flip(0))
    assert tokens(ours) == tokens(hugging_face)


class Adapter(nn.Module):
    """A linear module and a small product beside it, as LoRA adds one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.added(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("warm", [True, False])
def test_exchanged_modules_are_refused(own_pair: Any, warm: bool) -> None:
    _, ours = own_pair
    if warm:
        tokens(ours)
        assert ours.reference is ours.reference
    attention = ours.encoder.block[0].layer[0].SelfAttention
    attention.q = Adapter(attention.q)
    for call in (lambda: tokens(ours), lambda: ours.reference, lambda: ours.train()(**batch(), labels=LABELS)):
        with pytest.raises(
            UnsupportedModelError, match=r"first 'encoder.block.0.layer.0.SelfAttention.q.*adapters of peft"
        ):
            call()
    attention.q = attention.q.base
    assert len(tokens(ours.eval())) == 3


def test_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    hugging_face.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for factor in (1, -1):
        state["decoder.embed_tokens.weight"] = state["shared.weight"].clone() * factor
        save_file(state, path, metadata={"format": "pt"})
        if factor == 1:
            assert tokens(TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1)) == tokens(
                hugging_face
            )
            continue
        again = type(hugging_face).from_pretrained(tmp_path, dtype=torch.float32)
        if not torch.equal(again.decoder.embed_tokens.weight, again.shared.weight):  # older Transformers tie them
            with pytest.raises(UnsupportedModelError, match=r"decoder.embed_tokens.weight has other values"):
                TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1)


def test_reference_generates_by_the_models_settings(own_pair: Any) -> None:
    hugging_face, ours = own_pair
    inner = {"output_attentions": True, "return_dict_in_generate": True}
    for settings in ({"max_new_tokens": 5, "num_beams": 3}, {"max_new_tokens": 7, "no_repeat_ngram_size": 2}):
        for model in (hugging_face, ours):
            model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, **settings)
        inputs = batch()
        expected = hugging_face.generate(**inputs)
        hugging_face.set_attn_implementation("eager")
        assert ours.generate(**inputs, **inner).sequences.tolist() == expected.tolist()
        assert compare(ours, ours.reference, [inputs]).share == 1.0
        ours.generation_config.output_attentions = True
        out = ours.generate(
            **inputs, generation_config=GenerationConfig(max_new_tokens=5, return_dict_in_generate=True)
        )
        assert (out.decoder_attentions is not None) == (GenerationConfig().output_attentions is None)


def test_settings_of_the_config_as_arguments(tmp_path: Path) -> None:
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path)
    ours = TRTT5ForConditionalGeneration.from_pretrained(
        tmp_path, dropout_rate=0.25, use_cache=False, decoder_start_token_id=5, num_threads=1
    )
    assert (ours.config.dropout_rate, ours.config.use_cache, ours.config.decoder_start_token_id) == (0.25, False, 5)
    assert ours.generation_config.decoder_start_token_id == 5
    assert TRTT5ForConditionalGeneration.from_pretrained(tmp_path, config=str(tmp_path)).config.d_model == 64
    with pytest.raises(InputError, match=r"not known.*dropuot_rate"):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path, dropuot_rate=0.2)
    with pytest.raises(InputError, match="got None"):
        TRTT5ForConditionalGeneration.from_pretrained(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, "a name", torch.compile(nn.Linear(1, 1), backend="eager")])
def test_from_model_of_something_else(wrong: Any) -> None:
    with pytest.raises(InputError, match="expected a Transformers model"):
        TRTT5ForConditionalGeneration.from_model(wrong)
    with pytest.raises(UnsupportedModelError, match="tensors are not those of TRTT5Encoder"):
        TRTT5EncoderModel.from_model(make_hugging_face("t5-v1.1"))


class Derived(TRTT5ForConditionalGeneration):
    """A user's own class."""

    def shout(self) -> str:
        return "x"


def test_classes_derived_from_ours(tmp_path: Path) -> None:
    hugging_face = make_hugging_face("mt5")
    hugging_face.save_pretrained(tmp_path)
    made = [
        Derived.from_pretrained(tmp_path, num_threads=1),
        Derived.from_model(hugging_face, num_threads=1),
        Derived(hugging_face.config),
    ]
    for ours in made:
        assert isinstance(ours, Derived) and isinstance(ours, type(hugging_face)) and ours.shout() == "x"
    assert type(made[0]) is type(made[2]) and type(made[0]).__name__ == "Derived"
    again = [pickle.loads(pickle.dumps(made[0])), copy.deepcopy(made[0])]
    for ours in (*made[:2], *again):
        assert isinstance(ours, Derived) and tokens(ours) == tokens(hugging_face)
    assert isinstance(made[2].generate(**REQUEST), torch.Tensor)
