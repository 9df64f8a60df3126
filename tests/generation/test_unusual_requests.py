"""Requests that ask for something unusual: masks of four axes, caches of the user's, default dtypes, requests inside of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import EncoderDecoderCache, StaticCache

from t5_trt import (
    InputError,
    TRTT5ForConditionalGeneration,
    compare,
    generate_many,
)
from t5_trt.compat import CACHE
from t5_trt.runtime import step_buffers
from tests.cases import (
    LABELS,
)
from tests.conftest import SHIPPED
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch
from tests.tolerances import LOGITS_ATOL

REQUEST = {**batch(), "max_new_tokens": 8}


def tokens(model: Any, **more: Any) -> list[list[int]]:
    return model.generate(**{**REQUEST, **more}).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("heads", [1, 4])
def test_boolean_masks_of_four_axes(own_pair: Any, heads: int) -> None:
    hugging_face, ours = own_pair
    mask = batch()["attention_mask"].bool()[:, None, None].expand(-1, heads, -1, -1)
    ids = {"input_ids": batch()["input_ids"], "decoder_input_ids": LABELS}
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=LABELS).logits
        torch.testing.assert_close(ours(**ids, attention_mask=mask).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)
        own = torch.ones(3, 1, 3, 3, dtype=torch.bool).tril()
        got = ours(**batch(), decoder_input_ids=LABELS, decoder_attention_mask=own).logits
        torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=1e-5)


def test_static_cache_of_the_users(own_pair: Any) -> None:
    hugging_face, ours = own_pair
    results = []
    for model in (hugging_face, ours):
        cache = EncoderDecoderCache(
            StaticCache(config=model.config, max_cache_len=16), StaticCache(config=model.config, max_cache_len=11)
        )
        results.append(tokens(model, **{CACHE: cache}))
    assert results[0] == results[1]


def test_many_with_results_as_dictionaries() -> None:
    from transformers import AutoTokenizer

    ours, tokenizer = (
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1),
        AutoTokenizer.from_pretrained(SHIPPED),
    )
    texts = ["がっこう", "ねこ", "さくら"]
    expected = list(generate_many(ours, tokenizer, texts))
    ours.generation_config.return_dict_in_generate = True
    assert list(generate_many(ours, tokenizer, texts)) == expected and all(expected)
    assert compare(ours, ours.reference, texts).share == 1.0
    assert compare(ours, ours.reference, texts, do_sample=True, max_new_tokens=9).share == 1.0
    assert compare(ours, ours.reference, texts, num_beams=2, num_return_sequences=2).share == 1.0
    with pytest.raises(InputError, match="one string"):
        compare(ours, ours.reference, "abc", num_beams=2)
    with pytest.raises(InputError, match="one string"):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, calibration="がっこう")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_other_default_dtypes(own_pair: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, engine: str) -> None:
    hugging_face, ours = own_pair
    if engine == "stand-in":
        ours.session = stand_in_session(ours, monkeypatch)
    arguments: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3}, {"decoder_input_ids": LABELS, "max_new_tokens": 4})
    expected = [tokens(hugging_face, **more) for more in arguments]
    torch.set_default_dtype(dtype)
    try:
        assert [tokens(ours, **more) for more in arguments] == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("factor", [2, 3, 4.1, 1e6])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_penalties_that_grow_beyond_numbers(
    own_pair: Any, monkeypatch: pytest.MonkeyPatch, factor: float, engine: str
) -> None:
    """For lengths that are never reached: ours looks at all of them beforehand."""
    hugging_face, ours = own_pair
    if engine == "stand-in":
        ours.session = stand_in_session(ours, monkeypatch)
    more = {"exponential_decay_length_penalty": (3, factor), "max_new_tokens": 6}
    assert tokens(ours, **more) == tokens(hugging_face, **more)


def test_early_stopping_that_equals_true(own_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, ours = own_pair
    ours.session = stand_in_session(ours, monkeypatch)
    request = {**batch(4, 9, seed=0), "num_beams": 3, "max_new_tokens": 40, "length_penalty": 2.0}
    ends = [1, 8, 27, 34, 67, 69, 82, 88, 107, 122, 184, 189, 192, 199, 205]
    for early in (1, True, 1, False):
        more = {"early_stopping": early, "eos_token_id": ends, "pad_token_id": 3}
        assert tokens(ours, **request, **more) == tokens(hugging_face, **request, **more)


def test_forward_while_a_request_moves_on_to_a_larger_cache(own_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread does at that moment must not get the buffers that are still being read."""
    hugging_face, ours = own_pair
    ours.session = stand_in_session(ours, monkeypatch)
    request = {"max_new_tokens": 131, "min_new_tokens": 131}
    take_in, busy = step_buffers.Slot.take_in, []

    def meanwhile(slot: Any, state: Any, mask_value: float) -> None:
        if state.length >= 128 and not busy:
            busy.append(1)
            ours(**batch(seed=9), decoder_input_ids=torch.full((3, 1), 7))
        take_in(slot, state, mask_value)

    monkeypatch.setattr(step_buffers.Slot, "take_in", meanwhile)
    assert tokens(ours, **request) == tokens(hugging_face, **request) and busy


def test_request_inside_of_a_streamer(own_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured selector keeps numbers of its own."""
    hugging_face, ours = own_pair
    ours.session = stand_in_session(ours, monkeypatch)
    tokens(ours, **batch(3, 9), max_new_tokens=140, repetition_penalty=1.3)
    prompt = torch.randint(2, 200, (3, 131), generator=torch.Generator().manual_seed(1))

    class Nested:
        def __init__(self, model: Any) -> None:
            self.model, self.seen = model, 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            if self.seen == 3:
                inner = {**batch(3, 9, seed=2), "decoder_input_ids": prompt, "repetition_penalty": 0.7}
                tokens(self.model, **inner, max_new_tokens=10)

        def end(self) -> None:
            pass

    outer = {**batch(3, 9), "max_new_tokens": 30, "repetition_penalty": 1.9}
    expected = tokens(hugging_face, **outer)
    assert tokens(ours, **outer, streamer=Nested(ours)) == expected
