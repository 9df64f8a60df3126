"""Dtypes: set directly, through a module that contains the model, or when loading. What a model reports is what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5EncoderModel, T5ForConditionalGeneration

from t5_trt import BackendError, InputError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from tests.tiny_models import batch, make_hugging_face

LABELS = torch.tensor([[5, 6, 7]] * 3)
HALVES = [torch.float16, torch.bfloat16]
#: of the largest value: one rounding of each dtype
TOLERANCES = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
DIRECT: list[Callable[[nn.Module, torch.dtype], Any]] = [
    lambda module, dtype: module.half() if dtype is torch.float16 else module.bfloat16(),
    lambda module, dtype: module.to(dtype),
    lambda module, dtype: module.to("cpu", dtype=dtype),
    lambda module, dtype: module.type(dtype),
]


class Sentence(nn.Module):
    """A sentence encoder: a dense layer over our states."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.dense = inner, nn.Linear(64, 8)

    def forward(self, **inputs: Any) -> torch.Tensor:
        encoded: torch.Tensor = self.dense(self.inner.get_encoder()(**inputs)[0].mean(1))
        return encoded


def pair_of(kind: str) -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind, attention="eager", dropout_rate=0.0)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == exact.shape
    assert (got.float() - exact).abs().max() <= TOLERANCES.get(dtype, 1e-4) * exact.abs().max()


def check_pair(hugging_face: Any, ours: Any) -> None:
    """Dtypes as the Hugging Face model's, values as its float32 form has them with the same parameters."""
    dtype, exact = hugging_face.dtype, copy.deepcopy(hugging_face).float()
    assert ours.dtype is dtype
    kinds = {name: p.dtype for name, p in hugging_face.named_parameters()}
    assert {name: p.dtype for name, p in ours.named_parameters()} == kinds
    request = {**batch(), "decoder_input_ids": LABELS, "labels": LABELS}
    with torch.no_grad():
        left, right, best = (model(**request) for model in (ours, hugging_face, exact))
        assert left.logits.dtype is right.logits.dtype and left.loss.dtype is right.loss.dtype
        states = best.encoder_last_hidden_state
        close(left.logits, best.logits, dtype), close(left.encoder_last_hidden_state, states, dtype)
        close(ours.get_encoder()(**batch())[0], states, dtype)
        embeds = hugging_face.shared(batch()["input_ids"])
        close(ours.encoder(inputs_embeds=embeds, attention_mask=batch()["attention_mask"])[0], states, dtype)
        inner = [model(**request, output_hidden_states=True).decoder_hidden_states for model in (ours, hugging_face)]
    torch.testing.assert_close(*inner)  # both are the Hugging Face model's


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """A float32 model with the rounded values."""
    return copy.deepcopy(model).to(dtype).float()


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("dtype", HALVES)
def test_conversion_of_a_containing_module(kind: str, dtype: torch.dtype) -> None:
    hugging_face, ours = pair_of(kind)
    exact = rounded(hugging_face, dtype)
    ours.generate(**batch(), max_new_tokens=2)  # engines over what comes before
    wholes = [Sentence(model).to(dtype) for model in (hugging_face, ours)]
    with torch.no_grad():
        outputs = [whole(**batch()) for whole in wholes]
    assert outputs[0].dtype is outputs[1].dtype is dtype
    check_pair(hugging_face, ours)
    for more in ({}, {"num_beams": 3}):
        expected = exact.generate(**batch(), max_new_tokens=6, **more).tolist()
        assert ours.generate(**batch(), max_new_tokens=6, **more).tolist() == expected
    for whole in wholes:
        whole.float()
    check_pair(hugging_face, ours)
    assert ours.generate(**batch(), max_new_tokens=6).tolist() == exact.generate(**batch(), max_new_tokens=6).tolist()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convert", DIRECT)
def test_conversion_of_the_model(convert: Callable[..., Any], dtype: torch.dtype) -> None:
    hugging_face, ours = pair_of("t5-v1.1")
    for model in (hugging_face, ours):
        assert convert(model, dtype) is model
    check_pair(hugging_face, ours)


def test_training_in_bfloat16() -> None:
    hugging_face, ours = (model.bfloat16().train() for model in pair_of("t5-v1.0"))
    for model in (hugging_face, ours):
        model(**batch(), labels=LABELS).loss.backward()
    for (name, left), right in zip(hugging_face.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, msg=name)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_dtype_given_when_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    """Float16 leaves the matrices in float32 that Hugging Face leaves; so does "auto" what the files have."""
    make_hugging_face("t5-v1.1", attention="eager").to(dtype).save_pretrained(tmp_path)
    for name, given in (("dtype", dtype), ("torch_dtype", str(dtype)[6:]), ("dtype", "auto")):
        hugging_face = T5ForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="eager", **{name: given}
        ).eval()
        ours = TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1, **{name: given})
        check_pair(hugging_face, ours)
    assert TRTT5ForConditionalGeneration.from_pretrained(tmp_path).dtype is torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_saved_wrapped_and_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    hugging_face, ours = (model.to(dtype) for model in pair_of("t5-v1.1"))
    ours.save_pretrained(tmp_path)
    again = TRTT5ForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    for model in (copy.deepcopy(ours), TRTT5ForConditionalGeneration.from_model(hugging_face), again):
        assert model.dtype is dtype
        assert (
            model.generate(**batch(), max_new_tokens=6).tolist() == ours.generate(**batch(), max_new_tokens=6).tolist()
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_encoder_model(tmp_path: Path, dtype: torch.dtype) -> None:
    make_hugging_face("t5-v1.1").save_pretrained(tmp_path)
    hugging_face = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = TRTT5EncoderModel.from_pretrained(tmp_path, dtype=dtype, num_threads=1)
    with torch.no_grad():
        native, exact = hugging_face(**batch())[0], copy.deepcopy(hugging_face).float()(**batch())[0]
        assert ours.dtype is hugging_face.dtype is native.dtype is dtype
        close(ours(**batch())[0], exact, dtype), close(ours.encoder(**batch())[0], exact, dtype)
        assert ours(**batch(), output_hidden_states=True).hidden_states[-1].dtype is dtype
        close(ours.float()(**batch())[0], exact, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_caches_go_on_in_half_precision(dtype: torch.dtype) -> None:
    """From step to step, to the Hugging Face model, and back."""
    hugging_face, ours = (model.to(dtype) for model in pair_of("t5-v1.1"))
    first, second = LABELS[:, :2], LABELS[:, 2:]
    with torch.no_grad():
        exact = copy.deepcopy(hugging_face).float()(**batch(), decoder_input_ids=LABELS).logits[:, -1:]
        for maker, user in ((ours, ours), (hugging_face, ours), (ours, hugging_face), (ours, ours.reference)):
            out = maker(**batch(), decoder_input_ids=first, use_cache=True)
            cache = out[CACHE] if user is ours else out[CACHE].as_hugging_face()
            rest = {"encoder_outputs": (out.encoder_last_hidden_state,), "attention_mask": batch()["attention_mask"]}
            logits = user(**rest, decoder_input_ids=second, **{CACHE: cache}).logits
            assert logits.dtype is dtype and (logits.float() - exact).norm() < 0.1 * exact.norm()
            keys = (cache.as_hugging_face() if maker is user is ours else cache).self_attention_cache.layers[0].keys
            assert keys.dtype is dtype and keys.shape[2] == 3


def test_model_survives_the_meta_device() -> None:
    hugging_face, ours = pair_of("t5-v1.1")
    expected = ours.generate(**batch(), max_new_tokens=6).tolist()
    whole = Sentence(ours)
    whole.to("meta")
    assert ours.device.type == "meta" and "engines=(none opened yet)" in repr(ours)
    for call in (
        lambda: ours.generate(**batch()),
        lambda: ours(**batch(), labels=LABELS),
        lambda: ours.encoder(**batch()),
    ):
        with pytest.raises(InputError, match="parameters are on the device meta"):
            call()
    whole.to_empty(device="cpu")
    ours.load_state_dict(hugging_face.state_dict())
    assert ours.generate(**batch(), max_new_tokens=6).tolist() == expected
    ours.to("meta").load_state_dict(hugging_face.state_dict(), assign=True)
    assert ours.generate(**batch(), max_new_tokens=6).tolist() == expected


def test_moves_that_change_nothing_keep_the_engines() -> None:
    """Sentence encoders make one for every batch."""
    _, ours = pair_of("t5-v1.1")
    session, whole = ours.session, Sentence(ours)
    whole.to("cpu"), whole.float(), ours.to("cpu"), ours.to(torch.float32), ours.cpu().float()
    assert ours.session is session


def test_unsupported_dtypes_are_refused() -> None:
    _, ours = pair_of("t5-v1.1")
    for convert in (nn.Module.double, lambda module: module.to(torch.float64)):
        for module in (ours, Sentence(ours)):
            with pytest.raises(InputError, match=r"dtype got torch.float64; expected torch.float32, torch.float16"):
                convert(module)
    assert ours.shared.weight.dtype is torch.float32


def test_on_a_gpu_the_engines_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, which engines are made from, stay as they are on the host."""
    from dataclasses import replace

    from t5_trt.runtime.select import Placement

    def placed(config: Any, model: Any) -> Placement:
        precision = "fp16" if config.precision == "auto" else config.precision
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        return Placement("tensorrt", precision, torch.device("cuda", 0), dtype, "tensorrt", "")

    _, ours = pair_of("t5-v1.1")
    monkeypatch.setattr("t5_trt.modeling.runner.resolve", placed)
    runner = ours._runner
    runner.settings = replace(
        runner.settings, runtime=replace(runner.settings.runtime, precision="auto"), placement=None
    )
    assert ours.dtype is torch.float16
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
        Sentence(ours).to(dtype)
        assert (ours.dtype, ours.runtime_config.precision) == (dtype, precision)
        assert ours.shared.weight.dtype is torch.float32 and ours.device == torch.device("cuda", 0)
    assert ours.to("cuda", torch.bfloat16).dtype is torch.bfloat16
    with pytest.raises(BackendError, match="runs on cuda:0"):
        ours.cpu()
