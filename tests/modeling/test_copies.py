"""Copies of a model, parts of it that outlive it, and what other modules and processes do with them."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

from t5_trt import TRTT5EncoderModel, TRTT5ForConditionalGeneration
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL

REQUEST = {**batch(), "max_new_tokens": 6}
KINDS = ["t5-v1.0", "t5-v1.1", "mt5", "umt5"]
ENCODERS = {"mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}


def whole_model(kind: str = "t5-v1.1") -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind, attention="eager", dropout_rate=0.0)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


def encoder_model(kind: str = "t5-v1.1") -> tuple[Any, Any]:
    whole = make_hugging_face(kind, attention="eager", dropout_rate=0.0)
    hugging_face = ENCODERS.get(kind, T5EncoderModel)(copy.deepcopy(whole.encoder.config)).eval()
    hugging_face.load_state_dict(
        {name: t for name, t in whole.state_dict().items() if name.split(".")[0] in ("shared", "encoder")}
    )
    return hugging_face, TRTT5EncoderModel.from_model(copy.deepcopy(hugging_face), num_threads=1)


def check_encoder(encoder: Any, hugging_face: Any) -> None:
    """Equal states; hidden states and gradients, too."""
    with torch.no_grad():
        expected = hugging_face.encoder(**batch(), output_hidden_states=True)
        got = encoder(**batch())
        torch.testing.assert_close(got[0], expected[0], atol=HIDDEN_ATOL, rtol=1e-4)
        inner = encoder(**batch(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(inner, expected.hidden_states, atol=HIDDEN_ATOL, rtol=1e-4)
        assert isinstance(encoder(**batch(), return_dict=False), tuple)
    for each in (encoder, hugging_face.encoder):
        each.train().zero_grad()
        each(**batch())[0].square().sum().backward()
        each.eval()
    torch.testing.assert_close(
        encoder.embed_tokens.weight.grad, hugging_face.encoder.embed_tokens.weight.grad, atol=1e-3, rtol=1e-3
    )


def by_deepcopy(part: Any) -> Any:
    return copy.deepcopy(part)


def by_pickle(part: Any) -> Any:
    return pickle.loads(pickle.dumps(part))


def by_copy(part: Any) -> Any:
    return copy.copy(part)


def itself(part: Any) -> Any:
    return part


CASES = [(whole_model, itself, kind) for kind in KINDS]
CASES += [(whole_model, by_deepcopy, "mt5"), (whole_model, by_pickle, "umt5"), (whole_model, by_copy, "t5-v1.1")]
CASES += [(encoder_model, itself, "umt5"), (encoder_model, by_pickle, "mt5"), (encoder_model, by_copy, "t5-v1.0")]


@pytest.mark.parametrize(("make", "way", "kind"), CASES)
def test_encoder_outlives_its_model(make: Callable[..., Any], way: Callable[..., Any], kind: str) -> None:
    hugging_face, ours = make(kind)
    if way is itself:  # after use, too
        ours.get_encoder()(**batch())
    encoder = way(ours.get_encoder())
    del ours
    check_encoder(encoder, hugging_face)


@pytest.mark.parametrize("way", [by_deepcopy, by_pickle, by_copy])
def test_copied_encoder_beside_its_model(way: Callable[..., Any]) -> None:
    hugging_face, ours = whole_model()
    encoder = way(ours.encoder)
    check_encoder(encoder, hugging_face)
    assert ours.generate(**REQUEST).tolist() == hugging_face.generate(**REQUEST).tolist()


def test_encoder_alone_follows_its_own_changes() -> None:
    hugging_face, ours = whole_model()
    encoder = ours.get_encoder()
    del ours
    encoder(**batch())
    for each in (encoder, hugging_face.encoder):
        with torch.no_grad():
            each.block[1].layer[0].SelfAttention.q.weight.mul_(1.5)
        torch.manual_seed(3)
        each.embed_tokens = nn.Embedding(211, 64)
    check_encoder(encoder, hugging_face)
    hugging_face.encoder.to(torch.bfloat16)
    assert encoder.to(torch.bfloat16)(**batch())[0].dtype is torch.bfloat16


def test_encoder_that_a_model_has_exchanged() -> None:
    """It has its own weights, and not those of the encoder that came after it."""
    hugging_face, ours = whole_model()
    other = make_hugging_face("t5-v1.1", seed=4, attention="eager", dropout_rate=0.0)
    first, ours.encoder = ours.encoder, copy.deepcopy(other.encoder)
    ours.set_input_embeddings(other.shared)
    check_encoder(first, hugging_face)
    hugging_face.encoder = other.encoder
    hugging_face.set_input_embeddings(other.shared)
    assert ours.generate(**REQUEST).tolist() == hugging_face.generate(**REQUEST).tolist()


@pytest.mark.parametrize("make", [whole_model, encoder_model])
@pytest.mark.parametrize("gone", ["copy", "original"])
def test_shallow_copies_do_not_depend_on_each_other(make: Callable[..., Any], gone: str) -> None:
    hugging_face, ours = make()
    twin = copy.copy(ours)
    assert twin.shared.weight is ours.shared.weight and type(twin) is type(ours)
    for model in (ours, twin, ours):
        torch.testing.assert_close(
            model.get_encoder()(**batch())[0], hugging_face.encoder(**batch())[0], atol=HIDDEN_ATOL, rtol=1e-4
        )
        assert model.get_encoder()._find_runner().model is model
    left = ours if gone == "copy" else twin
    del model, ours, twin
    if make is whole_model:
        assert left.generate(**REQUEST).tolist() == hugging_face.generate(**REQUEST).tolist()
    check_encoder(left.encoder, hugging_face)
    check_encoder(left.get_encoder(), hugging_face)


@pytest.mark.parametrize("part", ["decoder", "lm_head", "shared", "encoder.block"])
def test_parts_can_be_copied(part: str) -> None:
    hugging_face, ours = whole_model()
    ours.generate(**REQUEST)
    expected = hugging_face.get_submodule(part).state_dict()
    for way in (by_deepcopy, by_pickle, by_copy):
        assert all(torch.equal(t, expected[name]) for name, t in way(ours.get_submodule(part)).state_dict().items())


@pytest.mark.parametrize("make", [whole_model, encoder_model])
def test_inside_of_another_module(make: Callable[..., Any], tmp_path: Path) -> None:
    hugging_face, ours = make()

    def run(model: Any) -> torch.Tensor:
        states: torch.Tensor = model.get_encoder()(**batch())[0]
        return states

    expected = run(hugging_face).detach()
    outer = nn.ModuleDict({"inner": ours, "dense": nn.Linear(64, 8)})
    torch.save(outer, tmp_path / "outer.pt")
    del ours
    loaded = torch.load(tmp_path / "outer.pt", weights_only=False)
    for each in (outer, copy.deepcopy(outer), copy.copy(outer), loaded):
        torch.testing.assert_close(run(each["inner"]), expected, atol=HIDDEN_ATOL, rtol=1e-4)
    torch.testing.assert_close(
        nn.DataParallel(outer["inner"].get_encoder())(**batch())[0], expected, atol=HIDDEN_ATOL, rtol=1e-4
    )
    taken = nn.Sequential(outer["inner"].encoder)
    del outer, each
    torch.testing.assert_close(
        taken(batch()["input_ids"])[0], hugging_face.encoder(batch()["input_ids"])[0], atol=HIDDEN_ATOL, rtol=1e-4
    )


def test_pickled_encoder_in_another_process(tmp_path: Path) -> None:
    hugging_face, ours = whole_model()
    path = tmp_path / "encoder.pt"
    torch.save(
        {"encoder": ours.encoder, "expected": hugging_face.encoder(**batch())[0].detach(), "batch": batch()}, path
    )
    code = (
        "import sys, torch; saved = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(saved['encoder'](**saved['batch'])[0], saved['expected'], atol=1e-4, rtol=1e-4)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)


@pytest.mark.parametrize("copied", [False, True])
def test_encoder_frees_its_memory_at_once(copied: bool) -> None:
    _, ours = whole_model()
    encoder = copy.deepcopy(ours.encoder) if copied else ours.encoder
    ours.generate(**REQUEST)
    gone = [weakref.ref(ours), weakref.ref(ours.session)]
    gc.collect()
    gc.disable()
    try:
        del ours
        assert not any(kept() is not None for kept in gone)
        encoder(**batch()), encoder(**batch(), output_hidden_states=True)
        lone = encoder._find_runner()
        gone = [
            weakref.ref(encoder),
            weakref.ref(lone.model),
            weakref.ref(lone.session),
            weakref.ref(encoder.embed_tokens.weight),
        ]
        del encoder, lone
        assert not any(kept() is not None for kept in gone)
    finally:
        gc.enable()
