"""``/v1`` as OpenAI's clients use it, over HTTP: texts equal those of `generate()` alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.http_server import Client
from tests.serving.http.conftest import Alone
from tests.serving_requests import until

LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
PATH = "/v1/completions"
UNLIKELY = {"max_tokens": 40, "temperature": 2, "seed": 5}


def joined(events: list[Any]) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_answer_has_the_form_of_openai(client: Client, alone: Alone, shipped: tuple[Any, Any, Any]) -> None:
    status, answer = client.ask(PATH, {"model": "kana", "prompt": LINES[0]})
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "kana"
    assert answer["id"].startswith("cmpl-") and answer["created"] > 1e9
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": alone(LINES[0])[0], "logprobs": None, "finish_reason": "stop"}
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(shipped[0](LINES[0])["input_ids"])
    assert 1 < usage["completion_tokens"] == usage["total_tokens"] - usage["prompt_tokens"]


def test_prompts_of_every_form(client: Client, alone: Alone, shipped: tuple[Any, Any, Any]) -> None:
    ids = [shipped[0](line)["input_ids"] for line in LINES[:2]]
    wanted = [alone(line)[0] for line in LINES[:2]]
    for prompt, expected in ((LINES[:2], wanted), (ids, wanted), (ids[1], wanted[1:]), (LINES[1], wanted[1:])):
        status, answer = client.ask(PATH, {"prompt": prompt})
        assert status == 200
        assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(expected))


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, {}),
        ({"max_tokens": 4}, {"max_new_tokens": 4}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False, "num_beams": 1}),
        ({"temperature": 0.001, "seed": 1}, {"do_sample": False}),
        ({"top_p": 1, "seed": 1}, {}),
        ({"temperature": 1.5, "seed": 4}, {"do_sample": True, "temperature": 1.5, "seed": 4}),
        ({"top_p": 0.7, "seed": 9}, {"do_sample": True, "top_p": 0.7, "seed": 9}),
        (
            {"temperature": 2, "top_p": 0.9, "seed": -3},
            {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "seed": -3},
        ),
    ],
    ids=str,
)
def test_settings_are_those_of_generate(
    client: Client, alone: Alone, asked: dict[str, Any], settings: dict[str, Any]
) -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0}
    body = {"prompt": LINES[3], **asked, **neutral, "logit_bias": {}, "suffix": None, "user": "somebody"}
    status, answer = client.ask(PATH, body)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == alone(LINES[3], **settings)[0]
    assert joined(client.events(PATH, body)) == {0: answer["choices"][0]["text"]}


def test_n_results_have_the_seeds_that_follow(client: Client, alone: Alone) -> None:
    status, answer = client.ask(PATH, {"prompt": LINES[:2], "n": 3, **UNLIKELY})
    assert status == 200
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 40}
    wanted = [alone(line, seed=5 + number, **settings)[0] for line in LINES[:2] for number in range(3)]
    assert [choice["text"] for choice in answer["choices"]] == wanted and len(set(wanted)) > 2
    events = client.events(PATH, {"prompt": LINES[:2], "n": 3, **UNLIKELY})
    assert joined(events) == dict(enumerate(wanted)) and events[-1] == "[DONE]"


def test_finish_reason_and_the_number_of_tokens(client: Client) -> None:
    for stream in (False, True):
        for limit, reason in ((3, "length"), (90, "stop")):
            body = {"prompt": "さくら", "max_tokens": limit}
            if stream:
                *events, last, _ = client.events(PATH, {**body, "stream_options": {"include_usage": True}})
                assert all(event["usage"] is None for event in events)
                assert last["choices"] == [] and events[-1]["choices"][0]["finish_reason"] == reason
                assert {event["choices"][0]["finish_reason"] for event in events[:-1]} == {None}
                usage = last["usage"]
            else:
                answer = client.ask(PATH, body)[1]
                assert answer["choices"][0]["finish_reason"] == reason
                usage = answer["usage"]
            assert usage == {"prompt_tokens": 5, "completion_tokens": min(limit, 5), "total_tokens": 5 + min(limit, 5)}


@pytest.mark.parametrize("stop", ["ku", ["x", "kur"], ["ra"], "ak", ["sakura"], ["nothing like it"]])
def test_text_ends_before_a_stop(client: Client, alone: Alone, stop: Any) -> None:
    """Also one that begins within a token or takes several; nothing of it is streamed."""
    stops = [stop] if isinstance(stop, str) else stop
    whole = alone("さくら")[0]
    wanted = min((whole.partition(each)[0] for each in stops), key=len)
    body = {"prompt": "さくら", "stop": stop}
    status, answer = client.ask(PATH, body)
    assert status == 200 and whole == "sakura"
    assert answer["choices"][0]["text"] == wanted and answer["choices"][0]["finish_reason"] == "stop"
    events = client.events(PATH, {**body, "stream_options": {"include_usage": True}})
    assert joined(events) == {0: wanted} and events[-2]["usage"] == answer["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_frees_its_row(client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """While another result of the request goes on."""
    engine = client.service.engine
    monkeypatch.setattr(client.service.model.generation_config, "eos_token_id", None)
    body = {"prompt": ["さくら", "がっこう"], "stop": "sak", "max_tokens": 2000, "temperature": 0, "stream": stream}
    before = engine.stats()
    connection = client.open(PATH, body)
    until(lambda: engine.stats().cancelled == before.cancelled + 1)
    assert engine.stats().running == 1 and engine.stats().steps - before.steps < 1000
    connection.close()
    until(lambda: engine.stats().running == 0)


def test_32_clients_in_parallel_get_the_texts_of_generate(client: Client, alone: Alone) -> None:
    texts = ["".join(LINES[place : place + 1 + place % 3]) for place in range(32)]
    limit = {"max_tokens": 60}

    def ask(place: int) -> str:
        body = {"prompt": texts[place], **limit}
        if place % 2:
            return joined(client.events(PATH, body))[0]
        return str(client.ask(PATH, body)[1]["choices"][0]["text"])

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    assert found == [alone(text, max_new_tokens=60)[0] for text in texts]


def test_models(client: Client) -> None:
    status, answer = client.ask("/v1/models")
    assert status == 200 and answer["object"] == "list" and [model["id"] for model in answer["data"]] == ["kana"]
    assert client.ask("/v1/models/kana") == (200, answer["data"][0])
    assert client.ask("/v1/models/other")[0] == 404


def test_openai_client(client: Client, alone: Alone) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install 't5-trt[dev]'")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["kana"] and api.models.retrieve(
            "kana"
        ).owned_by == "t5_trt"
        made = api.completions.create(
            model="kana", prompt=LINES[:2], max_tokens=50, temperature=0.8, n=2, seed=3, top_p=0.9
        )
        settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 50}
        wanted = [alone(line, seed=seed, **settings)[0] for line in LINES[:2] for seed in (3, 4)]
        assert [choice.text for choice in made.choices] == wanted
        assert made.usage.completion_tokens > 20
        stream = api.completions.create(
            model="kana", prompt=LINES[0], stop=["."], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        assert text == alone(LINES[0])[0].partition(".")[0] and chunks[-1].usage.completion_tokens > 3
        with pytest.raises(openai.NotFoundError, match="one model, 'kana'"):
            api.completions.create(model="gpt", prompt="a")
        with pytest.raises(openai.BadRequestError, match="logprobs is not supported") as caught:
            api.completions.create(model="kana", prompt="a", logprobs=2)
        assert caught.value.param == "logprobs" and caught.value.code == "invalid_request"
