"""``/generate`` over HTTP: the settings of `generate()`, and what is said of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import ROOT
from tests.http_server import Client
from tests.serving.http.conftest import Alone

LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 5},
        {"num_beams": 3, "length_penalty": 0.4, "early_stopping": True},
        {"do_sample": True, "temperature": 2.0, "top_k": 5},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[35]], "suppress_tokens": None},
        {"do_sample": True, "num_beams": 2, "min_new_tokens": 12},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_do_what_they_do_in_generate(client: Client, alone: Alone, settings: dict[str, Any]) -> None:
    seed = {"seed": 8} if settings.get("do_sample") else {}
    wanted = [alone(line, **seed, **settings)[0] for line in LINES[:3]]
    assert client.ask("/generate", {"text": LINES[0], **seed, **settings})[1]["text"] == wanted[0]
    status, answer = client.ask("/generate", {"texts": LINES[:3], **seed, **settings})
    assert status == 200 and answer["texts"] == wanted
    assert answer["usage"]["completion_tokens"] > 10
    *pieces, last = client.events("/generate", {"text": LINES[0], **seed, **settings})
    assert "".join(piece["text"] for piece in pieces) == wanted[0]
    assert last["finish_reason"] == ("length" if "max_new_tokens" in settings else "stop")
    assert last["usage"]["total_tokens"] > last["usage"]["prompt_tokens"] > 5


def test_several_results_of_a_text(client: Client, alone: Alone) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 3}
    wanted = [alone(line, **settings) for line in LINES[:2]]
    assert client.ask("/generate", {"text": LINES[0], **settings})[1]["text"] == wanted[0]
    answer = client.ask("/generate", {"texts": LINES[:2], **settings})[1]
    assert answer["texts"] == wanted
    sampled = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3, "seed": 1}
    assert client.ask("/generate", {"text": LINES[0], **sampled})[1]["text"] == alone(LINES[0], **sampled)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either text"),
        ({"text": "a", "texts": ["a"]}, "either text"),
        ({"texts": []}, "texts"),
        ({"text": 5}, "text"),
        ({"text": "a", "seed": 2**80}, "seed"),
        ({"text": "a", "temprature": 1}, "temprature"),
        ({"text": "a", "_from_model_config": True}, "underscore"),
        ({"text": "a", "temperature": "warm", "do_sample": True}, "temperature"),
        ({"text": "a", "num_beams": 0}, "settings cannot be run"),
        ({"text": "a", "num_beams": 10**9}, "at most 16"),
        ({"text": "a", "num_return_sequences": 17, "do_sample": True}, "at most 16"),
        ({"text": "a", "num_beams": 2, "length_penalty": "x"}, "settings cannot be run"),
        ({"text": "a", "forced_bos_token_id": 10**6}, "expected ids below"),
        ({"text": "a", "decoder_start_token_id": 10**6}, "expected ids from 0"),
        ({"text": "a", "max_new_tokens": 5001}, "at most 5000"),
        ({"text": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"text": "a", "max_new_tokens": "many"}, "settings cannot be run"),
        ({"text": "a", "eos_token_id": "x"}, "settings cannot be run"),
        ({"text": "a", "stop_strings": "b"}, "stop_strings"),
        ({"text": "a", "output_scores": True}, "output_scores"),
        ({"texts": ["a", "b"], "stream": True}, "one result"),
        ({"text": "a", "num_return_sequences": 2, "num_beams": 2, "stream": True}, "one result"),
        ({"texts": ["a"] * 17}, "at most 16"),
        ({"text": "あ" * 100}, "expected at most 90"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_bodies_are_refused_in_words(client: Client, body: dict[str, Any], words: str) -> None:
    status, answer = client.ask("/generate", body)
    assert status == 400 and words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_bad_settings_of_one_leave_the_others_alone(client: Client, alone: Alone) -> None:
    connection = client.open("/generate", {"text": "さくら", "min_new_tokens": 300, "max_new_tokens": 300})
    for bad in ({"decoder_start_token_id": -1}, {"forced_bos_token_id": 10**6}, {"num_beams": 0}):
        assert client.ask("/generate", {"text": "a", **bad})[0] == 400
    assert connection.getresponse().status == 200
    connection.close()


def test_schema_has_the_bodies(client: Client) -> None:
    for _ in range(2):  # it is made once
        status, schema = client.ask("/openapi.json")
        assert status == 200
        for path, name, setting in (
            ("/generate", "GenerateBody", "texts"),
            ("/v1/completions", "CompletionBody", "prompt"),
        ):
            body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert body == {"$ref": f"#/components/schemas/{name}"}
            assert setting in schema["components"]["schemas"][name]["properties"]
        assert "get" in schema["paths"]["/health/ready"]
