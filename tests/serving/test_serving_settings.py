"""Which inputs and settings the engine takes, and what it says about the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from t5_trt.errors import BackendError, InputError
from t5_trt.serving import Engine
from t5_trt.serving.choice import TokenChoice
from t5_trt.serving.settings import SettingsReader
from tests.serving_requests import alone, source
from tests.tiny_models import VOCAB

IDS = [5, 9, 2, 44]
PATIENCE_S = 60


@pytest.fixture
def engine(v11: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(v11[1], max_rows=2) as made:
        yield made


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": [[7], [8, 9]]},
        {"suppress_tokens": [3, 4, 5]},
        {"forced_eos_token_id": 1},
        {"forced_bos_token_id": 17},
        {"sequence_bias": [[[10], 5.0]]},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"max_length": 9},
        {"min_length": 8, "max_length": 12},
        {"decoder_start_token_id": 3},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "renormalize_logits": True},
        {"num_beams": 3, "do_sample": True, "length_penalty": 0.5, "early_stopping": True},
        {"generation_config": GenerationConfig(max_new_tokens=6, repetition_penalty=1.5)},
        {"generation_config": GenerationConfig(max_new_tokens=6), "max_new_tokens": 4},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_do_what_they_do_in_generate(engine: Engine, v11: tuple[Any, Any], settings: dict[str, Any]) -> None:
    found = engine.submit(IDS, seed=11, **settings).result(PATIENCE_S)
    torch.manual_seed(11)
    assert torch.equal(found, v11[1].generate(torch.tensor([IDS]), **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"output_scores": True},
        {"return_dict_in_generate": True},
        {"max_time": 3.0},
        {"stop_strings": ["a"]},
        {"use_cache": False},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
        {"guidance_scale": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6},
        {"num_beam_groups": 2},
        {"force_words_ids": [[3]]},
        {"logits_processor": LogitsProcessorList()},
        {"streamer": object()},
        {"decoder_input_ids": torch.tensor([[0, 3]])},
        {"max_new_token": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_rows_cannot_serve_are_refused_by_name(engine: Engine, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        engine.submit(IDS, **settings)
    assert engine.stats().waiting == 0


def test_processors_of_the_users_are_refused_by_name(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(LogitsProcessor):
        """It may keep something from call to call."""

    monkeypatch.setattr(type(fresh), "_get_logits_processor", lambda *args, **kwargs: LogitsProcessorList([Mine()]))
    with Engine(fresh) as engine, pytest.raises(InputError, match="Mine"):
        engine.submit(IDS)


def test_settings_of_the_model_are_refused_by_name_too(fresh: Any) -> None:
    with Engine(fresh) as engine:
        fresh.generation_config.encoder_no_repeat_ngram_size = 2
        with pytest.raises(InputError, match="encoder_no_repeat_ngram_size=2"):
            engine.submit(IDS)
        fresh.generation_config.encoder_no_repeat_ngram_size = None
        with pytest.raises(InputError, match="max_time=2"):
            engine.submit(IDS, GenerationConfig(max_time=2))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0, "do_sample": True}, {"min_p": 3.0, "do_sample": True}, {"repetition_penalty": -1.0}],
)
def test_values_are_checked_by_transformers(engine: Engine, v11: tuple[Any, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as expected:
        v11[0].generate(torch.tensor([IDS]), **settings)
    with pytest.raises(ValueError) as found:
        engine.submit(IDS, **settings)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "inputs",
    [
        "text",
        [],
        [[1, 2], [3, 4]],
        [1, VOCAB],
        [0.5],
        {"attention_mask": [[1]]},
        {"input_ids": [[1, 2]], "attention_mask": [[1]]},
        None,
    ],
)
def test_inputs_that_are_no_source_are_refused(engine: Engine, inputs: Any) -> None:
    with pytest.raises(InputError):
        engine.submit(inputs)


def test_equal_settings_are_prepared_once(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, calls = SettingsReader(v11[1]), []
    request = reader._request
    monkeypatch.setattr(reader, "_request", lambda arguments: calls.append(arguments) or request(arguments))
    for limit in (4, 5, 4, 5):
        assert reader.read(None, {"max_new_tokens": limit}).limit == 1 + limit
    assert len(calls) == 2


def test_changed_defaults_of_the_model_are_noticed(fresh: Any) -> None:
    reader = SettingsReader(fresh)
    before = reader.read(None, {}).limit
    fresh.generation_config.max_length = before + 3
    assert reader.read(None, {}).limit == before + 3


@pytest.mark.parametrize("arguments", [{"max_rows": 0}, {"max_waiting": 0}, {"max_rows": 1.5}])
def test_sizes_without_meaning_are_refused(v11: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="positive number"):
        Engine(v11[1], **arguments)


def test_only_models_on_a_backend_with_rows_are_served(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected a TRTT5ForConditionalGeneration"):
        Engine(v11[0])

    class Other:
        backend = "tensorrt"

    monkeypatch.setattr(type(v11[1]), "session", Other())
    with pytest.raises(BackendError, match="backend 'tensorrt'"):
        Engine(v11[1])


def test_a_timeout_is_positive(engine: Engine) -> None:
    with pytest.raises(InputError, match="timeout got 0"):
        engine.submit(IDS, timeout=0)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_first_token_outside_the_vocabulary_is_refused(engine: Engine, token: int, num_beams: int) -> None:
    """It would fail the decoder step, and so the requests of all rows."""
    beside = engine.submit(IDS, max_new_tokens=200, min_new_tokens=200)
    with pytest.raises(InputError, match="decoder_start_token_id got the id"):
        engine.submit(IDS, decoder_start_token_id=token, num_beams=num_beams)
    assert len(beside.result(PATIENCE_S)[0]) == 201


@pytest.mark.parametrize("ends", [1, [*range(1, 150), 5000], 5000])
def test_least_lengths_cost_no_processor(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, ends: Any) -> None:
    def unexpected(*args: Any) -> None:
        raise AssertionError("a processor was called")

    monkeypatch.setattr(TokenChoice, "_choose", unexpected)
    settings = [
        {"eos_token_id": ends, "max_new_tokens": 30, **least}
        for least in ({"min_new_tokens": 12}, {"min_length": 20}, {"min_length": 5, "min_new_tokens": 9}, {})
    ]
    with Engine(v11[1], max_rows=3) as engine:
        handles = [engine.submit(source(seed), **each) for seed in range(3) for each in settings]
        found = [handle.result(PATIENCE_S) for handle in handles]
    monkeypatch.undo()
    wanted = [alone(v11[1], source(seed), **each) for seed in range(3) for each in settings]
    assert all(map(torch.equal, found, wanted))
