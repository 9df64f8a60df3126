"""Requests like an earlier one: Transformers prepares them once, and results stay the Hugging Face class's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from t5_trt import InputError, TRTT5ForConditionalGeneration
from t5_trt.generation.prepared import request_key
from t5_trt.generation.request import GenerationPath, StepCheck
from tests.cases import CORE, MORE, OTHER_LOOP, assert_same
from tests.tiny_models import batch, make_hugging_face

ALL = {**CORE, **MORE}
#: what is a number and leaves a result of tokens alone, and so is prepared once
ONCE = {
    name
    for name, arguments in ALL.items()
    if name not in OTHER_LOOP
    and all(isinstance(value, int | float | None) for value in arguments.values())
    and not {"return_dict_in_generate", "max_time"} & arguments.keys()
    and not {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "eta_cutoff", "top_h"} & arguments.keys()
}


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry whenever Transformers prepares a request of any model."""
    calls: list[int] = []
    real = GenerationMixin._prepare_generation_config

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", counting)
    return calls


def both(pair: tuple[Any, Any], seed: int, rows: int = 3, tokens: int = 11, **arguments: Any) -> list[Any]:
    """What Hugging Face model and ours make of one request."""
    results = []
    for model in pair:
        torch.manual_seed(seed)
        request = {**batch(rows, tokens, seed), "max_new_tokens": 12, **arguments}
        results.append(model.generate(**{name: copy.copy(value) for name, value in request.items()}))
    return results


def new_pair(kind: str = "t5-v1.1") -> tuple[Any, Any]:
    hugging_face = make_hugging_face(kind)
    return hugging_face, TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)


@pytest.mark.parametrize("name", list(ALL))
def test_first_and_repeated_requests_generate_as_hugging_face(
    v11: tuple[Any, Any], name: str, prepared: list[int]
) -> None:
    """Other texts, of other lengths; only the requests of `ONCE` are prepared once."""
    for seed, tokens in ((5, 11), (7, 20)):
        expected, got = both(v11, seed, tokens=tokens, **ALL[name])
        assert_same(got, expected)
        reason = OTHER_LOOP.get(name, "")
        assert v11[1].last_generation_path == GenerationPath("transformers" if reason else "device", reason)
    del prepared[:]
    torch.manual_seed(8)
    v11[1].generate(**batch(3, 9, 8), **{"max_new_tokens": 12, **ALL[name]})
    assert len(prepared) == (0 if name in ONCE else 1)


def test_most_requests_are_prepared_once() -> None:
    assert (
        len(ONCE) > 30 and {"greedy", "sampling", "beams", "beam sampling", "sampling, several", "temperature"} <= ONCE
    )


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
def test_other_families(kind: str, prepared: list[int]) -> None:
    pair = new_pair(kind)
    for seed in (3, 4):
        for arguments in ({}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.8}):
            expected, got = both(pair, seed, **arguments)
            assert got.tolist() == expected.tolist()
    assert len(prepared) == 6 + 3


def test_changed_settings_are_followed(prepared: list[int]) -> None:
    pair = new_pair()
    for number, (name, value) in enumerate(
        [
            ("max_new_tokens", None), ("num_beams", 3), ("repetition_penalty", 1.8), ("eos_token_id", [1, 9, 20, 33, 60, 90, 120]),
            ("pad_token_id", 4), ("decoder_start_token_id", 7), ("suppress_tokens", list(range(2, 90))), ("num_beams", 1),
        ]
    ):  # fmt: skip
        for model in pair:
            setattr(model.generation_config, name, value)
        for seed in (number, number + 50):
            expected, got = both(pair, seed)
            assert got.tolist() == expected.tolist(), name
    pair[1].generation_config.suppress_tokens.append(91)  # in place
    pair[0].generation_config.suppress_tokens = list(range(2, 92))
    expected, got = both(pair, 77)
    assert got.tolist() == expected.tolist()
    del prepared[:]
    pair[1].config.dropout_rate = 0.25
    both((pair[1], pair[1]), 78)
    assert len(prepared) == 1


def test_equal_calls_have_equal_keys() -> None:
    """1, 1.0 and True are one key of a dict, but not one setting; the order of arguments does not count."""
    inputs = batch()
    kinds = {request_key(None, {**inputs, "early_stopping": value}) for value in (1, True, 1.0, 0, False, None)}
    assert len(kinds) == 6 and None not in kinds
    first, second = {"top_k": 5, "do_sample": True}, {"do_sample": True, "top_k": 5}
    assert request_key(None, {**inputs, **first}) == request_key(None, {**second, **batch(3, 20)})
    assert request_key(None, inputs) != request_key(None, batch(4))
    assert request_key(inputs["input_ids"], {"attention_mask": inputs["attention_mask"]}) == request_key(None, inputs)
    others = [{"attention_mask": None}, {"attention_mask": inputs["attention_mask"].bool()}, {"eos_token_id": [1]}]
    others += [{"input_ids": inputs["input_ids"].int()}, {"attention_mask": inputs["attention_mask"][:, 1:]}]
    assert [request_key(None, {**inputs, **other}) for other in others] == [None] * 5


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["tokens", "beams", "other loop"]
)
def test_a_check_between_steps_can_end_a_call_and_costs_no_preparation(
    prepared: list[int], arguments: dict[str, Any]
) -> None:
    _, ours = new_pair()
    request = {**batch(), "max_new_tokens": 6, "min_new_tokens": 6, **arguments}
    expected = ours.generate(**request)
    calls: list[int] = []

    def checked(last: int) -> StoppingCriteriaList:
        def check() -> None:
            calls.append(1)
            if len(calls) == last:
                raise ZeroDivisionError("nobody waits")

        calls.clear()
        return StoppingCriteriaList([StepCheck(check)])

    assert torch.equal(ours.generate(**request, stopping_criteria=checked(7)), expected) and len(calls) == 6
    for last in (1, 3):
        with pytest.raises(ZeroDivisionError, match="nobody waits"):
            ours.generate(**request, stopping_criteria=checked(last))
        assert len(calls) == last
    assert torch.equal(ours.generate(**request), expected) and len(calls) == 3
    assert len(prepared) == (5 if "use_cache" in arguments else 1)


def test_requests_that_are_prepared_every_time(prepared: list[int]) -> None:
    _, ours = new_pair()

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            """Take nothing."""

        def end(self) -> None:
            """Nor here."""

    inputs = batch()
    calls: list[dict[str, Any]] = [
        {"max_time": 100.0},
        {"streamer": Streamer(), "input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]},
        {"return_dict_in_generate": True},
        {"generation_config": ours.generation_config},
        {"attention_mask": None},
        {"decoder_input_ids": torch.tensor([[0, 5]] * 3)},
        {"eos_token_id": [1, 7]},
    ]
    for arguments in calls:
        del prepared[:]
        for _ in range(3):
            ours.generate(**{**inputs, "max_new_tokens": 3, **arguments})
        assert len(prepared) == 3, arguments


def test_ids_as_the_first_argument(v11: tuple[Any, Any], prepared: list[int]) -> None:
    inputs = batch()
    ids, rest = inputs["input_ids"], {"attention_mask": inputs["attention_mask"], "max_new_tokens": 5}
    expected = [model.generate(ids, **rest).tolist() for model in (*v11, v11[1])]
    assert expected[0] == expected[1] == expected[2]
    assert v11[1].generate(input_ids=ids, **rest).tolist() == expected[0]


def test_wrong_input_is_refused_after_an_equal_request(prepared: list[int]) -> None:
    _, ours = new_pair()
    expected = ours.generate(**batch(), max_new_tokens=5).tolist()
    wrong = batch()
    wrong["input_ids"] = wrong["input_ids"] + 10**6
    with pytest.raises(InputError, match="ids from 0 to"):
        ours.generate(**wrong, max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_token"):
        ours.generate(**batch(), max_new_token=5)
    del prepared[:]
    assert ours.generate(**batch(), max_new_tokens=5).tolist() == expected and not prepared


def test_user_code_is_called_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass, an exchanged method of one instance, hooks on the model and on its encoder."""
    calls: list[str] = []

    class Mine(TRTT5ForConditionalGeneration):
        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("subclass")
            return super()._get_logits_processor(*args, **kwargs)

    hugging_face = make_hugging_face("t5-v1.1")
    derived, plain = (kind.from_model(hugging_face, num_threads=1) for kind in (Mine, TRTT5ForConditionalGeneration))
    for _ in range(3):
        derived.generate(**batch(), max_new_tokens=3)
        plain.generate(**batch(), max_new_tokens=3)
    assert calls == ["subclass"] * 3
    hook = plain.get_encoder().register_forward_hook(lambda *args: calls.append("encoder"))
    plain.generate(**batch(), max_new_tokens=3)
    hook.remove()
    hook = plain.register_forward_hook(lambda *args: calls.append("model"))
    plain.generate(**batch(), max_new_tokens=3)
    hook.remove()
    assert calls[3] == "encoder" and "model" in calls[4:]
    real = plain._get_stopping_criteria
    plain._get_stopping_criteria = lambda *args, **kwargs: calls.append("instance") or real(*args, **kwargs)
    for _ in range(2):
        plain.generate(**batch(), max_new_tokens=3)
    assert calls[-2:] == ["instance"] * 2


def test_exchanged_methods_of_classes_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler plugins patch Transformers' own class, often after a model was used, and take it back."""
    hugging_face, ours = new_pair()
    plain = ours.generate(**batch(), max_new_tokens=6).tolist()
    real = GenerationMixin._get_logits_processor

    def suppressing(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["generation_config"].suppress_tokens = list(range(2, 120))
        return real(self, *args, **kwargs)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "_get_logits_processor", suppressing)
            patched = [model.generate(**batch(), max_new_tokens=6).tolist() for model in (hugging_face, ours, ours)]
        assert patched[0] == patched[1] == patched[2] != plain
        assert ours.generate(**batch(), max_new_tokens=6).tolist() == plain


class Reversing(torch.nn.Module):
    """An encoder that reads texts backwards."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids.flip(1), **kwargs)


def test_exchanged_encoder_is_used() -> None:
    """Whoever gives a model another encoder does so by `get_encoder`."""
    pair = new_pair()
    for model in pair:
        model.generate(**batch(), max_new_tokens=6)
        reversing = Reversing(model.get_encoder())
        model.get_encoder = lambda *args, encoder=reversing, **kwargs: encoder
    results = [model.generate(**batch(), max_new_tokens=6).tolist() for model in (*pair, pair[1])]
    assert results[0] == results[1] == results[2]


def test_settings_that_cannot_be_compared(prepared: list[int]) -> None:
    """Tensors and objects: such calls are prepared every time."""
    ends = torch.tensor([1, 9, 20, 33, 60, 90, 120])
    for change in (
        lambda model: setattr(model.generation_config, "eos_token_id", ends),
        lambda model: setattr(model.config, "class_weights", torch.tensor([0.2, 0.8])),
        lambda model: setattr(model.config, "tokenizer", object()),
    ):
        pair = new_pair()
        both(pair, 1)
        for model in pair:
            change(model)
        del prepared[:]
        for seed in (1, 2, 3):
            expected, got = both(pair, seed)
            assert got.tolist() == expected.tolist()
        assert len(prepared) == 6
        for model in pair:
            model.generation_config.eos_token_id = [1, 9]
            vars(model.config).pop("class_weights", None)
            vars(model.config).pop("tokenizer", None)
        both(pair, 4)
        del prepared[:]
        expected, got = both(pair, 5)
        assert got.tolist() == expected.tolist() and len(prepared) == 1


def test_types_of_settings_count(prepared: list[int]) -> None:
    """True and 1 are equal, but end a beam search differently."""
    pair = new_pair()
    for value in (True, 1, True):
        for model in pair:
            model.generation_config.early_stopping = value
        expected, got = both(pair, 9, num_beams=4)
        assert got.tolist() == expected.tolist()
    assert len(prepared) == 6


def test_settings_changed_while_a_request_runs(prepared: list[int]) -> None:
    """What was prepared from others is not kept for those."""
    _, ours = new_pair()
    ours.generation_config.max_new_tokens = 5
    hook = ours.get_encoder().register_forward_hook(lambda *args: setattr(ours.generation_config, "max_new_tokens", 9))
    assert ours.generate(**batch(1)).shape[1] == 6
    hook.remove()
    assert ours.generate(**batch(1), min_new_tokens=9).shape[1] == 10
    ours.generation_config.max_new_tokens = 5
    del prepared[:]
    assert ours.generate(**batch(1)).shape[1] == 6 and len(prepared) == 1


def test_errors_are_those_of_the_hugging_face_class() -> None:
    hugging_face, ours = new_pair()
    ours.generate(**batch(), max_new_tokens=3)
    inputs = batch()
    for model in (hugging_face, ours):
        with pytest.raises(ValueError, match="were passed alongside"):
            model.generate(inputs["input_ids"], **inputs, max_new_tokens=3)
        model.generation_config = None
        with pytest.raises(AttributeError):
            model.generate(**inputs, max_new_tokens=3)


def test_copies_begin_anew_and_kinds_are_limited(monkeypatch: pytest.MonkeyPatch, prepared: list[int]) -> None:
    monkeypatch.setattr("t5_trt.generation.prepared.KEPT", 2)
    _, ours = new_pair()
    results = {tokens: ours.generate(**batch(), max_new_tokens=tokens).tolist() for tokens in (3, 4, 5)}
    copies = (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours))
    for model, tokens, times in ((ours, 4, 0), (ours, 5, 0), (copies[0], 5, 1), (copies[1], 5, 1), (ours, 3, 1)):
        del prepared[:]
        assert model.generate(**batch(), max_new_tokens=tokens).tolist() == results[tokens]
        assert len(prepared) == times


def test_gradients_and_inference_mode(v11: tuple[Any, Any]) -> None:
    """A repeated request makes no graph of gradients, and its result belongs to the caller's mode."""
    expected = v11[0].generate(**batch(), max_new_tokens=8).tolist()
    for _ in range(2):
        with torch.inference_mode():
            inside = v11[1].generate(**batch(), max_new_tokens=8)
        outside = v11[1].generate(**batch(), max_new_tokens=8)
        assert inside.tolist() == outside.tolist() == expected and not outside.requires_grad
