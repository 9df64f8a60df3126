"""`examples/ray_serve.py` on a real Ray cluster of this machine, with the shipped model."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import ROOT, SHIPPED
from tests.ray_cluster import example, local_cluster, processes
from tests.serving_requests import PATIENCE_S, until

serve = pytest.importorskip("ray.serve", reason="ray is installed without Ray Serve: pip install 't5-trt[ray]'")
requests = pytest.importorskip("requests", reason="requests, which ray brings, is not installed")


LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
#: thousands of steps
LONG = {"text": "か", "min_new_tokens": 20_000, "max_new_tokens": 20_000}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One application with room; below /few one of a single row, whose requests have little time."""
    module = example("ray_serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"model": str(SHIPPED), "max_body_bytes": 2000, "max_source_tokens": 50, "max_new_tokens": 20_000}
    few = {"max_rows": 1, "max_waiting": 1, "timeout": 3}
    with local_cluster():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(module.build_app({**common, "max_rows": 4, "timeout": 120}), name="roomy", route_prefix="/")
        serve.run(module.build_app(module.Settings(**common, **few)), name="few", route_prefix="/few")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def ask(url: str, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON."""
    answer = requests.post(f"{url}/{path}", json=body, timeout=PATIENCE_S)
    return answer.status_code, answer.json()


def events(answer: Any) -> list[Any]:
    """Of a stream, to its end."""
    return [json.loads(line.removeprefix(b"data: ")) for line in answer.iter_lines() if line and b"[DONE]" not in line]


def replica() -> psutil.Process:
    """The process of the model with room: the elder one."""
    return min(processes("ray::ServeReplica:roomy:t5"), key=lambda process: process.create_time())


def test_requests_at_once_get_the_texts_of_generate_alone(url: str, shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, hugging_face, _ = shipped
    asked: list[dict[str, Any]] = [{"text": line, "max_new_tokens": 90} for line in LINES[:8]]
    asked += [{"text": LINES[8], "num_beams": 3}, {"text": LINES[9], "do_sample": True, "temperature": 3.0, "seed": 4}]
    ready = threading.Barrier(len(asked))

    def wait_and_ask(body: dict[str, Any]) -> Any:
        ready.wait()
        if body["text"] not in LINES[4:8]:
            return ask(url, "generate", body)[1]["text"]
        with requests.post(f"{url}/generate", json={**body, "stream": True}, stream=True, timeout=60) as answer:
            *pieces, last = events(answer)
        assert last["finish_reason"] == "stop" and last["usage"]["completion_tokens"] > len(pieces) / 2
        return "".join(piece["text"] for piece in pieces)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(wait_and_ask, asked))
    for body, text in zip(asked, found, strict=True):
        settings = {"max_new_tokens": 128, **body}
        inputs = tokenizer(settings.pop("text"), return_tensors="pt")
        torch.manual_seed(settings.pop("seed", 0))
        assert text == tokenizer.decode(hugging_face.generate(**inputs, **settings)[0], skip_special_tokens=True)


def test_openai_clients_are_answered(url: str) -> None:
    with requests.post(
        f"{url}/v1/completions", json={"prompt": "さくら", "stream": True}, stream=True, timeout=60
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "".join(each["choices"][0]["text"] for each in events(answer)) == "sakura"
    listed = requests.get(f"{url}/v1/models", timeout=60).json()
    assert [model["id"] for model in listed["data"]] == ["kana_romaji"]
    assert requests.get(f"{url}/health/ready", timeout=60).json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("v1/completions", {}, 400, "invalid_request"),
        ("generate", {"text": "か き " * 40}, 400, "context_length_exceeded"),
        ("generate", {"text": "か", "beams": 2}, 400, "invalid_request"),
        ("generate", {"text": "か" * 2000}, 413, "body_too_large"),
        ("nothing", {"text": "か"}, 404, "not_found"),
        ("metrics", {"text": "か"}, 404, "not_found"),
        ("few/generate", LONG, 504, "timeout"),
    ],
)
def test_errors_are_those_of_the_server(url: str, path: str, body: Any, status: int, code: str) -> None:
    found, answer = ask(url, path, body)
    assert (found, answer["error"]["code"]) == (status, code)
    assert not any(word in answer["error"]["message"] for word in ("Traceback", "ray", "site-packages"))


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    head = "POST /few/generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=PATIENCE_S) as sent:
        sent.sendall(head.encode())
        answer = b""
        while not answer.endswith(b"}}"):
            more = sent.recv(4000)
            assert more, answer
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"body_too_slow"' in answer


def test_more_than_may_wait_are_refused_in_json(url: str) -> None:
    """Two may be at the replica and one may wait for it; they run until their time is over."""
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: ask(url, "few/generate", LONG), range(12)))
    codes = [answer["error"]["code"] for _, answer in found]
    assert set(codes) == {"queue_full", "timeout"} and codes.count("queue_full") >= 5
    assert {status for status, answer in found if answer["error"]["code"] == "queue_full"} == {429}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(url: str, stream: bool) -> None:
    """The only row, of which the next request needs some steps before its time is over."""
    for _ in range(2):
        with requests.post(f"{url}/few/generate", json={**LONG, "stream": True}, stream=True, timeout=60) as answer:
            next(answer.iter_content(1))
        if not stream:
            with pytest.raises(requests.exceptions.ReadTimeout):
                requests.post(f"{url}/few/generate", json=LONG, timeout=0.5)
    assert ask(url, "few/generate", {"text": "さくら"})[1]["text"] == "sakura"


def test_a_killed_replica_costs_nobody_a_wrong_answer(url: str) -> None:
    """Whoever has begun to read gets an error in JSON; others wait for another replica."""
    victim = replica()
    body = {"text": "さくら", "min_new_tokens": 4000, "max_new_tokens": 4000}
    with ThreadPoolExecutor(1) as pool:
        with requests.post(f"{url}/generate", json={**LONG, "stream": True}, stream=True, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line)
            whole = pool.submit(requests.post, f"{url}/generate", json=body, timeout=150)
            assert b"text" in next(lines)
            time.sleep(0.3)  # the other one runs, too
            os.kill(victim.pid, signal.SIGKILL)
            *_, last = lines
        answer = whole.result()
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "replica_lost"
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4000
    assert answer.json()["text"].startswith("sakura")
    until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
    assert ask(url, "v1/completions", {"prompt": "さくら"})[1]["choices"][0]["text"] == "sakura"


def test_autoscaling_aims_at_one_request_for_each_row() -> None:
    module = example("ray_serve")
    gateway = module.build_app({"model": "some/model", "max_rows": 8, "max_replicas": 3, "num_gpus": 1})
    (_, replicas), _ = gateway._bound_deployment.init_args, gateway._bound_deployment.init_kwargs
    options = replicas._bound_deployment
    scaling = options._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 8)
    assert options.max_ongoing_requests > 8 and options.ray_actor_options == {"num_cpus": 1, "num_gpus": 1}
