"""The ways into `generate()` beside plain arguments: streamers, assistants, precomputed encoders, callables, caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from t5_trt import StrictModeError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.generation.encoder_output import EngineEncoderOutput, recall
from tests.cases import Recorder
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import HIDDEN_ATOL


def test_streamer_sees_every_token(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    seen, expected = Recorder(), Recorder()
    inputs = batch(1)
    ours.generate(**inputs, streamer=seen, max_new_tokens=9)
    hugging_face.generate(**inputs, streamer=expected, max_new_tokens=9)
    assert seen.pieces == expected.pieces and len(seen.pieces) > 3 and seen.ended


@pytest.mark.parametrize("sample", [False, True])
def test_assisted_by_a_hugging_face_model(v11: tuple[Any, Any], sample: bool) -> None:
    hugging_face, ours = v11
    assistant = make_hugging_face("t5-v1.1", seed=0, num_layers=1)  # fewer layers in both stacks
    results = []
    for model in (hugging_face, ours):
        torch.manual_seed(4)
        results.append(model.generate(**batch(1), assistant_model=assistant, max_new_tokens=15, do_sample=sample))
    assert results[0].tolist() == results[1].tolist()


def test_as_assistant_of_a_hugging_face_model(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    other = make_hugging_face("t5-v1.1", seed=1)
    expected = other.generate(**batch(1), assistant_model=hugging_face, max_new_tokens=15)
    assert other.generate(**batch(1), assistant_model=ours, max_new_tokens=15).tolist() == expected.tolist()


def test_as_assistant_of_itself(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    twin = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    expected = hugging_face.generate(**batch(1), max_new_tokens=15)
    assert ours.generate(**batch(1), assistant_model=twin, max_new_tokens=15).tolist() == expected.tolist()


def test_prompt_lookup(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    request = {**batch(1), "prompt_lookup_num_tokens": 3, "max_new_tokens": 15, "min_new_tokens": 15}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_precomputed_encoder_outputs_of_either_model(v11: tuple[Any, Any], beams: int) -> None:
    hugging_face, ours = v11
    inputs = batch()
    expected = hugging_face.generate(**inputs, num_beams=beams, max_new_tokens=9).tolist()
    with torch.no_grad():
        own = ours.get_encoder()(**inputs)
        foreign = hugging_face.get_encoder()(**inputs)
    for outputs in (own, foreign, copy.deepcopy(own)):
        mask = inputs["attention_mask"]
        got = ours.generate(encoder_outputs=outputs, attention_mask=mask, num_beams=beams, max_new_tokens=9)
        assert got.tolist() == expected
        assert outputs.last_hidden_state.shape[0] == 3  # the caller's object is left as it was


def test_changed_encoder_states_are_not_answered_from_memory(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    inputs = batch()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = ours.get_encoder()(**inputs)
            assert recall(outputs, ours.session) is not None
            outputs.last_hidden_state.mul_(-1.0)
            assert recall(outputs, ours.session) is None
            replaced = ours.get_encoder()(**inputs)
            replaced.last_hidden_state = -replaced.last_hidden_state
            assert recall(replaced, ours.session) is None
            flipped = hugging_face.get_encoder()(**inputs)
            flipped.last_hidden_state = -flipped.last_hidden_state
            mask = inputs["attention_mask"]
            expected = hugging_face.generate(encoder_outputs=flipped, attention_mask=mask, max_new_tokens=8).tolist()
            for changed in (outputs, replaced):
                got = ours.generate(encoder_outputs=changed, attention_mask=mask, max_new_tokens=8).tolist()
                assert got == expected


def test_inputs_embeds(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    inputs = batch()
    embeds = hugging_face.get_input_embeddings()(inputs["input_ids"]).detach()
    request = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "max_new_tokens": 8}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


def test_custom_generate_callable(v11: tuple[Any, Any]) -> None:
    """A decoding method of the user's own: here every second token is the second best."""

    def seconds(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        limit = kwargs["generation_config"].max_length
        known = {"logits_processor", "stopping_criteria", "generation_config"}
        state = {name: value for name, value in kwargs.items() if name not in known}
        while input_ids.shape[1] < limit:
            step = 1 if state[CACHE].get_seq_length() else None
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **state)
            outputs = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(outputs, state, is_encoder_decoder=True)
            rank = input_ids.shape[1] % 2
            token = outputs.logits[:, -1].topk(2).indices[:, rank : rank + 1]
            input_ids = torch.cat((input_ids, token), 1)
        return input_ids

    hugging_face, ours = v11
    request = {**batch(), "custom_generate": seconds, "max_new_tokens": 10}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


def test_own_loop_writes_into_a_hugging_face_cache(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    inputs = batch()
    rows = []
    with torch.no_grad():
        for model in (hugging_face, ours):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            encoded = model.get_encoder()(**inputs)
            tokens = torch.zeros(3, 1, dtype=torch.long)
            for _ in range(6):
                out = model(
                    encoder_outputs=encoded,
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=tokens[:, -1:],
                    **{CACHE: cache},
                )
                assert out[CACHE] is cache
                tokens = torch.cat((tokens, out.logits[:, -1:].argmax(-1)), 1)
            assert cache.get_seq_length() == 6
            rows.append(tokens.tolist())
    assert rows[0] == rows[1]


def test_generate_with_a_hugging_face_cache_given(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    results = []
    for model in (hugging_face, ours):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        results.append(model.generate(**batch(), **{CACHE: cache}, max_new_tokens=8).tolist())
    assert results[0] == results[1]


def test_returned_cache_continues(v11: tuple[Any, Any]) -> None:
    """return_dict_in_generate hands out the cache; it holds every token but the last."""
    _, ours = v11
    out = ours.generate(**batch(), max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True)
    assert out[CACHE].get_seq_length() == 8


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_attention_maps_and_states_come_from_the_hugging_face_model(v11: tuple[Any, Any], name: str) -> None:
    hugging_face, ours = make_hugging_face("t5-v1.1", attention="eager"), v11[1]
    request = {**batch(), "max_new_tokens": 5, "return_dict_in_generate": True, name: True}
    got, expected = ours.generate(**request), hugging_face.generate(**request)
    assert got.sequences.tolist() == expected.sequences.tolist()
    key = "cross_attentions" if name == "output_attentions" else "decoder_hidden_states"
    assert len(got[key]) == 5 and len(got[key][0]) >= 2
    torch.testing.assert_close(got[key], expected[key], atol=HIDDEN_ATOL, rtol=1e-5)
    strict = TRTT5ForConditionalGeneration.from_model(hugging_face, strict=True)
    with pytest.raises(StrictModeError, match=name):
        strict.generate(**request)


def test_two_requests_interleaved(v11: tuple[Any, Any]) -> None:
    """Each request has its own buffers: stepping two by turns changes neither."""
    _, ours = v11
    batches = [batch(2, 7, seed=1), batch(3, 12, seed=2)]
    alone = [ours.generate(**inputs, max_new_tokens=6, min_new_tokens=6).tolist() for inputs in batches]
    with torch.no_grad():
        encoded = [ours.get_encoder()(**inputs) for inputs in batches]
        tokens = [torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long) for inputs in batches]
        caches: list[Any] = [None, None]
        for _ in range(6):
            for index in (0, 1):
                out = ours(
                    encoder_outputs=encoded[index],
                    attention_mask=batches[index]["attention_mask"],
                    decoder_input_ids=tokens[index][:, -1:],
                    **{CACHE: caches[index]},
                )
                caches[index] = out[CACHE]
                logits = out.logits[:, -1]
                logits[:, 1] = -torch.inf
                tokens[index] = torch.cat((tokens[index], logits.argmax(-1, keepdim=True)), 1)
    assert [rows.tolist() for rows in tokens] == alone
    assert isinstance(encoded[0], EngineEncoderOutput)


class Interrupt(Recorder):
    """Ctrl-C while the third token is shown."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.pieces) == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_interrupted_request_leaves_a_usable_model(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    if engine == "stand-in":
        ours.session = stand_in_session(ours, monkeypatch)
    expected = hugging_face.generate(**batch(), max_new_tokens=12).tolist()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ours.generate(**batch(), max_new_tokens=12, streamer=Interrupt())
        assert ours.generate(**batch(), max_new_tokens=12).tolist() == expected
    if engine == "stand-in":  # buffers came back
        assert sum(len(slots) for slots in ours.session._slots.idle.values()) == 1
