"""`forward()` on engines returns the Hugging Face class's logits, loss and states, for one and for many decoder tokens."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from t5_trt import StrictModeError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.generation.kv_cache import EngineCache
from tests.tiny_models import batch, make_hugging_face, tokens
from tests.tolerances import HIDDEN_ATOL, LOGITS_ATOL, LOSS_ATOL


def exact_logits(hugging_face: Any, **request: Any) -> torch.Tensor:
    """The Hugging Face class's logits, summed in float64 and rounded to float32.

    After 130 tokens its float32 sums alone may be 1e-4 away from them: how far depends on the CPU's matrix kernels.
    """
    with torch.no_grad():
        return copy.deepcopy(hugging_face).double()(**request).logits.float()


@pytest.mark.parametrize("count", [1, 2, 7, 130])
def test_logits(pair: tuple[Any, Any], count: int) -> None:
    hugging_face, ours = pair
    request = {**batch(), "decoder_input_ids": tokens(3, count)}
    with torch.no_grad():
        expected, got = hugging_face(**request), ours(**request)
    assert got.logits.dtype == torch.float32 and got.logits.shape == expected.logits.shape
    torch.testing.assert_close(got.logits, exact_logits(hugging_face, **request), atol=LOGITS_ATOL, rtol=1e-5)
    torch.testing.assert_close(
        got.encoder_last_hidden_state, expected.encoder_last_hidden_state, atol=HIDDEN_ATOL, rtol=1e-5
    )


def test_loss_and_ignored_labels(pair: tuple[Any, Any]) -> None:
    hugging_face, ours = pair
    labels = tokens(3, 6)
    labels[1, 4:] = -100
    with torch.no_grad():
        expected, got = hugging_face(**batch(), labels=labels), ours(**batch(), labels=labels)
    torch.testing.assert_close(got.loss, expected.loss, atol=LOSS_ATOL, rtol=1e-5)
    torch.testing.assert_close(got.logits, expected.logits, atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("pieces", [(1, 1, 1), (4, 1, 3), (3, 70, 1)])
def test_cached_pieces_equal_one_pass(pair: tuple[Any, Any], pieces: tuple[int, ...]) -> None:
    """Any split of the decoder's input, across a bucket's edge too, gives the logits of one pass."""
    hugging_face, ours = pair
    ids = tokens(3, sum(pieces))
    inputs = batch()
    expected = exact_logits(hugging_face, **inputs, decoder_input_ids=ids)
    with torch.no_grad():
        encoded, cache, start, parts = ours.get_encoder()(**inputs), None, 0, []
        for count in pieces:
            out = ours(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=ids[:, start : start + count],
                **{CACHE: cache},
            )
            cache, start = out[CACHE], start + count
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_decoder_padding(v11: tuple[Any, Any], count: int) -> None:
    hugging_face, ours = v11
    mask = torch.ones(3, 4 + count, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, 2] = 0
    ids, inputs = tokens(3, 4 + count), batch()
    with torch.no_grad():
        expected = hugging_face(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        first = ours(**inputs, decoder_input_ids=ids[:, :4], decoder_attention_mask=mask[:, :4])
        rest = ours(
            encoder_outputs=(first.encoder_last_hidden_state,),
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=ids[:, 4:],
            decoder_attention_mask=mask,
            **{CACHE: first[CACHE]},
        )
    seen = torch.cat((first.logits, rest.logits), 1)
    keep = mask.bool()  # a padded position's own logits are never used, and mean nothing
    torch.testing.assert_close(seen[keep], expected[keep], atol=LOGITS_ATOL, rtol=1e-5)


def test_inputs_embeds_and_encoder_outputs(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    inputs, ids = batch(), tokens(3, 5)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = hugging_face(**inputs, decoder_input_ids=ids)
        embeds = hugging_face.shared(inputs["input_ids"])
        hidden = expected.encoder_last_hidden_state
        forms: list[dict[str, Any]] = [
            {"inputs_embeds": embeds},
            {"encoder_outputs": (hidden,)},
            {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)},
            {"encoder_outputs": ours.get_encoder()(**inputs).to_tuple()},
        ]
        for form in forms:
            got = ours(**form, attention_mask=mask, decoder_input_ids=ids)
            torch.testing.assert_close(got.logits, expected.logits, atol=LOGITS_ATOL, rtol=1e-5)


def test_tuple_result_and_no_cache(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    request = {**batch(), "decoder_input_ids": tokens(3, 2), "use_cache": False, "return_dict": False}
    with torch.no_grad():
        expected, got = hugging_face(**request), ours(**request)
    assert isinstance(got, tuple) and len(got) == len(expected) == 2
    assert CACHE not in ours(**{**request, "return_dict": True})


def test_bool_int32_and_float_masks(v10: tuple[Any, Any]) -> None:
    _, ours = v10
    inputs, ids = batch(), tokens(3, 3)
    expected = ours(**inputs, decoder_input_ids=ids).logits
    for dtype in (torch.bool, torch.int32, torch.float32):
        got = ours(inputs["input_ids"].int(), inputs["attention_mask"].to(dtype), ids.int()).logits
        assert torch.equal(got, expected)


def test_one_source_for_many_decoder_rows(v10: tuple[Any, Any]) -> None:
    hugging_face, ours = v10
    one = batch(1)
    repeated = {name: tensor.repeat(4, 1) for name, tensor in one.items()}
    ids = tokens(4, 3)
    with torch.no_grad():
        expected = hugging_face(**repeated, decoder_input_ids=ids).logits
    torch.testing.assert_close(ours(**one, decoder_input_ids=ids).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"decoder_attention_mask": torch.ones(3, 1, 4, 4).tril()},
    ],
    ids=["attentions", "states", "4-D mask"],
)
def test_what_engines_cannot_give(
    v11: tuple[Any, Any], extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hugging_face, ours = make_hugging_face("t5-v1.1", attention="eager"), v11[1]
    ours._runner._reference = None
    if "decoder_attention_mask" in extra:
        extra = {"decoder_attention_mask": (1 - extra["decoder_attention_mask"]) * torch.finfo(torch.float32).min}
    request = {**batch(), "decoder_input_ids": tokens(3, 4), **extra}
    with torch.no_grad(), caplog.at_level(logging.WARNING, "t5_trt"):
        expected = hugging_face(**request)
        got = ours(**request)
        ours(**request)
    assert len([record for record in caplog.records if "Hugging Face model" in record.message]) == 1
    torch.testing.assert_close(got.logits, expected.logits, atol=LOGITS_ATOL, rtol=1e-5)
    if "output_attentions" in extra:
        assert len(got.cross_attentions) == 2
    strict = TRTT5ForConditionalGeneration.from_model(hugging_face, strict=True)
    with torch.no_grad(), pytest.raises(StrictModeError, match="strict"):
        strict(**request)


def test_attentions_with_an_engine_cache(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    ids = tokens(3, 5)
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits[:, 4:]
        first = ours(**batch(), decoder_input_ids=ids[:, :4])
        last = ours(**batch(), decoder_input_ids=ids[:, 4:], **{CACHE: first[CACHE]}, output_attentions=True)
    torch.testing.assert_close(last.logits, expected, atol=LOGITS_ATOL, rtol=1e-5)
    assert last.decoder_attentions[0].shape[-1] == 5


def test_gradients_come_from_the_hugging_face_model(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    embeds = hugging_face.shared(batch()["input_ids"]).detach().requires_grad_()
    ours(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], labels=tokens(3, 4)).loss.backward()
    got = embeds.grad.clone()
    embeds.grad = None
    hugging_face(inputs_embeds=embeds, attention_mask=batch()["attention_mask"], labels=tokens(3, 4)).loss.backward()
    torch.testing.assert_close(got, embeds.grad)


def test_training_mode_uses_the_hugging_face_model(fresh: Any) -> None:
    fresh.train()
    loss = fresh(**batch(), labels=tokens(3, 4)).loss
    assert loss.requires_grad
    fresh.eval()
    with torch.no_grad():
        assert not fresh(**batch(), labels=tokens(3, 4)).loss.requires_grad


def test_inference_mode_then_ordinary_use(fresh: Any) -> None:
    """Buffers made under inference_mode are written to afterwards."""
    with torch.inference_mode():
        first = fresh(**batch(), decoder_input_ids=tokens(3, 2))
    again = fresh(**batch(), decoder_input_ids=tokens(3, 1), **{CACHE: first[CACHE]})
    assert again[CACHE].get_seq_length() == 3


def test_cache_is_described_as_in_the_hugging_face_class(v11: tuple[Any, Any]) -> None:
    """All properties of the Hugging Face class, without copying the contents for an answer."""
    names = [name for name, value in vars(EncoderDecoderCache).items() if isinstance(value, property)]
    assert {"is_sliding", "is_croppable", "is_compileable"} <= set(names)
    with torch.no_grad():
        hugging_face, ours = (model(**batch(), decoder_input_ids=tokens(3, 2))[CACHE] for model in v11)
    for name in names:
        assert name in vars(EngineCache) and getattr(ours, name) == getattr(hugging_face, name), name


def test_cache_operations(v11: tuple[Any, Any]) -> None:
    """reorder, crop, repeat and select act on the engine cache as on that one."""
    import copy

    hugging_face, ours = v11
    caches, outputs = [], []
    for model in (hugging_face, ours):
        with torch.no_grad():
            out = model(**batch(), decoder_input_ids=tokens(3, 4))
            cache = copy.deepcopy(out[CACHE])
            assert cache.get_seq_length() == 4 and len(cache) == 2
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            cache.crop(-1)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([5, 0, 3]))
            mask = batch()["attention_mask"][torch.tensor([0, 2, 0])]
            hidden = out.encoder_last_hidden_state[torch.tensor([0, 2, 0])]
            step = model(
                encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=tokens(3, 1), **{CACHE: cache}
            )
            caches.append(step[CACHE])
            outputs.append(step.logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=LOGITS_ATOL, rtol=1e-5)
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == 4
    for left, right in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(left[0], right[0], atol=LOGITS_ATOL, rtol=1e-5)
    for cache in caches:  # ours has become an ordinary one by now, as somebody looked into it
        cache.reset()
    assert caches[1].get_seq_length() == caches[0].get_seq_length()
    fresh = ours(**batch(), decoder_input_ids=tokens(3, 4))[CACHE]
    fresh.reset()
    assert fresh.get_seq_length() == 0
