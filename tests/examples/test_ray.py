"""`examples/ray_batch.py` and `examples/ray_serve.py` on a real Ray cluster of this machine, with the shipped model."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, SHIPPED

# read when ray is imported; the token keeps Ray from writing one into the home folder
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32))
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 't5-trt[ray]'")
pytest.importorskip("ray.serve", reason="ray is installed without Ray Serve: pip install 't5-trt[ray]'")
pytest.importorskip("ray.data", reason="ray is installed without Ray Data: pip install 't5-trt[ray]'")
requests = pytest.importorskip("requests", reason="requests, which ray brings, is not installed")

LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
TIMES = 10
SHARD_LINES = 4
SHARDS = len(LINES) * TIMES // SHARD_LINES
OPTIONS = ["--workers", "2", "--shard-lines", str(SHARD_LINES), "--batch-size", "4", "--max-new-tokens", "90"]


def example(name: str) -> ModuleType:
    """A script of examples/ as a module that Ray sends to its workers, as it does with a script that is run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    folder = tempfile.mkdtemp(prefix="ray")  # short, for the names of sockets
    memory = {"object_store_memory": 100_000_000, "_temp_dir": folder}
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("PYTHONWARNINGS")  # Ray's own processes use what is deprecated
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **memory)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(shipped: tuple[Any, Any, Any]) -> list[str]:
    """What the Hugging Face class makes of LINES."""
    tokenizer, stock, _ = shipped
    inputs = tokenizer(LINES, return_tensors="pt", padding=True)
    return tokenizer.batch_decode(stock.generate(**inputs, max_new_tokens=90), skip_special_tokens=True)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a run that takes a while; the output is `tmp_path` / out.txt."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(LINES * TIMES) + "\n", encoding="utf-8")
    return [str(SHIPPED), str(source), str(tmp_path / "out.txt"), *OPTIONS]


def test_actors_get_the_model_itself(shipped: tuple[Any, Any, Any]) -> None:
    """Pickled once into Ray's store; every actor opens engines of its own, and the driver's model goes on."""
    tokenizer, stock, ours = shipped
    inputs = tokenizer(LINES[:6], return_tensors="pt", padding=True)
    expected = stock.generate(**inputs, max_new_tokens=30, num_beams=2).tolist()

    class Holder:
        def __init__(self, model: Any) -> None:
            self.model = model

        def answer(self, inputs: Any) -> Any:
            return self.model.generate(**inputs, max_new_tokens=30, num_beams=2).tolist()

    assert ours.generate(**inputs, max_new_tokens=30, num_beams=2).tolist() == expected
    model = ray.put(ours)
    actors = [ray.remote(num_cpus=1)(Holder).remote(model) for _ in range(2)]
    try:
        waiting = [actor.answer.remote(dict(inputs)) for _ in range(3) for actor in actors]
        assert ray.get(waiting, timeout=120) == [expected] * 6
    finally:
        for actor in actors:
            ray.kill(actor)
    assert ours.generate(**inputs, max_new_tokens=30, num_beams=2).tolist() == expected


def output_of(folder: Path) -> list[str]:
    return (folder / "out.txt").read_text(encoding="utf-8").split("\n")[:-1]


def wait_for_shards(folder: Path, count: int) -> list[Path]:
    until = time.monotonic() + 90
    while len(found := sorted((folder / "out.txt.shards").glob("shard-*.txt"))) < count:
        assert time.monotonic() < until, "no shards were made"
        time.sleep(0.005)
    return found


def workers() -> list[psutil.Process]:
    """Processes of the actors that generate."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killed_worker(
    command: list[str], tmp_path: Path, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    batch = example("ray_batch")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(batch.main, command)
        wait_for_shards(tmp_path, 2)
        victim = workers()[0]
        victim.send_signal(signal.SIGKILL)
        there = len(wait_for_shards(tmp_path, 2))
        run.result()
    assert there < SHARDS, "the worker was killed too late to show anything"
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    assert output_of(tmp_path) == expected * TIMES
    printed = capsys.readouterr()
    assert f"{SHARDS} shards made, 0 were there" in printed.out
    assert f"{len(LINES) * TIMES}/{len(LINES) * TIMES}" in printed.err  # the bar
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_driver_and_resumed_run(
    command: list[str], tmp_path: Path, expected: list[str], cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), *command, "--address", cluster]
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(script, stdout=log, stderr=log)
        wait_for_shards(tmp_path, 3)
        first.kill()
        first.wait()
    finished = wait_for_shards(tmp_path, 3)
    assert len(finished) < SHARDS and not (tmp_path / "out.txt").exists()
    assert all(path.read_text(encoding="utf-8").count("\n") == SHARD_LINES for path in finished)
    finished[0].write_text("kept\n" * SHARD_LINES, encoding="utf-8")  # a shard made again would lose this

    batch = example("ray_batch")
    batch.main(command)
    assert f"{SHARDS - len(finished)} shards made, {len(finished)} were there" in capsys.readouterr().out
    wanted = expected * TIMES
    place = int(finished[0].stem.split("-")[1]) * SHARD_LINES
    wanted[place : place + SHARD_LINES] = ["kept"] * SHARD_LINES
    assert output_of(tmp_path) == wanted

    batch.main(command)  # all is there: no worker is started
    assert f"0 shards made, {SHARDS} were there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="different: num_beams"):
        batch.main([*command, "--num-beams", "2"])


@pytest.fixture(scope="class")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two deployments; they give their CPUs back at the end of the class."""
    from ray import serve

    module = example("ray_serve")
    broken = tmp_path_factory.mktemp("secret") / "model"
    shutil.copytree(SHIPPED, broken)
    settings = json.loads((broken / "generation_config.json").read_text())
    settings.update(length_penalty="wrong", min_new_tokens=100_000)  # the first matters to beams only
    (broken / "generation_config.json").write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    common = {"max_text_characters": 200, "max_body_bytes": 2000}
    good = {"model": str(SHIPPED), "max_batch_size": 6, "batch_wait_s": 0.5, "max_source_tokens": 50, **common}
    waiting = {"max_batch_size": 1, "max_queued_requests": 1}
    bad = {"model": str(broken), "request_timeout_s": 1, "max_new_tokens": 100_000, **waiting, **common}
    serve.run(module.build_app(good), name="good", route_prefix="/")
    serve.run(module.build_app(module.Settings(**bad)), name="bad", route_prefix="/bad")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


class TestServe:
    """One deployment of the shipped model; another of a copy whose settings make requests fail and last long."""

    def test_health(self, url: str) -> None:
        answer = requests.get(f"{url}/health", timeout=30)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "backend": "onnxruntime"})

    def test_equal_settings_share_batches(self, url: str, shipped: tuple[Any, Any, Any]) -> None:
        tokenizer, stock, _ = shipped
        asked = [(line, beams) for line, beams in zip(LINES[:9], [1] * 6 + [3] * 3, strict=True)]
        ready = threading.Barrier(len(asked))

        def ask(text: str, beams: int) -> Any:
            ready.wait()
            body = {"text": text, "num_beams": beams, "max_new_tokens": 90}
            return requests.post(f"{url}/generate", json=body, timeout=60).json()

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, *zip(*asked, strict=True)))
        for (text, beams), answer in zip(asked, answers, strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            tokens = stock.generate(**inputs, num_beams=beams, max_new_tokens=90)[0]
            assert answer["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert [answer["batch_size"] for answer in answers] == [6] * 6 + [3] * 3

    def test_stream(self, url: str, expected: list[str]) -> None:
        for text, whole in list(zip(LINES, expected, strict=True))[:4]:
            with requests.post(f"{url}/stream", json={"text": text}, stream=True, timeout=30) as answer:
                *pieces, last = [json.loads(line) for line in answer.iter_lines()]
            assert last == {"done": True}
            assert "".join(piece["text"] for piece in pieces) == whole
            assert len(pieces) > 1 or " " not in whole

    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            ("generate", {"text": "か" * 201}, 413, "text got 201 characters; expected at most 200"),
            ("stream", {"text": "か き " * 40}, 413, "tokens; expected at most 50"),
            ("generate", {"text": "か", "num_beams": 9}, 400, "num_beams got 9; expected at most 8"),
            ("generate", {"text": "か", "max_new_tokens": 257}, 400, "max_new_tokens got 257; expected at most 256"),
            ("generate", {"text": "か", "max_new_tokens": 0}, 400, "max_new_tokens: Input should be greater than"),
            ("generate", {"text": ["か"], "num_beams": True}, 400, "num_beams: Input should be a valid integer"),
            ("generate", {"text": "か", "beams": 2}, 400, "beams: Extra inputs are not permitted"),
            ("generate", {"text": "\ud800"}, 400, "body: Invalid JSON: unexpected end of hex escape"),
            ("generate", {}, 400, "text: Field required"),
            ("stream", {"text": "か", "num_beams": 2}, 400, "/stream takes 1"),
            ("nothing", {"text": "か"}, 404, "Not Found"),
            ("bad/generate", {"text": "か", "num_beams": 2}, 500, "internal error"),
            ("bad/generate", {"text": "か", "max_new_tokens": 100_000}, 504, "no answer within 1 s"),
        ],
    )
    def test_errors_are_clear_and_tell_no_internals(
        self, url: str, path: str, body: dict[str, Any], status: int, message: str
    ) -> None:
        answer = requests.post(f"{url}/{path}", json=body, timeout=30)
        assert answer.status_code == status and set(answer.json()) == {"error"}
        assert message in answer.json()["error"]
        assert not any(word in answer.text for word in ("Traceback", "secret", "site-packages", "examples", "Error:"))

    def test_broken_body(self, url: str) -> None:
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{url}/generate", data=b'{"text', headers=headers, timeout=30)
        words = "body: Invalid JSON: EOF while parsing a string at line 1 column 6"
        assert (answer.status_code, answer.json()) == (400, {"error": words})

    def test_an_error_is_short_whatever_was_sent(self, url: str) -> None:
        answer = requests.post(
            f"{url}/generate", json={f"{place:02}" + 120 * "x": 1 for place in range(15)}, timeout=30
        )
        assert answer.status_code == 400 and "text: Field required" in answer.json()["error"]
        assert answer.text.count("Extra inputs") == 4 and len(answer.text) < 500

    @pytest.mark.parametrize("path", ["generate", "stream"])
    @pytest.mark.parametrize(
        ("length", "sent", "status", "message"),
        [
            (10**12, 2001, 413, "the body is too long; expected at most 2000 bytes"),
            (None, 2001, 413, "the body is too long; expected at most 2000 bytes"),
            (2000, 20, 408, "the body did not arrive within 1 s"),
        ],
        ids=["large", "endless", "slow"],
    )
    def test_bodies(self, url: str, path: str, length: int | None, sent: int, status: int, message: str) -> None:
        """A body that is announced to be large, one that may have no end, and one that does not come."""
        port = int(url.rsplit(":", 1)[1])
        kind = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        body = b"%x\r\n%s\r\n" % (sent, b" " * sent) if length is None else b" " * sent
        head = f"POST /bad/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{kind}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            answer = b""
            while not answer.endswith(b'"}'):
                piece = connection.recv(10_000)
                assert piece, answer
                answer += piece
        assert answer.startswith(b"HTTP/1.1 %d " % status) and message in answer.decode()

    def test_more_than_may_wait(self, url: str) -> None:
        """Four may run and one may wait, and do until their time is over; the others are refused at once."""

        def ask(_: int) -> tuple[int, str]:
            answer = requests.post(f"{url}/bad/generate", json={"text": "か", "max_new_tokens": 100_000}, timeout=30)
            return answer.status_code, answer.text

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(20)))
        refused = [text for status, text in answers if status == 503]
        assert len(refused) >= 5 and sum(status == 504 for status, _ in answers) == 20 - len(refused) >= 1
        assert all(text.startswith("Request dropped due to backpressure") and "/" not in text for text in refused)

    def test_streams_end_when_late_and_when_left(self, url: str) -> None:
        body = {"text": "か", "max_new_tokens": 100_000}
        with requests.post(f"{url}/bad/stream", json=body, stream=True, timeout=30) as answer:
            lines = [json.loads(line) for line in answer.iter_lines()]
        assert lines[-1] == {"error": "no whole answer within 1 s"}
        with requests.post(f"{url}/bad/stream", json=body, stream=True, timeout=30) as answer:
            next(answer.iter_content(1))
        start = time.monotonic()  # the replica's one thread is free again, long before 100 000 tokens are made
        assert requests.post(f"{url}/bad/generate", json={"text": "か", "max_new_tokens": 2}, timeout=30).ok
        assert time.monotonic() - start < 1
