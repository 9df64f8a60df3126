"""``t5-trt serve`` as a process: the README's lines, signals, logs without texts, errors of its start."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t5_trt import TRTT5ForConditionalGeneration, cli
from tests.conftest import ROOT, SHIPPED
from tests.http_server import Client
from tests.serving_requests import PATIENCE_S, until

COMMAND = [sys.executable, "-m", "t5_trt.cli", "serve"]
LONG = {"text": "さくら", "min_new_tokens": 2000, "max_new_tokens": 2000}


class Process:
    """A server of the shipped model; its log is a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._log = folder / "log"
        command = [*COMMAND, str(SHIPPED.relative_to(ROOT)), "--port", "0", "--max-new-tokens", "2000", *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stderr=log, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.splitlines()]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def client(self) -> Client:
        """Once it is ready."""
        until(lambda: '"listening"' in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        url = next(line["url"] for line in self.lines() if "url" in line)
        client = Client(int(url.rpartition(":")[2]))
        until(lambda: client.ask("/health/ready")[0] == 200)
        return client


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Process]:
    started = Process(folder, *options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def shown(language: str) -> str:
    """The README's block of the server in a language."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Many clients at a time\n")[1].split("\n## ")[0]
    )
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """For the README's lines; the test after those ends it."""
    with running(tmp_path_factory.mktemp("server"), "--grace", "60", "--max-rows", "1") as started:
        yield started


def test_lines_of_the_readme(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    """curl and OpenAI's client get what they show."""
    serve, *asks = shown("").strip().splitlines()
    assert serve == f"t5-trt serve {SHIPPED.relative_to(ROOT)}"
    curl = shutil.which("curl")
    assert curl is not None, "curl is not installed; it asks the server as the README does"
    port = server.client().port
    for ask in asks:
        command = ask.partition("#")[0].replace("curl", curl + " --silent --fail", 1).replace("8000", str(port))
        answer = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
        assert ("sakura" in answer) or ("sa" in answer and "[DONE]" in answer)
    pytest.importorskip("openai", reason="openai is not installed: pip install 't5-trt[dev]'")
    exec(shown("python").replace("8000", str(port)), {})
    assert capsys.readouterr().out == "sakura\n"


def test_a_second_signal_ends_requests_with_503(server: Process) -> None:
    client = server.client()
    connections = [client.open("/generate", LONG) for _ in range(8)]
    until(lambda: client.metric("t5_trt_waiting") == 7)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: client.ask("/health/ready")[0] == 503)
    server.process.send_signal(signal.SIGINT)
    statuses = []
    for connection in connections:
        answer = connection.getresponse()
        statuses.append(answer.status)
        assert answer.status == 200 or json.loads(answer.read())["error"]["code"] == "shutting_down"
        connection.close()
    assert server.process.wait(PATIENCE_S) == 0 and time.monotonic() - begin < 40  # the grace is 60
    assert statuses.count(503) > 4


def test_sigterm_lets_requests_end_and_the_log_has_a_line_for_each_and_no_texts(tmp_path: Path) -> None:
    secrets = ["ひみつ", "himitsu", "geheim"]
    with running(tmp_path, "--max-body-bytes", "5000", "--max-source-tokens", "40") as server:
        client = server.client()
        statuses = [
            client.ask("/v1/completions", {"prompt": "ひみつ", "user": "geheim"})[0],
            client.ask("/v1/completions", {"prompt": "ひみつ" * 50})[0],
            client.ask("/v1/completions", {"prompt": "ひみつ", "geheim": 1, "stop": "geheim"})[0],
            client.ask("/v1/completions", {"prompt": ["ひみつ", 3]})[0],
            client.ask("/generate", {"text": "ひみつ", "forced_bos_token_id": 10**6})[0],
            client.ask("/generate", {"text": "ひみつ", "temperature": "geheim", "do_sample": True})[0],
            client.ask("/generate", b'{"text": "geheim')[0],
            client.ask("/geheim?text=geheim")[0],
            client.ask("/generate", b"geheim" * 2000)[0],
        ]
        assert client.events("/v1/completions", {"prompt": "ひみつ"})[-1] == "[DONE]"
        connection = client.open("/generate", LONG)
        until(lambda: client.metric("t5_trt_running") == 1)
        server.process.terminate()
        until(lambda: client.ask("/health/ready")[0] == 503)
        refused = client.ask("/generate", {"text": "ひみつ"})[0]
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 2000
        assert server.process.wait(PATIENCE_S) == 0
    assert statuses == [200, 400, 400, 400, 400, 400, 400, 404, 413] and refused == 503
    lines = [line for line in server.lines() if line["message"] == "request"]  # in the order of their ends
    assert sorted(line["status"] for line in lines) == sorted([*statuses, 200, 503, 200])
    for line in lines:
        assert re.fullmatch("[0-9a-f]{32}", line["id"]) and line["total_ms"] > 0
        assert (line["reason"] is None) == (line["status"] == 200)
    completions = [line for line in lines if line["route"] == "/v1/completions" and line["status"] == 200]
    assert len(completions) == 2
    for line in completions:
        assert 0 < line["first_token_ms"] <= line["total_ms"] and line["prompt_tokens"] > 3 < line["completion_tokens"]
    assert not [secret for secret in secrets if secret in server.log]


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.setattr(logging.getLogger("t5_trt"), "setLevel", lambda level: None)
    monkeypatch.setattr(TRTT5ForConditionalGeneration, "from_pretrained", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.run(["serve", str(SHIPPED), "--port", port]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and port in told and "free port" in told


def test_without_the_extra_its_name_is_told() -> None:
    code = "import sys; sys.modules['fastapi'] = None; from t5_trt import cli; sys.exit(cli.run(['serve', 'examples/kana_romaji']))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.strip().endswith("`pip install t5-trt[serve]`.")
