"""`examples/triton_server`: its config fits its model.py, which runs the shipped model behind a small fake of Triton's module."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from t5_trt import generate_many
from tests.conftest import ROOT, SHIPPED

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

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.logged: list[str] = []
        self.Logger = SimpleNamespace(log_error=self.logged.append)

    class Tensor:
        def __init__(self, name: str, values: np.ndarray) -> None:
            assert values.dtype == np.object_ and all(isinstance(value, bytes) for value in values.flat)
            self.name, self.values = name, values

        def as_numpy(self) -> np.ndarray:
            return self.values

    class TritonError(Exception):
        pass

    class InferenceResponse:
        def __init__(self, output_tensors: list[Any], error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Any:
        return next((tensor for tensor in request if tensor.name == name), None)


class Server:
    """Loads model.py as Triton does: the config as JSON, requests as lists of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path, **changes: str) -> None:
        self.fake = Fake()
        monkeypatch.setitem(sys.modules, self.fake.__name__, self.fake)
        spec = importlib.util.spec_from_file_location("triton_model", FOLDER / "1" / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        settings = {name: {"string_value": value} for name, value in {**parameters(), **changes}.items()}
        config = {"name": "t5_text", "max_batch_size": parse(CONFIG)["max_batch_size"][0], "parameters": settings}
        self.model = module.TritonPythonModel()
        where = {"model_instance_kind": "CPU", "model_instance_device_id": "0", "model_repository": str(repository)}
        self.model.initialize({"model_config": json.dumps(config), "model_name": "t5_text", **where})

    def ask(self, *requests: list[bytes]) -> list[list[str] | str]:
        """For each request its results, or its error."""
        tensors = [[self.fake.Tensor("TEXT", np.array([[text] for text in texts], dtype=object))] for texts in requests]
        answers: list[list[str] | str] = []
        for texts, response in zip(requests, self.model.execute(tensors), strict=True):
            if response.error is not None:
                answers.append(str(response.error))
                continue
            (tensor,) = response.output_tensors
            assert tensor.name == "RESULT" and tensor.as_numpy().shape == (len(texts), 1)
            answers.append([value.decode("utf-8") for value in tensor.as_numpy()[:, 0]])
        return answers


def utf8(*texts: str) -> list[bytes]:
    return [text.encode("utf-8") for text in texts]


def test_config_and_model_agree() -> None:
    config = parse(CONFIG)
    assert config["name"] == [FOLDER.name] and config["backend"] == ["python"] and config["max_batch_size"][0] >= 1
    (source,), (result,) = config["input"], config["output"]
    assert source == {"name": ["TEXT"], "data_type": ["TYPE_STRING"], "dims": [1]}
    assert result == {"name": ["RESULT"], "data_type": ["TYPE_STRING"], "dims": [1]}
    assert re.findall(r'get_input_tensor_by_name\(\w+, "(\w+)"\)', SOURCE) == source["name"]
    assert re.findall(r'pb_utils\.Tensor\("(\w+)"', SOURCE) == result["name"]
    (batching,) = config["dynamic_batching"]
    assert max(batching["preferred_batch_size"]) <= config["max_batch_size"][0]
    read = set(re.findall(r'settings\["(\w+)"\]', SOURCE)) | {"num_beams", "max_new_tokens"}
    assert read == set(parameters())


def test_config_is_a_model_config() -> None:
    config_pb2 = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed; the check above stands alone"
    )
    from google.protobuf import text_format

    config = text_format.Parse(CONFIG, config_pb2.ModelConfig())
    assert [tensor.name for tensor in (*config.input, *config.output)] == ["TEXT", "RESULT"]
    assert {name: value.string_value for name, value in config.parameters.items()} == parameters()


@pytest.mark.parametrize("beams", ["1", "3"])
def test_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shipped: tuple[Any, Any, Any], beams: str) -> None:
    tokenizer, stock, _ = shipped
    expected = list(generate_many(stock, tokenizer, TEXTS, batch_size=1, num_beams=int(beams), max_new_tokens=64))
    shutil.copytree(SHIPPED, tmp_path / "checkpoint")  # beside the version folders, as the README has it
    server = Server(monkeypatch, tmp_path, num_beams=beams)
    assert server.ask(utf8(*TEXTS[:3]), utf8(TEXTS[3])) == [expected[:3], expected[3:]]
    assert server.ask(utf8(TEXTS[1])) == [expected[1:2]]


def test_a_bad_request_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(monkeypatch, tmp_path, model=str(SHIPPED), max_source_tokens="20")
    answers = server.ask(utf8("さくら"), [b"\xff\xfe"], utf8("か き " * 20), utf8("がっこう"))
    assert answers[0] == ["sakura"] and answers[3] == ["gakkō"] and answers[1] == "TEXT is not UTF-8"
    assert re.fullmatch(r"TEXT got \d+ tokens; expected at most 20", answers[2])


def test_failures_tell_no_internals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Server(monkeypatch, tmp_path, model=str(SHIPPED))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(server.model.model, "generate", fail)
    assert server.ask(utf8("さくら"), utf8("か")) == ["internal error", "internal error"]
    assert "/secret/place" in server.fake.logged[0]
