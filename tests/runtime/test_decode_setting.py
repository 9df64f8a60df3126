"""`decode=`: who does the one-token decoder step, and what is said where that is not what was asked for. TensorRT and GPU are simulated."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5_trt import (
    BackendError,
    InputError,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    UnsupportedModelError,
    prebuild,
)
from t5_trt.config import RuntimeConfig
from t5_trt.errors import T5TRTError
from t5_trt.runtime import select
from t5_trt.runtime.select import choose, resolve
from tests.conftest import SHIPPED
from tests.tiny_models import make_hugging_face

Problem = dict[str, Any]
#: what keeps kernels from running -> how it is simulated, settings, the error's kind where kernels were asked for, words
PROBLEMS: dict[str, tuple[Problem, Problem, type[T5TRTError], str]] = {
    "old GPU": ({"capability": (7, 5)}, {}, BackendError, r"need compute capability 8\.0; this GPU has 7\.5"),
    "no bindings": ({"bindings": "the CUDA kernels need the package cuda-bindings (x)"}, {}, BackendError, "kernels-cu"),
    "tf32": ({}, {"precision": "tf32"}, InputError, "precision is 'tf32'; the kernels compute in 'fp32', 'fp16', 'bf16' or 'int8'"),
    "model": ({"d_kv": 20}, {}, UnsupportedModelError, "do not take this model: d_kv is 20"),
}  # fmt: skip


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with TensorRT and a GPU of some capability, with or without what the kernels need."""
    select._log_once.cache_clear()
    api = SimpleNamespace(check_precision=lambda precision: None, version="10.0", flavor="tensorrt")

    def show(capability: tuple[int, int] = (9, 0), bindings: str | None = None, **_: Any) -> None:
        monkeypatch.setattr(select, "load_tensorrt", lambda flavor=None: api)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(select, "missing_bindings", lambda: bindings)

    yield show
    select._log_once.cache_clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if (record.name, record.levelno) == ("t5_trt", logging.WARNING)
    ]


def test_kernels_are_what_auto_takes(tensorrt: Any, caplog: pytest.LogCaptureFixture) -> None:
    tensorrt()
    for decode in ("auto", "kernels"):
        ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, decode=decode)
        assert "backend=tensorrt, precision=fp16, decode=kernels, engines=(none opened yet)" in repr(ours)
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, decode="engine")
    assert "decode=engine" in repr(ours) and ours.runtime_config.decode == "engine"
    assert not warnings_of(caplog)


@pytest.mark.parametrize(("machine", "settings", "kind", "words"), PROBLEMS.values(), ids=PROBLEMS)
def test_engine_where_kernels_cannot_run(
    tensorrt: Any, caplog: pytest.LogCaptureFixture, machine: Problem, settings: Problem, kind: type[T5TRTError], words: str
) -> None:  # fmt: skip
    """With one warning; asking for it is quiet, and asking for kernels an error."""
    tensorrt(**machine)
    hugging_face = make_hugging_face("t5-v1.1", d_kv=machine.get("d_kv", 16))
    TRTT5ForConditionalGeneration.from_model(hugging_face, **settings, decode="engine")
    assert not warnings_of(caplog)
    for _ in range(2):
        ours = TRTT5ForConditionalGeneration.from_model(hugging_face, **settings)
        assert "backend=tensorrt" in repr(ours) and "decode=engine" in repr(ours)
    (message,) = warnings_of(caplog)
    assert message.startswith("decoder steps are run by a TensorRT engine and not by the library's own kernels: ")
    assert message.endswith(". decode='engine' chooses that without this warning.") and ".." not in message
    for backend in ("auto", "tensorrt"):
        with pytest.raises(
            kind, match=f"decode='kernels' cannot be had here: .*{words}.*Or use decode='auto' or 'engine'"
        ):
            TRTT5ForConditionalGeneration.from_model(hugging_face, **settings, backend=backend, decode="kernels")


def test_encoder_has_no_steps_to_warn_of(tensorrt: Any, caplog: pytest.LogCaptureFixture) -> None:
    tensorrt(capability=(7, 5))
    ours = TRTT5EncoderModel.from_pretrained(SHIPPED)
    assert ours.device.type == "cuda" and "decode=" not in repr(ours)
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("backend", "decode", "words"),
    [
        ("cuda", "engine", "decode got 'engine'; the backend 'cuda' has no engines"),
        ("auto", "gpu", "decode got 'gpu'; expected one of 'auto', 'kernels', 'engine'"),
    ],
)
def test_settings_that_a_backend_does_not_have_are_refused(
    tensorrt: Any, backend: str, decode: str, words: str
) -> None:
    tensorrt()
    with pytest.raises(InputError, match=words):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, backend=backend, decode=decode)
    with pytest.raises(InputError, match=words):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend=backend, decode=decode)


def test_what_each_backend_takes(tensorrt: Any) -> None:
    tensorrt()
    for decode in ("auto", "kernels"):
        assert choose(RuntimeConfig(backend="cuda", decode=decode)).decode == "kernels"
    assert choose(RuntimeConfig(backend="onnxruntime", decode="engine")).decode == "engine"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """A CPU with a C compiler, or without one for a reason; messages are logged anew."""
    select._log_once.cache_clear()
    caplog.set_level(logging.INFO, "t5_trt")
    yield lambda missing=None: monkeypatch.setattr(select, "why_not_compiled", lambda: missing)
    select._log_once.cache_clear()


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "int8"])
def test_c_code_decodes_on_a_cpu_with_a_compiler(
    compiler: Any, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    compiler()
    for decode in ("auto", "kernels"):
        ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision=precision, decode=decode)
        assert "backend=onnxruntime" in repr(ours) and "decode=kernels" in repr(ours)
    assert "decode=engine" in repr(TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, decode="engine"))
    assert "decoder steps" not in caplog.text


@pytest.mark.parametrize(
    ("precision", "missing", "kind", "words"),
    [
        ("fp32", "there is no C compiler. It takes one", BackendError, "there is no C compiler. It takes one"),
        (
            "int4",
            None,
            InputError,
            "precision is 'int4'; the library's own C code computes in 'fp32', 'bf16' or 'int8'",
        ),
    ],
)
def test_onnxruntime_decodes_where_c_code_cannot(
    compiler: Any, caplog: pytest.LogCaptureFixture, precision: str, missing: str | None, kind: type[T5TRTError], words: str
) -> None:  # fmt: skip
    """With one line at INFO; asking for it is quiet, and asking for the C code an error."""
    compiler(missing)
    TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision=precision, decode="engine")
    TRTT5EncoderModel.from_pretrained(SHIPPED, precision="int8" if precision == "int4" else precision)
    assert words not in caplog.text
    for _ in range(2):
        ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision=precision)
        assert "decode=engine" in repr(ours)
    said = [record for record in caplog.records if words in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO"] and said[0].getMessage().endswith(f"C code: {words}.")
    for backend in ("auto", "onnxruntime"):
        with pytest.raises(
            kind, match=r"decode='kernels' cannot be had here: .*Or use decode='auto' or 'engine'"
        ) as raised:
            TRTT5ForConditionalGeneration.from_pretrained(
                SHIPPED, precision=precision, backend=backend, decode="kernels"
            )
        assert words in str(raised.value) and ("on GPUs, cannot" in str(raised.value)) == (backend == "auto")


def test_precision_that_only_c_code_has(compiler: Any) -> None:
    compiler()
    for decode in ("auto", "kernels"):
        assert choose(RuntimeConfig(backend="onnxruntime", precision="bf16", decode=decode)).decode == "kernels"
    words = (
        r"precision is 'bf16'; ONNX Runtime computes in 'fp32', 'int8' or 'int4'\. Or use decode='auto' or 'kernels'"
    )
    with pytest.raises(InputError, match=words):
        choose(RuntimeConfig(backend="onnxruntime", precision="bf16", decode="engine"))
    compiler("there is no C compiler. It takes one")
    for decode, what, instead in (
        ("auto", "precision='bf16'", "precision='fp32'"),
        ("kernels", "decode='kernels'", "decode='auto' and precision='fp32'"),
    ):
        words = f"{what} cannot be had here: there is no C compiler. It takes one. Or use {instead}."
        with pytest.raises(BackendError, match=re.escape(words)):
            choose(RuntimeConfig(backend="onnxruntime", precision="bf16", decode=decode))


def test_copies_keep_it(tensorrt: Any) -> None:
    tensorrt()
    ours: Any = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, decode="engine")
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert "decode=engine" in repr(again)


def test_conversion_chooses_anew(tensorrt: Any, caplog: pytest.LogCaptureFixture) -> None:
    """float32's vectors are of 4, half precision's of 8."""
    tensorrt()
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1", d_kv=20), precision="fp32")
    assert "precision=fp32, decode=kernels" in repr(ours) and not warnings_of(caplog)
    ours.half()
    assert "precision=fp16, decode=engine" in repr(ours) and len(warnings_of(caplog)) == 1


def test_a_model_that_is_not_known_yet_is_not_warned_of(tensorrt: Any, caplog: pytest.LogCaptureFixture) -> None:
    tensorrt(capability=(7, 5))
    resolve(RuntimeConfig())
    assert not warnings_of(caplog)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graphs that `build_engines` would build."""

    class Provider:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def plans(self, wanted: Any) -> list[bytes]:
            return [b"plan"] * len(wanted)

        def request(self, graph: str, shapes: Any) -> Any:
            return SimpleNamespace(label=graph)

    monkeypatch.setattr(prebuild, "EngineProvider", Provider)
    monkeypatch.setattr(prebuild, "gpu_facts", lambda device: {})

    def build(flavor: str = "rtx", **options: Any) -> list[str]:
        monkeypatch.setattr(prebuild, "load_tensorrt", lambda _: SimpleNamespace(flavor=flavor))
        return [engine.label for engine in prebuild.build_engines(str(SHIPPED), flavor=flavor, **options)]

    return build


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"compute_capabilities": ("8.6", "12.0")}, False),
        ({"compute_capabilities": ("8.6", "12.0"), "decode": "kernels"}, False),
        ({"compute_capabilities": ("8.6", "12.0"), "decode": "engine"}, True),
        ({"compute_capabilities": ("7.5", "8.6")}, True),
        ({"compute_capabilities": ("8.6",), "precision": "int8"}, False),
        ({"compute_capabilities": ("8.6",), "precision": "tf32"}, True),
    ],
)
def test_step_is_built_ahead_where_an_engine_does_it(built: Any, options: dict[str, Any], step: bool) -> None:
    assert ("decoder_step" in built(**options)) == step


def test_step_is_built_ahead_for_the_gpu_at_hand(built: Any, tensorrt: Any) -> None:
    tensorrt()
    assert built("tensorrt") == ["encoder"]
    assert built("tensorrt", decode="engine") == ["encoder", "decoder_step", "decoder_queries"]
    tensorrt(bindings="the CUDA kernels need the package cuda-bindings (x)")
    assert built("tensorrt") == ["encoder", "decoder_step", "decoder_queries"]
    with pytest.raises(BackendError, match=r"decode='kernels' cannot be had: .*cuda-bindings"):
        built("tensorrt", decode="kernels")


def test_kernels_for_an_older_gpu_cannot_be_built_for(built: Any) -> None:
    with pytest.raises(BackendError, match=r"the kernels need compute capability 8\.0; got 7\.5"):
        built(compute_capabilities=("7.5", "8.6"), decode="kernels")
    with pytest.raises(InputError, match="decode got 'gpu'"):
        built(compute_capabilities=("8.6",), decode="gpu")
