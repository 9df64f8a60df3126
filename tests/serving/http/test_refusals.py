"""What the server refuses, and how: statuses, OpenAI's form of errors, limits, clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from t5_trt.errors import BackendError, EngineClosedError
from t5_trt.serving.http.limits import Limits
from t5_trt.serving.http.service import Service
from tests.http_server import Client, end, serving
from tests.serving_requests import until

PATH = "/v1/completions"
#: thousands of steps
LONG = {"text": "さくら", "min_new_tokens": 5000, "max_new_tokens": 5000}


@pytest.fixture
def small(shipped: tuple[Any, Any, Any]) -> Service:
    """Of one row, in which one more may wait."""
    tokenizer, _, ours = shipped
    return Service(ours, tokenizer, "kana", Limits(new_tokens=5000), max_rows=1, max_waiting=1)


@pytest.fixture
def few(small: Service) -> Iterator[Client]:
    with serving(small) as (made, _):
        yield made


def received(sent: socket.socket) -> bytes:
    """An answer with JSON of an error."""
    answer = b""
    while not answer.endswith(b"}}"):
        more = sent.recv(4000)
        assert more, answer
        answer += more
    return answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 5001}, "max_tokens"),
        ({"prompt": "a", "temperature": 2.5}, "temperature"),
        ({"prompt": "a", "top_p": -1}, "top_p"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["b", ""]}, "stop"),
        ({"prompt": "a", "stop": ["b"] * 17}, "stop"),
        ({"prompt": "a", "stop": "b" * 1001}, "stop"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "logprobs": False}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -1}, "frequency_penalty"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, "logit_bias"),
        ({"prompt": "a", "nothing": 1}, "nothing"),
        ({"prompt": "あ" * 100}, "prompt"),
        ({"prompt": [5] * 91}, "prompt"),
        ({"prompt": [10**6]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": [2**70]}, None),
        (b"[[[", None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b"[" * 15_000, None),
        (b"\xff\xfe", None),
        (b"5", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_requests_get_400_and_the_field(client: Client, body: Any, param: str | None) -> None:
    status, answer = client.ask(PATH, body)
    assert status == 400
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"] and error["code"]


def test_other_statuses_have_json_too(client: Client) -> None:
    assert client.ask(PATH, {"model": "other", "prompt": "a"})[1]["error"]["code"] == "model_not_found"
    found = [
        (client.ask(PATH, {"model": "other", "prompt": "a"})[0], 404),
        (client.ask("/v1/chat/completions", {"messages": []})[0], 404),
        (client.ask("/nothing")[0], 404),
        (client.ask(PATH)[0], 405),
        (client.ask(PATH, b"x" * 20_001)[0], 413),
        (client.ask(PATH, json.dumps({"prompt": "a"}).encode(), **{"Content-Type": "text/plain"})[0], 400),
    ]
    assert [status for status, _ in found] == [status for _, status in found]


def test_a_body_in_chunks_has_the_same_limit(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sent:
        sent.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(21):
            sent.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        answer = received(sent)
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"code":"body_too_large"' in answer


def test_a_slow_body_gets_408_and_a_slow_request_504(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, _, ours = shipped
    with serving(Service(ours, tokenizer, "kana", Limits(new_tokens=5000, seconds=0.8))) as (client, _):
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sent:
            sent.sendall(f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{".encode())
            answer = received(sent)
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"body_too_slow"' in answer
        for stop in ({}, {"num_beams": 2}):
            status, error = client.ask("/generate", {**LONG, **stop})
            assert (status, error["error"]["code"]) == (504, "timeout")
        *pieces, last = client.events("/generate", LONG)
        assert len(pieces) > 2 and last["error"]["code"] == "timeout"
        until(lambda: client.metric('t5_trt_errors_total{reason="timeout"}') == 3)


@pytest.mark.parametrize(("path", "body"), [(PATH, {"prompt": "a"}), ("/generate", {"text": "a"})])
def test_a_full_queue_gets_429_at_once(
    few: Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, str]
) -> None:
    connections = []
    for running, waiting in ((1, 0), (1, 1)):
        connections.append(few.open("/generate", LONG))
        until(
            lambda running=running, waiting=waiting: (
                (s := few.service.engine.stats()).running == running and s.waiting == waiting
            )
        )
    monkeypatch.setattr(few.service, "_tokenizer", None)  # what is refused is not tokenized
    begin = time.monotonic()
    status, headers, text = few.raw(path, body)
    assert (status, json.loads(text)["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1 and time.monotonic() - begin < 1
    assert few.raw(path, b"no JSON")[0] == 429  # nor read
    until(lambda: few.metric('t5_trt_errors_total{reason="queue_full"}') == 2)
    assert few.metric("t5_trt_running") == few.metric("t5_trt_waiting") == 1
    for connection in connections:
        connection.close()


def test_a_refused_part_of_a_request_ends_the_others(few: Client) -> None:
    """Of four texts two find no place: nothing of the request goes on."""
    status, _ = few.ask("/generate", {"texts": ["さくら"] * 4, "min_new_tokens": 5000, "max_new_tokens": 5000})
    assert status == 429
    until(lambda: few.service.engine.stats().running == 0 == few.service.engine.stats().waiting)


@pytest.mark.parametrize(
    "body", [LONG, {**LONG, "stream": True}, {**LONG, "num_beams": 2}], ids=["whole", "stream", "beams"]
)
def test_a_client_that_leaves_frees_its_row(few: Client, body: dict[str, Any]) -> None:
    engine = few.service.engine
    connection = few.open("/generate", body)
    until(lambda: engine.stats().running == 1)
    waiting = few.open("/generate", body)
    until(lambda: engine.stats().waiting == 1)
    if body.get("stream"):
        assert connection.getresponse().read(6) == b"data: "
    waiting.close()
    connection.close()
    until(lambda: (stats := engine.stats()).running == stats.waiting == 0)
    stats = engine.stats()
    assert stats.tokens < 4000 and stats.completed <= 1  # the warm-up
    assert stats.cancelled == 2
    until(lambda: few.metric('t5_trt_requests_total{route="/generate",status="499"}') == 2)
    assert few.ask(PATH, {"prompt": "さくら"})[1]["choices"][0]["text"] == "sakura"


def test_a_row_is_free_two_steps_after_its_client_was_seen_to_leave(
    few: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = few.service.engine, []
    from t5_trt.serving.handle import Handle

    cancel = Handle.cancel

    def cancelled(handle: Handle) -> None:
        seen.append(engine.stats().steps)
        cancel(handle)

    monkeypatch.setattr(Handle, "cancel", cancelled)
    connection = few.open("/generate", LONG)
    until(lambda: engine.stats().running == 1)
    connection.close()
    until(lambda: engine.stats().running == 0)
    assert engine.stats().steps - seen[0] <= 2 and engine.stats().tokens < 4000


def test_unexpected_errors_say_nothing_of_themselves(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise BackendError("a secret text")

    monkeypatch.setattr(client.service.engine, "submit", fail)
    status, answer = client.ask(PATH, {"prompt": "a"})
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (500, "internal_error", "server_error")
    assert "secret" not in json.dumps(answer)


def test_end_lets_running_requests_end_and_refuses_new_ones(small: Service) -> None:
    with serving(small, grace=30.0) as (client, server):
        running = client.open("/generate", {**LONG, "max_new_tokens": 1500, "min_new_tokens": 1500})
        until(lambda: small.engine.stats().running == 1)
        end(server, small)
        for path, body in ((PATH, {"prompt": "a"}), ("/generate", {"text": "a"})):
            status, headers, text = client.raw(path, body)
            assert (status, json.loads(text)["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in headers
        assert client.ask("/health/ready")[0] == 503 and client.ask("/health/live")[0] == 200
        answer = running.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 1500


def test_what_runs_longer_than_the_grace_ends_with_503(small: Service) -> None:
    with serving(small, grace=0.1) as (client, server):
        running = client.open("/generate", LONG)
        until(lambda: small.engine.stats().running == 1)
        waiting = client.open("/generate", {**LONG, "stream": True})
        until(lambda: small.engine.stats().waiting == 1)
        end(server, small)
        for connection in (running, waiting):
            answer = connection.getresponse()
            assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "shutting_down"
    with pytest.raises(EngineClosedError):
        small.engine.submit([5])


def test_ready_after_all_rows_were_filled_once(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, _, ours = shipped
    service = Service(ours, tokenizer, "kana", Limits(), max_rows=5)
    assert not service.ready
    with serving(service) as (client, _):
        until(lambda: service.engine.stats().completed == 5)
        assert client.ask("/health/ready") == (200, {"status": "ready"})
        service.ready = False
        status, answer = client.ask("/health/ready")
        assert (status, answer["error"]["code"]) == (503, "not_ready")


def test_health_tells_of_an_engine_that_has_ended(few: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that can neither step nor make its rows again, as a GPU after some errors."""

    def fails(*_: Any, **__: Any) -> Any:
        raise BackendError("illegal address")

    assert few.ask("/health/live")[0] == few.ask("/health/ready")[0] == 200
    for method in ("step_rows", "row_buffers"):
        monkeypatch.setattr(few.service.model.session, method, fails)
    assert few.ask("/generate", {"text": "a"})[0] == 500
    until(lambda: few.service.engine.closed)
    found = {path: few.ask(f"/health/{path}") for path in ("live", "ready")}
    assert {path: (status, answer["error"]["code"]) for path, (status, answer) in found.items()} == {
        "live": (500, "engine_failed"),
        "ready": (503, "not_ready"),
    }


def test_metrics_count_tokens_and_times(few: Client) -> None:
    names = ("t5_trt_prompt_tokens_total", "t5_trt_completion_tokens_total", "t5_trt_first_token_seconds_count")
    usage = few.ask("/generate", {"text": "さくら"})[1]["usage"]
    until(lambda: few.metric('t5_trt_requests_total{route="/generate",status="200"}') == 1)  # counted after it was sent
    assert [few.metric(name) for name in names] == [usage["prompt_tokens"], usage["completion_tokens"], 1]
    assert few.metric("t5_trt_token_seconds_count") == 1
    assert 0 < few.metric("t5_trt_token_seconds_sum") < few.metric("t5_trt_first_token_seconds_sum") * 10
