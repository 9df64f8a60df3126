"""The TensorRT session's own logic on a stand-in engine: padding, buckets, slots, growth, masks, limits."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from t5_trt import BuildConfig, StrictModeError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.engine.profiles import Shapes
from t5_trt.generation import request as requests
from t5_trt.generation.processors import fingerprint
from t5_trt.runtime import tensorrt_session
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import KINDS, batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy(make_pair: Any, kind: str) -> None:
    hugging_face, ours = make_pair(kind)
    request = {**batch(), "max_new_tokens": 40, "min_new_tokens": 40}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0},
        {"do_sample": True, "num_return_sequences": 2},
        {"decoder_input_ids": torch.tensor([[0, 5, 6, 7]] * 3)},
        {"max_new_tokens": 150, "min_new_tokens": 150},
        {"num_beams": 2, "max_new_tokens": 140, "min_new_tokens": 140},
        {"use_cache": False},
    ],
    ids=["beams", "beams, several", "sampling", "prompt", "two buckets", "beams, two buckets", "no cache"],
)
def test_requests(make_pair: Any, arguments: dict[str, Any]) -> None:
    hugging_face, ours = make_pair("t5-v1.1")
    results = []
    for model in (hugging_face, ours):
        torch.manual_seed(3)
        results.append(model.generate(**{**batch(), "max_new_tokens": 12, **arguments}).tolist())
    assert results[0] == results[1]


def test_prompt_lookup_takes_tokens_back(make_pair: Any) -> None:
    hugging_face, ours = make_pair("t5-v1.1")
    request = {**batch(1), "prompt_lookup_num_tokens": 3, "max_new_tokens": 20, "min_new_tokens": 20}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


def test_decoder_mask_precomputed_states_and_embeds(make_pair: Any) -> None:
    hugging_face, ours = make_pair("t5-v1.1")
    ids = torch.randint(2, 200, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = batch()
    with torch.no_grad():
        expected = hugging_face(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask)
        states, embeds = expected.encoder_last_hidden_state, hugging_face.shared(inputs["input_ids"])
    for form in ({"input_ids": inputs["input_ids"]}, {"encoder_outputs": (states,)}, {"inputs_embeds": embeds}):
        got = ours(**form, attention_mask=inputs["attention_mask"], decoder_input_ids=ids, decoder_attention_mask=mask)
        keep = mask.bool()
        torch.testing.assert_close(got.logits[keep], expected.logits[keep], atol=LOGITS_ATOL, rtol=1e-5)
        assert got.encoder_last_hidden_state.shape == states.shape


def test_deleted_model_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU memory does not wait for the garbage collector."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    session = ours.session = stand_in_session(ours, monkeypatch, reference=ours.session)
    for beams in (1, 3):
        ours.generate(**batch(), max_new_tokens=5, num_beams=beams)
    ours.generate(**batch(), max_new_tokens=5, do_sample=True, temperature=0.7)
    for idle in session._slots.idle.values():
        for slot in idle:
            for step in slot.steps.values():
                step.graph = None  # the stand-in's keep the session, a CUDA graph keeps nothing
    gone = [weakref.ref(kept) for kept in (ours, session, session.engines, session.engines.weights)]
    gc.collect()
    gc.disable()
    try:
        del ours, session, idle, slot, step
        assert [kept() for kept in gone] == [None] * 4
    finally:
        gc.enable()


def test_step_buffers_are_reused(make_pair: Any) -> None:
    _, ours = make_pair("t5-v1.0")
    one = torch.zeros(3, 1, dtype=torch.long)
    first = ours(**batch(), decoder_input_ids=one)
    address, expected = first[CACHE].state.kv.data_ptr(), first.logits.clone()
    second = ours(**batch(), decoder_input_ids=one)
    assert second[CACHE].state.kv.data_ptr() != address
    del first
    third = ours(**batch(seed=9), decoder_input_ids=one)
    assert third[CACHE].state.kv.data_ptr() == address
    assert torch.equal(second.logits, expected) and not torch.equal(third.logits, expected)


def test_two_kinds_of_request_take_turns_in_one_captured_step(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ in a number; what was found out about a kind is used again, and nothing of the other kind."""
    hugging_face, ours = make_pair("t5-v1.1")
    fingerprints: list[Any] = []
    monkeypatch.setattr(
        requests, "fingerprint", lambda processor: fingerprints.append(processor) or fingerprint(processor)
    )
    for seed in range(3):
        for temperature in (0.6, 2.5):
            results = []
            for model in (hugging_face, ours):
                torch.manual_seed(seed)
                request = {**batch(seed=seed), "max_new_tokens": 12, "do_sample": True, "temperature": temperature}
                results.append(model.generate(**request).tolist())
            assert results[0] == results[1]
        assert len(fingerprints) == 4  # top-k and temperature, for each kind
    steps = [step for slots in ours.session._slots.idle.values() for slot in slots for step in slot.steps]
    assert len(steps) == 1


def test_one_mask_is_made_for_a_request(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, ours = make_pair("t5-v1.1")
    real, made = tensorrt_session.TrtSession.cross_bias, []
    monkeypatch.setattr(tensorrt_session.TrtSession, "cross_bias", lambda *args: made.append(1) or real(*args))
    inputs = batch()
    unmasked = {"input_ids": inputs["input_ids"]}
    for given in (inputs, unmasked):
        for arguments in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
            del made[:]
            request = {**given, "max_new_tokens": 8, **arguments}
            assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
            assert len(made) == 1, (list(given), arguments)
        del made[:]
        start = torch.zeros(3, 1, dtype=torch.long)
        with torch.no_grad():
            expected = hugging_face(**given, decoder_input_ids=start).logits
        torch.testing.assert_close(ours(**given, decoder_input_ids=start).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)
        assert len(made) == 1


def test_changed_mask_and_rearranged_rows(make_pair: Any) -> None:
    hugging_face, ours = make_pair("t5-v1.1")
    results = []
    for model in (hugging_face, ours):
        with torch.no_grad():
            out = model(**batch(), decoder_input_ids=torch.tensor([[0, 4], [0, 5], [0, 6]]))
            cache = out[CACHE]
            cache.batch_select_indices(torch.tensor([2, 0]))
            mask = batch()["attention_mask"][[2, 0]].clone()
            mask[0, 5] = 0
            step = model(
                encoder_outputs=(out.encoder_last_hidden_state[[2, 0]],),
                attention_mask=mask,
                decoder_input_ids=torch.tensor([[7], [8]]),
                **{CACHE: cache},
            )
            results.append(step.logits)
    torch.testing.assert_close(results[1], results[0], atol=LOGITS_ATOL, rtol=1e-5)


def test_few_engines_serve_all_lengths(make_pair: Any) -> None:
    hugging_face, ours = make_pair("t5-v1.0")
    for rows, tokens in ((1, 3), (1, 17), (1, 32), (2, 20), (2, 31)):
        request = {**batch(rows, tokens, padding="right"), "max_new_tokens": 5}
        assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    asked = ours.session.stand_in.asked
    assert len(asked) == len(set(asked)) == 4  # encoder and step, for batches of 1 and 2


def test_dynamic_axes_need_one_engine(make_pair: Any) -> None:
    settings = BuildConfig(dynamic=("B", "S", "T"), max_batch=4, max_source_tokens=64, max_target_tokens=256)
    hugging_face, ours = make_pair("t5-v1.1", settings)
    for rows, tokens, new in ((1, 3, 5), (3, 40, 5), (4, 20, 140)):
        request = {**batch(rows, tokens), "max_new_tokens": new, "min_new_tokens": new}
        assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    assert [graph for graph, _ in ours.session.stand_in.asked] == ["encoder", "decoder_step"]


def test_changed_weights_in_one_folder(make_pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint that is trained on and saved again under the same name: the same engine, the new weights' tokens."""
    plans, tokens = [], []
    for seed in (0, 1):
        make_hugging_face("t5-v1.1", seed=seed).save_pretrained(tmp_path)
        hugging_face = T5ForConditionalGeneration.from_pretrained(tmp_path)
        ours = TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1)
        ours.session = stand_in_session(ours, monkeypatch)
        tokens.append(ours.generate(**batch(), max_new_tokens=20).tolist())
        assert tokens[-1] == hugging_face.generate(**batch(), max_new_tokens=20).tolist()
        plans.append(ours.session.stand_in.plan("decoder_step", Shapes(B=4)))
    assert plans[0] == plans[1] and tokens[0] != tokens[1]


def test_engines_serve_every_checkpoint_and_share_weights(make_pair: Any) -> None:
    """Engines hold no weights: changed weights give changed tokens, and all engines read the same memory."""
    hugging_face, ours = make_pair("t5-v1.1")
    ours.generate(**batch(2), max_new_tokens=3)
    size = ours.session.engines.weights.nbytes
    ours.generate(**batch(5), num_beams=2, max_new_tokens=3)
    assert (
        ours.session.engines.weights.nbytes
        == size
        == pytest.approx(4 * sum(p.numel() for p in hugging_face.parameters()), rel=0.1)
    )


def test_beyond_the_limits(make_pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    hugging_face, ours = make_pair("t5-v1.0", BuildConfig(max_source_tokens=32))
    request = {**batch(1, 40), "max_new_tokens": 3}
    with caplog.at_level(logging.WARNING, "t5_trt"):
        assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    assert (
        caplog.text.count("needs max_source_tokens = 40; engines were configured for 32: an engine for 64 is used") == 1
    )
    _, strict = make_pair("t5-v1.0", BuildConfig(max_source_tokens=32), strict=True)
    with pytest.raises(StrictModeError, match=r"needs max_source_tokens = 40"):
        strict.generate(**request)
