"""`examples/triton_server`: its config fits its model.py, which runs the shipped model behind a small fake of Triton's module."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from t5_trt import generate_many
from tests.conftest import ROOT, SHIPPED
from tests.serving_requests import PATIENCE_S, until

FOLDER = ROOT / "examples" / "triton_server" / "t5_text"
CONFIG = (FOLDER / "config.pbtxt").read_text(encoding="utf-8")
SOURCE = (FOLDER / "1" / "model.py").read_text(encoding="utf-8")
TEXTS = ["さくら", "がっこう", "きょうは とても いい てんきですね。", ""]


def parse(text: str) -> dict[str, list[Any]]:
    """Protobuf text format, as far as config.pbtxt uses it; every field is a list of its values."""
    tokens = re.findall(r'"[^"\\]*"|[\w.+-]+|[{}\[\]:,]', re.sub(r"#.*", "", text))
    assert re.sub(r"\s", "", "".join(tokens)) == re.sub(r"\s", "", re.sub(r"#.*", "", text)), "unknown characters"
    position = 0

    def take(expected: str = "") -> str:
        nonlocal position
        position += 1
        assert not expected or tokens[position - 1] == expected, tokens[position - 1 :][:5]
        return str(tokens[position - 1])

    def value() -> Any:
        if tokens[position] == "{":
            take("{")
            found = message("}")
            take("}")
            return found
        word = take()
        assert re.fullmatch(r'".*"|\w[\w.+-]*|-\d+', word), word
        return word[1:-1] if word.startswith('"') else int(word) if re.fullmatch(r"-?\d+", word) else word

    def message(end: str | None) -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {}
        while position < len(tokens) and tokens[position] != end:
            name = take()
            assert re.fullmatch(r"[a-z_]+", name), name
            if tokens[position] == ":":
                take(":")
            else:
                assert tokens[position] in "{[", f"{name} has no value"
            values = fields.setdefault(name, [])
            if tokens[position] != "[":
                values.append(value())
                continue
            take("[")
            while tokens[position] != "]":
                values.append(value())
                if tokens[position] != "]":
                    take(",")
            take("]")
        return fields

    found = message(None)
    assert position == len(tokens)
    return found


def parameters() -> dict[str, str]:
    return {entry["key"][0]: entry["value"][0]["string_value"][0] for entry in parse(CONFIG)["parameters"]}


class Fake(ModuleType):
    """What model.py uses of `triton_python_backend_utils`."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.logged: list[str] = []
        self.Logger = SimpleNamespace(log_error=self.logged.append)

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            assert values.dtype == np.bool_ or all(isinstance(value, bytes) for value in values.flat)
            self.name, self.values = name, values

        def as_numpy(self) -> np.ndarray:
            return self.values

    class TritonError(Exception):
        INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

        def __init__(self, message: str, code: str = INTERNAL) -> None:
            super().__init__(message)
            self.code = code

    class InferenceResponse:
        def __init__(self, output_tensors: list[Any], error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return next((tensor for tensor in request.tensors if tensor.name == name), None)


class Request:
    """A request with its client: what was sent to it."""

    def __init__(self, fake: Fake, text: str | bytes, stream: bool = False, settings: Any = None) -> None:
        raw = text if isinstance(text, bytes) else text.encode()
        self.tensors = [fake.Tensor("TEXT", np.array([raw], dtype=object))]
        if stream:
            self.tensors.append(fake.Tensor("STREAM", np.array([True])))
        if settings is not None:
            made = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
            self.tensors.append(fake.Tensor("SETTINGS", np.array([made], dtype=object)))
        self.texts: list[list[str]] = []
        self.error: Any = None
        self.left, self._final = False, threading.Event()

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return self.left

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self._final.is_set()
        if response is not None and response.error is not None:
            self.error = response.error
        elif response is not None:
            (tensor,) = response.output_tensors
            assert tensor.name == "RESULT" and tensor.as_numpy().ndim == 1
            self.texts.append([value.decode() for value in tensor.as_numpy()])
        if flags:
            self._final.set()

    def answer(self) -> list[list[str]] | str:
        """The texts of each response, or the error."""
        assert self._final.wait(PATIENCE_S)
        return self.texts if self.error is None else f"{self.error.code}: {self.error}"


class Server:
    """Loads model.py as Triton does: the config as JSON, requests in lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path, **changes: str) -> None:
        self.fake = Fake()
        monkeypatch.setitem(sys.modules, self.fake.__name__, self.fake)
        spec = importlib.util.spec_from_file_location("triton_model", FOLDER / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = {name: {"string_value": value} for name, value in {**parameters(), **changes}.items()}
        self.model = module.TritonPythonModel()
        where = {"model_instance_kind": "CPU", "model_instance_device_id": "0", "model_repository": str(repository)}
        config = {"name": "t5_text", "parameters": settings}
        self.model.initialize({"model_config": json.dumps(config), "model_name": "t5_text", **where})

    def ask(self, text: str | bytes, **more: Any) -> Request:
        """Hand one request to the model, which does not wait for its answer."""
        request = Request(self.fake, text, **more)
        assert self.model.execute([request]) is None
        return request


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the shipped model with some changed parameters; they end with the test."""
    servers: list[Server] = []

    def made(**changes: str) -> Server:
        servers.append(Server(monkeypatch, tmp_path, **{"model": str(SHIPPED), "num_threads": "1", **changes}))
        return servers[-1]

    yield made
    for server in servers:
        server.model.finalize()


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of short texts for all tests that ask it for what it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("repository")
        server = Server(patch, folder, model=str(SHIPPED), num_threads="1", max_source_tokens="20")
        yield server
        server.model.finalize()


#: a request that ends only when somebody ends it; its server needs ``max_new_tokens="100000"``
ENDLESS = {"max_new_tokens": 100_000, "min_new_tokens": 100_000}


def test_config_and_model_agree() -> None:
    config = parse(CONFIG)
    assert config["name"] == [FOLDER.name] and config["backend"] == ["python"] and config["max_batch_size"] == [0]
    assert config["model_transaction_policy"] == [{"decoupled": ["true"]}] and "dynamic_batching" not in config
    assert {entry["name"][0]: entry["data_type"][0] for entry in config["input"]} == {
        "TEXT": "TYPE_STRING", "STREAM": "TYPE_BOOL", "SETTINGS": "TYPE_STRING",
    }  # fmt: skip
    assert [entry.get("optional") for entry in config["input"]] == [None, ["true"], ["true"]]
    assert all(entry["dims"] == [1] for entry in config["input"])
    assert config["output"] == [{"name": ["RESULT"], "data_type": ["TYPE_STRING"], "dims": [-1]}]
    assert re.findall(r'pb_utils\.Tensor\("(\w+)"', SOURCE) == ["RESULT"]
    read = set(re.findall(r'settings\["(\w+)"\]', SOURCE)) | {"max_rows", "max_waiting"}
    assert read == set(parameters())


def test_config_is_a_model_config() -> None:
    config_pb2 = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed; the check above stands alone"
    )
    from google.protobuf import text_format

    config = text_format.Parse(CONFIG, config_pb2.ModelConfig())
    assert [tensor.name for tensor in (*config.input, *config.output)] == ["TEXT", "STREAM", "SETTINGS", "RESULT"]
    assert {name: value.string_value for name, value in config.parameters.items()} == parameters()


def test_answers_are_those_of_generate_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shipped: tuple[Any, Any, Any]
) -> None:
    """Whole ones and streams, with settings of their own, all at once."""
    tokenizer, hugging_face, _ = shipped
    shutil.copytree(SHIPPED, tmp_path / "checkpoint")  # beside the version folders, as the README has it
    server = Server(monkeypatch, tmp_path)
    expected = list(generate_many(hugging_face, tokenizer, TEXTS, batch_size=1, max_new_tokens=96))
    drawn = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 20}
    torch.manual_seed(5)
    sampled = hugging_face.generate(**tokenizer(TEXTS[2], return_tensors="pt"), **drawn)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20}
    best = hugging_face.generate(**tokenizer(TEXTS[1], return_tensors="pt"), **beams)
    whole = [server.ask(text, settings={"max_new_tokens": 96}) for text in TEXTS]
    streams = [server.ask(text, stream=True, settings={"max_new_tokens": 96}) for text in TEXTS]
    others = [server.ask(TEXTS[2], settings={**drawn, "seed": 5}), server.ask(TEXTS[1], settings=beams)]
    assert [request.answer() for request in whole] == [[[text]] for text in expected]
    assert ["".join(piece for (piece,) in request.answer()) for request in streams] == expected
    assert [request.answer() for request in others] == [
        [tokenizer.batch_decode(rows, skip_special_tokens=True)] for rows in (sampled, best)
    ]
    server.model.finalize()


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        (b"\xff\xfe", {}, "invalid: invalid_request: TEXT or SETTINGS is not UTF-8."),
        ("か き " * 20, {}, "invalid: context_length_exceeded: text got"),
        ("か", {"settings": b"{"}, "invalid: invalid_request: SETTINGS is no JSON."),
        ("か", {"settings": [5]}, "invalid: invalid_request: SETTINGS got other JSON"),
        ("か", {"settings": {"seed": "x"}}, "invalid: invalid_request: SETTINGS: seed: "),
        ("か", {"settings": {"max_new_token": 5}}, "invalid: invalid_request: submit() got max_new_token"),
        ("か", {"settings": {"max_new_tokens": 513}}, "invalid: invalid_request: new tokens got 513"),
        ("か", {"settings": {"num_beams": 17}}, "invalid: invalid_request: num_beams got 17"),
        ("か", {"stream": True, "settings": {"num_return_sequences": 2}}, "invalid: invalid_request: a stream has one"),
    ],
)
def test_a_bad_request_fails_alone(short_texts: Server, text: str | bytes, more: dict[str, Any], told: str) -> None:
    server = short_texts
    requests = [server.ask("さくら"), server.ask(text, **more), server.ask("がっこう", stream=True)]
    first, bad, last = (request.answer() for request in requests)
    assert first == [["sakura"]] and "".join(piece for (piece,) in last) == "gakkō"
    assert isinstance(bad, str) and bad.startswith(told) and not server.fake.logged


def test_a_client_that_leaves_frees_its_row(start: Callable[..., Server]) -> None:
    server = start(max_rows="1", max_new_tokens="100000")
    engine = server.model.service.engine
    running = server.ask("さくら", stream=True, settings=ENDLESS)
    waiting = server.ask("さくら", settings=ENDLESS)
    until(lambda: len(running.texts) > 1)  # pieces come while it runs
    waiting.left = running.left = True
    assert [request.answer() for request in (running, waiting)] == ["cancelled: cancelled: the client has left."] * 2
    until(lambda: engine.stats().running == engine.stats().waiting == 0)
    assert engine.stats().cancelled == 2 and engine.stats().tokens < 100_000
    assert server.ask("さくら").answer() == [["sakura"]]


def test_too_many_and_too_slow_requests_are_told_so(start: Callable[..., Server]) -> None:
    server = start(max_rows="1", max_waiting="1", timeout="0.5", max_new_tokens="100000")
    running = server.ask("さくら", settings=ENDLESS)
    until(lambda: server.model.service.engine.stats().running == 1)
    waiting = server.ask("さくら", settings=ENDLESS)
    until(lambda: server.model.service.engine.stats().waiting == 1)
    begin = time.monotonic()
    assert server.ask("さくら").answer() == "unavailable: queue_full: too many requests wait; try again later."
    assert time.monotonic() - begin < 0.5
    for request in (running, waiting):
        assert request.answer() == "unavailable: timeout: the request did not end within the server's time limit."


def test_failures_tell_no_internals(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(server.model.service.model.session, "encode", fail)
    answer = server.ask("さくら").answer()
    assert answer == "internal: internal_error: internal error; the server's log has it."
    assert "/secret/place" in server.fake.logged[0]


def test_requests_that_run_when_the_server_ends_get_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(monkeypatch, tmp_path, model=str(SHIPPED), max_rows="1", max_new_tokens="100000")
    requests = [server.ask("さくら", settings=ENDLESS) for _ in range(2)]
    until(lambda: server.model.service.engine.stats().running == 1)
    server.model.finalize()
    assert {str(request.answer()).partition(" ")[0] for request in requests} == {"unavailable:"}
